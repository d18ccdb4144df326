"""CLIP's modified ResNet behind CLIPModel's interface."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForZeroShotImageClassification,
    AutoTokenizer,
    CLIPModel,
    pipeline,
)

from ballad_hf import BalladForImageClassification, CLIPResNetConfig, CLIPResNetModel
from ballad_hf.conversion.dual_encoders import clip_image_processor, load_openai_clip
from ballad_hf.models.modeling_clip_resnet import (
    CLIPResNetAttentionPool,
    CLIPResNetBottleneck,
    CLIPResNetVisionModel,
)

from .conftest import CLASS_NAMES
from .reference import TEXT_HEADS, assert_is_the_original, expected, openai_file


pytestmark = pytest.mark.numeric


@pytest.fixture
def resnet() -> CLIPResNetModel:
    return load_openai_clip(openai_file("resnet"), text_attention_heads=TEXT_HEADS)


@pytest.fixture
def pixels() -> torch.Tensor:
    return expected("resnet")["pixel_values"]


def tiny_config(tokenizer=None, **vision) -> CLIPResNetConfig:
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    if tokenizer is not None:
        text |= {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    vision = {"depths": (1, 1, 1, 1), "width": 4, "image_size": 32, **vision}
    return CLIPResNetConfig(text_config=text, vision_config=vision, projection_dim=16)


def built(config: CLIPResNetConfig, seed: int = 0) -> CLIPResNetModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CLIPResNetModel(config).eval()


def test_the_attention_pool_is_torchs_own_multi_head_attention(resnet):
    """As the original calls it: one query, the mean's, on all tokens, with separate projections."""
    pool = resnet.vision_model.attention_pool
    feature_map = torch.randn(2, 256, 2, 2, generator=torch.Generator().manual_seed(0))
    tokens = feature_map.flatten(2).permute(2, 0, 1)  # (cells, batch, channels)
    tokens = torch.cat([tokens.mean(dim=0, keepdim=True), tokens]) + pool.position_embedding.weight[:, None]
    attended, _ = F.multi_head_attention_forward(
        tokens[:1],
        tokens,
        tokens,
        embed_dim_to_check=256,
        num_heads=4,
        in_proj_weight=None,
        in_proj_bias=torch.cat([pool.q_proj.bias, pool.k_proj.bias, pool.v_proj.bias]),
        q_proj_weight=pool.q_proj.weight,
        k_proj_weight=pool.k_proj.weight,
        v_proj_weight=pool.v_proj.weight,
        use_separate_proj_weight=True,
        bias_k=None,
        bias_v=None,
        add_zero_attn=False,
        dropout_p=0.0,
        out_proj_weight=torch.eye(256),
        out_proj_bias=torch.zeros(256),
    )
    torch.testing.assert_close(pool(feature_map), attended[0], rtol=1e-5, atol=1e-5)


def test_a_strided_block_pools_before_its_convolutions_by_hand():
    """With identity convolutions and norms a block is relu(pool(x) + pool(x)); a strided convolution would not be."""
    block = CLIPResNetBottleneck(in_channels=4, channels=1, stride=2).eval()
    with torch.no_grad():
        block.conv1.weight.fill_(1.0)  # sums the four channels
        block.conv2.weight.zero_()[:, :, 1, 1] = 1.0
        block.conv3.weight.fill_(1.0)
        block.shortcut_conv.weight.copy_(torch.eye(4).reshape(4, 4, 1, 1))
    image = torch.zeros(1, 4, 2, 2)
    image[0, 0] = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
    # the mean of 1, 2, 3 and 6 is 3, in every channel of the main path and in channel 0 of the shortcut
    expected = torch.tensor([6.0, 3.0, 3.0, 3.0]).reshape(1, 4, 1, 1)
    torch.testing.assert_close(block(image), expected, rtol=1e-4, atol=1e-4)


def test_only_the_stem_and_the_last_three_stages_halve_the_map(resnet, pixels):
    output = resnet.vision_model(pixels, output_hidden_states=True)
    shapes = [tuple(hidden.shape[1:]) for hidden in output.hidden_states]
    assert shapes == [(8, 16, 16), (32, 16, 16), (64, 8, 8), (128, 4, 4), (256, 2, 2)]
    assert output.last_hidden_state is output.hidden_states[-1]
    assert resnet.vision_model(pixels, return_dict=False)[1].shape == (3, 256)


