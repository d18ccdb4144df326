"""EfficientNet-Lite: padding, folded norms, sizes; its published weights are in test_lite.py."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel

from ballad_hf.models.configuration_efficientnet_lite import EfficientNetLiteConfig
from ballad_hf.models.modeling_efficientnet_lite import ConvNorm, EfficientNetLiteModel


pytestmark = pytest.mark.numeric

STAGES = {
    "depths": (1, 2),
    "widths": (8, 12),
    "kernel_sizes": (3, 5),
    "strides": (1, 2),
    "expand_ratios": (1, 3),
}


def tiny_config(**values) -> EfficientNetLiteConfig:
    return EfficientNetLiteConfig(**{"stem_width": 8, "hidden_size": 16, "image_size": 32, **STAGES, **values})


def tiny_tower(seed: int = 0, **values) -> EfficientNetLiteModel:
    """A tower in which no statistic, weight or bias of a norm has its default."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tower = EfficientNetLiteModel(tiny_config(**values)).eval()
        for module in tower.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.uniform_(module.bias, -0.5, 0.5)
                module.running_mean.uniform_(-0.5, 0.5)
                module.running_var.uniform_(0.5, 1.5)
    return tower


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def summing_layer(kernel_size: int) -> ConvNorm:
    layer = ConvNorm(1, 1, kernel_size, stride=2, groups=1, eps=0.0).eval()
    nn.init.ones_(layer.conv.weight)
    return layer


def test_strided_convolutions_pad_as_tensorflow_does_by_hand():
    """Even sides: the only padding is at the end. Odd sides: one pixel on either side."""
    column = torch.tensor([1.0, 2.0, 4.0, 8.0])
    with torch.no_grad():
        even = summing_layer(3)(column[None, None, :, None].expand(1, 1, 4, 4))
        # windows of rows {1, 2, 4} and {4, 8, padding}, times three columns of pixels, then two
        torch.testing.assert_close(even[0, 0], torch.tensor([[21.0, 14.0], [36.0, 24.0]]))
        odd = summing_layer(3)(column[None, None, :3, None].expand(1, 1, 3, 3))
        # rows {padding, 1, 2} and {2, 4, padding}, and two columns of pixels in both windows
        torch.testing.assert_close(odd[0, 0], torch.tensor([[6.0, 6.0], [12.0, 12.0]]))
        wide = summing_layer(5)(torch.ones(1, 1, 4, 4))
        # one pixel of padding before and two after: 4 of 5 and 3 of 5 rows hold pixels
        torch.testing.assert_close(wide[0, 0], torch.tensor([[16.0, 12.0], [12.0, 9.0]]))


def test_a_folded_norm_has_the_values_and_the_gradients_of_the_norm(pixels):
    layer = tiny_tower().stem
    names = ("conv.weight", "norm.weight", "norm.bias")
    parameters = dict(layer.named_parameters())
    assert parameters.keys() == set(names)
    norm = layer.norm
    padded = F.pad(pixels, (0, 1, 0, 1))
    plain = F.conv2d(padded, layer.conv.weight, stride=2)
    expected = F.batch_norm(plain, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    expected_gradients = torch.autograd.grad((weights * expected).sum(), list(parameters.values()))
    given = layer(pixels)
    torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad((weights * given).sum(), list(parameters.values()))
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-3)


def test_training_keeps_the_statistics_unless_they_are_let_go(pixels):
    tower = tiny_tower()
    before = {name: value.clone() for name, value in tower.named_buffers()}
    expected = tower(pixels).pooler_output
    tower.train()
    assert torch.equal(tower(pixels).pooler_output, expected)
    assert all(torch.equal(value, before[name]) for name, value in tower.named_buffers())
    tower.config.freeze_batch_norm = False
    tower.train()
    assert not torch.allclose(tower(pixels).pooler_output, expected)
    plain = F.conv2d(F.pad(pixels, (0, 1, 0, 1)), tower.stem.conv.weight, stride=2)
    mean = 0.99 * before["stem.norm.running_mean"] + 0.01 * plain.mean(dim=(0, 2, 3))
    torch.testing.assert_close(tower.stem.norm.running_mean, mean, rtol=1e-4, atol=1e-5)


def test_the_default_is_lite0():
    """4,652,008 parameters as published, of which the classifier has 1280 * 1000 + 1000."""
    with torch.device("meta"):
        tower = EfficientNetLiteModel(EfficientNetLiteConfig())
    assert sum(parameter.numel() for parameter in tower.parameters()) == 4_652_008 - 1_281_000


def test_shapes_of_the_maps_at_any_size():
    tower = tiny_tower()
    output = tower(torch.zeros(2, 3, 33, 50), output_hidden_states=True)
    assert [tuple(hidden.shape) for hidden in output.hidden_states] == [(2, 8, 17, 25), (2, 8, 17, 25), (2, 12, 9, 13)]
    assert tuple(output.last_hidden_state.shape) == (2, 16, 9, 13)
    torch.testing.assert_close(output.pooler_output, output.last_hidden_state.mean(dim=(2, 3)))
    assert tower(torch.zeros(2, 3, 33, 50), return_dict=False)[1].shape == (2, 16)


def test_maps_that_are_handed_out_are_not_overwritten(pixels):
    """Activations are written in place."""
    tower = tiny_tower()
    maps = tower(pixels, output_hidden_states=True).hidden_states
    hidden = maps[0]
    for stage, expected in zip(tower.stages, maps[1:], strict=True):
        hidden = stage(hidden)
        torch.testing.assert_close(hidden, expected)


def test_it_saves_with_its_code_and_loads_by_auto_model(pixels, tmp_path):
    tower = tiny_tower()
    tower.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.glob("*.py")} == {
        "configuration_efficientnet_lite.py",
        "modeling_efficientnet_lite.py",
    }
    again = AutoModel.from_pretrained(tmp_path)
    assert type(again) is EfficientNetLiteModel
    assert torch.equal(again(pixels).pooler_output, tower(pixels).pooler_output)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"depths": (1,)}, "one value for each stage"),
        ({"strides": (1, 3)}, r"\[1, 3\]: each must be 1 or 2"),
        ({"kernel_sizes": (3, 4)}, r"\[3, 4\]: each must be odd"),
        ({"widths": (8, 0)}, r"widths is \[8, 0\]"),
        ({"hidden_size": 0}, "must be 1 or more"),
    ],
)
def test_an_impossible_architecture_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**values)
