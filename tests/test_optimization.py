"""Which weights are trained, at what rate, with what decay, and how the rate moves."""

import math

import pytest
import torch

from ballad_hf.conversion.tiny_clip import build_tiny_clip
from ballad_hf.models.configuration_clip_resnet import CLIPResNetConfig
from ballad_hf.models.modeling_clip_resnet import CLIPResNetModel
from ballad_hf.training.arguments import PhaseAArguments
from ballad_hf.training.optimization import (
    build_optimizer,
    freeze_the_rest,
    parameter_groups,
    schedule_factor,
    set_learning_rates,
    tower_of,
)


pytestmark = pytest.mark.numeric


@pytest.fixture
def clip():
    return build_tiny_clip(width=32, layers=3, projection_dim=16, patch_size=16).clip


def settings_of(clip, arguments, train="both", train_logit_scale=True):
    """Name of each trained parameter -> (rate, decay)."""
    freeze_the_rest(clip, train, train_logit_scale)
    by_id = {id(parameter): name for name, parameter in clip.named_parameters()}
    return {
        by_id[id(parameter)]: (group["lr"], group["weight_decay"])
        for group in parameter_groups(clip, arguments)
        for parameter in group["params"]
    }


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        ("image", {"image"}),
        ("text", {"text"}),
        ("both", {"image", "text"}),
        ("projections", {"image", "text"}),
    ],
)
def test_exactly_the_named_towers_take_gradients(clip, train, expected):
    freeze_the_rest(clip, train, train_logit_scale=False)
    trained = [name for name, parameter in clip.named_parameters() if parameter.requires_grad]
    assert {tower_of(name) for name in trained} == expected
    if train == "projections":
        assert trained == ["visual_projection.weight", "text_projection.weight"]
    else:
        towers = [name for name, _ in clip.named_parameters() if tower_of(name) in expected]
        assert trained == towers


def test_norms_biases_and_the_scale_are_not_decayed_unless_asked(clip):
    arguments = PhaseAArguments(weight_decay=0.1, learning_rate=1e-3)
    settings = settings_of(clip, arguments)
    assert settings["vision_model.encoder.layers.0.mlp.fc1.weight"] == (1e-3, 0.1)
    for name in (
        "vision_model.encoder.layers.0.mlp.fc1.bias",
        "vision_model.encoder.layers.0.layer_norm1.weight",
        "vision_model.embeddings.class_embedding",
        "logit_scale",
    ):
        assert settings[name] == (1e-3, 0.0), name
    everything = settings_of(clip, PhaseAArguments(weight_decay=0.1, decay_all=True))
    assert {decay for _, decay in everything.values()} == {0.1}
    assert settings.keys() == {name for name, _ in clip.named_parameters()}


def test_rates_of_towers_and_heads_and_of_layers(clip):
    arguments = PhaseAArguments(
        learning_rate=1e-3, text_learning_rate=1e-4, head_learning_rate=1e-2, layer_decay=0.5, weight_decay=0
    )
    rates = {name: rate for name, (rate, _) in settings_of(clip, arguments).items()}
    # Three layers: the last is one below the top norm, the first three below it, the embeddings four.
    assert rates["vision_model.post_layernorm.weight"] == pytest.approx(1e-3)
    assert rates["vision_model.encoder.layers.2.mlp.fc1.weight"] == pytest.approx(1e-3 * 0.5)
    assert rates["vision_model.encoder.layers.0.mlp.fc1.weight"] == pytest.approx(1e-3 * 0.5**3)
    assert rates["vision_model.embeddings.patch_embedding.weight"] == pytest.approx(1e-3 * 0.5**4)
    assert rates["text_model.encoder.layers.2.mlp.fc1.weight"] == pytest.approx(1e-4 * 0.5)
    assert rates["text_model.embeddings.token_embedding.weight"] == pytest.approx(1e-4 * 0.5**4)
    assert rates["visual_projection.weight"] == rates["text_projection.weight"] == rates["logit_scale"] == 1e-2


def test_layers_of_a_modified_resnet_decay_from_the_pool_down():
    config = CLIPResNetConfig.from_preset("RN50")
    with torch.device("meta"):
        clip = CLIPResNetModel(config)
    arguments = PhaseAArguments(learning_rate=1.0, layer_decay=0.5, weight_decay=0)
    rates = {name: rate for name, (rate, _) in settings_of(clip, arguments).items() if tower_of(name) == "image"}
    assert set(rates.values()) == {1.0, 0.5, 0.25, 0.125, 0.0625, 0.03125}  # pool, four stages, stem


@pytest.mark.parametrize(("name", "kind"), [("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)])
def test_the_optimizer_is_the_one_named(clip, name, kind):
    freeze_the_rest(clip, "both", train_logit_scale=True)
    optimizer = build_optimizer(clip, PhaseAArguments(optimizer=name, momentum=0.8, adam_beta2=0.95))
    assert type(optimizer) is kind
    group = optimizer.param_groups[0]
    assert (group["momentum"] == 0.8) if name == "sgd" else (group["betas"] == (0.9, 0.95))
    set_learning_rates(optimizer, 0.5)
    assert all(group["lr"] == 0.5 * group["initial_lr"] for group in optimizer.param_groups)


def test_schedules_by_hand():
    cosine = [schedule_factor(step, 4) for step in range(4)]
    assert cosine == pytest.approx([1.0, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2])
    assert [schedule_factor(step, 4, schedule="constant") for step in range(4)] == [1.0] * 4
    assert [schedule_factor(step, 5, warmup_steps=4, schedule="constant") for step in range(5)] == [
        0.25,
        0.5,
        0.75,
        1,
        1,
    ]
    # The official code: two epochs of two steps; 1/2 in the first, 0 in the last.
    official = [schedule_factor(step, 4, schedule="official", steps_per_epoch=2) for step in range(4)]
    assert official == pytest.approx([0.5, 0.5, 0.0, 0.0])


def test_nothing_to_train_is_an_error(clip):
    del clip.visual_projection, clip.text_projection
    with pytest.raises(ValueError, match="has no weights of the kind train='projections'"):
        freeze_the_rest(clip, "projections", train_logit_scale=True)