def test_maps_have_their_channels_last_and_stay_what_they_were(resnet, pixels):
    """Activations are written in place, so a map that is handed out must not be one of those."""
    seen: list[bool] = []
    resnet.vision_model.stem.register_forward_pre_hook(
        lambda stem, given: seen.append(given[0].is_contiguous(memory_format=torch.channels_last))
    )
    maps = resnet.vision_model(pixel_values=pixels, output_hidden_states=True).hidden_states
    assert seen == [True]
    hidden = maps[0]
    for stage, expected_map in zip(resnet.vision_model.stages, maps[1:], strict=True):
        hidden = stage(hidden)
        torch.testing.assert_close(hidden, expected_map)


def test_it_has_the_interface_of_clip_model(resnet):
    assert isinstance(resnet, CLIPModel)
    original = expected("resnet")
    output = resnet(input_ids=original["input_ids"][:3], pixel_values=original["pixel_values"], return_loss=True)
    torch.testing.assert_close(output.logits_per_text, output.logits_per_image.T)
    torch.testing.assert_close(output.logits_per_image, original["logits_per_image"][:, :3], rtol=1e-5, atol=1e-5)
    own = torch.arange(3)  # each image belongs to the text of its row
    both = F.cross_entropy(output.logits_per_image, own) + F.cross_entropy(output.logits_per_text, own)
    torch.testing.assert_close(output.loss, both / 2)
    assert output.image_embeds.norm(dim=-1).sub(1).abs().max() < 1e-5


@pytest.mark.parametrize("auto_class", [CLIPResNetModel, AutoModel, AutoModelForZeroShotImageClassification])
def test_save_and_load_are_exact(resnet, tmp_path, auto_class):
    resnet.save_pretrained(tmp_path)
    again = auto_class.from_pretrained(tmp_path)
    assert type(again) is CLIPResNetModel
    assert not again.training
    state = resnet.state_dict()
    assert again.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())
    assert_is_the_original(again, "resnet")


def test_the_image_tower_alone_loads_from_the_whole_model_and_by_auto_model(resnet, tmp_path, pixels):
    resnet.vision_model.save_pretrained(tmp_path)
    tower = AutoModel.from_pretrained(tmp_path)
    assert type(tower) is CLIPResNetVisionModel
    assert torch.equal(tower(pixels).pooler_output, resnet.vision_model(pixels).pooler_output)


def test_the_stock_zero_shot_pipeline_takes_the_folder(tiny_clip, tmp_path):
    model = built(tiny_config(tiny_clip.tokenizer))
    for part in (model, tiny_clip.tokenizer, clip_image_processor(32)):
        part.save_pretrained(tmp_path)
    images = tiny_image()
    rows = pipeline("zero-shot-image-classification", model=str(tmp_path))(
        images, candidate_labels=["cat", "dog"], hypothesis_template="a photo of a {}."
    )
    tokens = AutoTokenizer.from_pretrained(tmp_path)(
        ["a photo of a cat.", "a photo of a dog."], padding=True, return_tensors="pt"
    )
    pixel_values = clip_image_processor(32)(images, return_tensors="pt").pixel_values
    probabilities = model(**tokens, pixel_values=pixel_values).logits_per_image[0].softmax(-1)
    scores = {row["label"]: row["score"] for row in rows}
    assert scores == pytest.approx(dict(zip(("cat", "dog"), probabilities.tolist(), strict=True)), abs=1e-5)


def test_it_is_a_backbone_of_ballad(tiny_clip, tmp_path):
    clip = built(tiny_config(tiny_clip.tokenizer))
    model = BalladForImageClassification.from_dual_encoder(clip, CLASS_NAMES, tiny_clip.tokenizer)
    pixel_values = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(tmp_path)
    again = BalladForImageClassification.from_pretrained(tmp_path)
    assert type(again.clip) is CLIPResNetModel
    torch.testing.assert_close(again(pixel_values).logits, model(pixel_values).logits, rtol=1e-5, atol=1e-5)
    model.train()
    model(pixel_values, labels=torch.tensor([0, 1])).loss.backward()
    assert model.clip.vision_model.stem.conv1.weight.grad.abs().sum() > 0


def statistics(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.named_buffers() if "running" in name or "tracked" in name}


def test_batch_norm_statistics_stay_frozen_in_training_by_default(resnet, pixels):
    before = statistics(resnet)
    resnet.eval()
    evaluated = resnet.get_image_features(pixel_values=pixels).pooler_output
    resnet.train()
    trained = resnet.get_image_features(pixel_values=pixels).pooler_output
    torch.testing.assert_close(trained, evaluated)
    assert all(torch.equal(value, before[name]) for name, value in statistics(resnet).items())
    trained.sum().backward()
    assert resnet.vision_model.stem.bn1.weight.grad.abs().sum() > 0, "weights and biases train all the same"


def test_batch_norm_statistics_move_where_asked(resnet, pixels):
    resnet.config.vision_config.freeze_batch_norm = False
    resnet.train()
    before = statistics(resnet)
    resnet.get_image_features(pixel_values=pixels)
    after = statistics(resnet)
    assert all(not torch.equal(after[name], before[name]) for name in before)
    # torch's momentum of 0.1: running = 0.9 * running + 0.1 * the batch's mean
    batch = resnet.vision_model.stem.conv1(pixels).mean(dim=(0, 2, 3))
    name = "vision_model.stem.bn1.running_mean"
    torch.testing.assert_close(after[name], 0.9 * before[name] + 0.1 * batch.detach())
    resnet.eval()
    assert not any(module.training for module in resnet.modules())


def test_the_choice_about_batch_norm_is_kept_with_the_model(resnet, tmp_path):
    resnet.config.vision_config.freeze_batch_norm = False
    resnet.save_pretrained(tmp_path)
    model = BalladForImageClassification.from_clip(tmp_path).train()
    norms = [module for module in model.clip.vision_model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    assert all(norm.training for norm in norms)


def test_fresh_weights_follow_their_rules():
    model = built(tiny_config(width=8))
    blocks = [module for module in model.modules() if isinstance(module, CLIPResNetBottleneck)]
    assert len(blocks) == 4
    for block in blocks:
        assert block.bn3.weight.abs().max() == 0, "a block starts as its shortcut"
        bound = (1 / block.conv1.in_channels) ** 0.5  # uniform within 1 / sqrt(fan in)
        assert 0.5 * bound < block.conv1.weight.abs().max() <= bound
    pool = next(module for module in model.modules() if isinstance(module, CLIPResNetAttentionPool))
    assert pool.q_proj.weight.std().item() == pytest.approx(256**-0.5, rel=0.05)
    assert pool.q_proj.bias.abs().max() == 0
    assert model.visual_projection.bias.abs().max() == 0
    assert model.logit_scale.item() == pytest.approx(2.6592)
    other = built(tiny_config(width=8))
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())


def test_another_image_size_is_an_error_unless_asked_for(resnet):
    image = torch.zeros(1, 3, 96, 128)
    with pytest.raises(ValueError, match="96 x 128 pixels, but this model takes 64 x 64"):
        resnet.get_image_features(pixel_values=image)
    features = resnet.get_image_features(pixel_values=image, interpolate_pos_encoding=True).pooler_output
    assert features.shape == (1, 64)
    assert features.isfinite().all()


def test_interpolated_positions_of_the_trained_size_are_the_positions(resnet, pixels):
    plain = resnet.get_image_features(pixel_values=pixels).pooler_output
    asked = resnet.get_image_features(pixel_values=pixels, interpolate_pos_encoding=True).pooler_output
    assert torch.equal(plain, asked)


def test_activation_checkpointing_changes_no_gradient(resnet, pixels):
    def gradient():
        resnet.zero_grad()
        resnet.get_image_features(pixel_values=pixels).pooler_output.square().sum().backward()
        return resnet.vision_model.stem.conv1.weight.grad.clone()

    resnet.train()
    plain = gradient()
    resnet.gradient_checkpointing_enable()
    assert any(getattr(module, "gradient_checkpointing", False) for module in resnet.vision_model.modules())
    torch.testing.assert_close(gradient(), plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs_and_is_near(resnet, pixels, dtype):
    exact = resnet.get_image_features(pixel_values=pixels).pooler_output
    output = resnet.to(dtype).get_image_features(pixel_values=pixels).pooler_output
    assert output.dtype == dtype
    assert F.cosine_similarity(output.float(), exact).min() > 0.99


def tiny_image():
    import numpy as np
    from PIL import Image

    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8))
