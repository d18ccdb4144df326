"""Checkpoints of OpenAI and open_clip: their configs, their weights, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPModel

from ballad_hf import BalladForImageClassification, CLIPResNetConfig, CLIPResNetModel
from ballad_hf.conversion.dual_encoders import load_dual_encoder, load_image_processor
from ballad_hf.conversion.layouts import (
    config_from_open_clip,
    image_processor_values,
    infer_config,
    model_from_state,
    strip_data_parallel,
)

from .reference import KINDS, TEXT_HEADS, assert_is_the_original, openai_state


pytestmark = pytest.mark.numeric

NUMBERS = ("input_resolution", "context_length", "vocab_size")
TEXT = {"context_length": 77, "vocab_size": 300, "width": 64, "heads": 2, "layers": 2}
MODEL_CFG = {
    "vit": {
        "embed_dim": 48,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8},
        "text_cfg": TEXT,
    },
    "resnet": {
        "embed_dim": 64,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 64, "layers": [1, 2, 1, 1], "width": 8, "patch_size": None},
        "text_cfg": TEXT,
    },
}


def write_open_clip_folder(folder: Path, kind: str, preprocess_cfg=None, newer: bool = False, **model_cfg) -> Path:
    """A folder as open_clip pushes it; in its newer class the text tower's names begin with `text.`."""
    folder.mkdir(parents=True)
    state = {name: value for name, value in openai_state(kind).items() if name not in NUMBERS}
    if newer:
        outside = ("visual.", "logit_scale")
        state = {name if name.startswith(outside) else f"text.{name}": value for name, value in state.items()}
    save_file({name: value.contiguous() for name, value in state.items()}, folder / "open_clip_model.safetensors")
    config = {"model_cfg": {**MODEL_CFG[kind], **model_cfg}, "preprocess_cfg": preprocess_cfg or {}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("newer", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_from_clip_reads_the_folder_with_the_original_arithmetic(kind, newer, tmp_path):
    folder = write_open_clip_folder(tmp_path / "model", kind, newer=newer)
    model = BalladForImageClassification.from_clip(folder)
    assert type(model.clip) is {"vit": CLIPModel, "resnet": CLIPResNetModel}[kind]
    assert_is_the_original(model.clip, kind)


def test_weights_of_torch_save_are_read_where_there_are_no_others(tmp_path):
    folder = write_open_clip_folder(tmp_path / "model", "vit")
    (folder / "open_clip_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"none of open_clip_model\.safetensors, open_clip_pytorch_model\.bin"):
        load_dual_encoder(folder)
    torch.save(openai_state("vit"), folder / "open_clip_pytorch_model.bin")
    assert_is_the_original(load_dual_encoder(folder), "vit")


def test_a_config_json_of_timm_beside_it_does_not_mislead(tmp_path):
    folder = write_open_clip_folder(tmp_path / "model", "vit")
    (folder / "config.json").write_text('{"architecture": "vit_tiny", "num_classes": 0}')
    assert_is_the_original(load_dual_encoder(folder), "vit")


def test_the_config_by_hand():
    config = config_from_open_clip(MODEL_CFG["resnet"] | {"quick_gelu": False})
    vision, text = config.vision_config, config.text_config
    assert (list(vision.depths), vision.width, vision.image_size, vision.num_attention_heads) == (
        [1, 2, 1, 1],
        8,
        64,
        4,
    )
    assert (text.hidden_size, text.num_attention_heads, text.intermediate_size) == (64, 2, 256)
    assert (text.hidden_act, text.eos_token_id, text.bos_token_id) == ("gelu", 299, 298)
    vit = config_from_open_clip(
        {
            "embed_dim": 512,
            "vision_cfg": {
                "image_size": [240, 240],
                "layers": 6,
                "width": 896,
                "patch_size": 16,
                "head_width": 56,
                "mlp_ratio": 2.5,
                "norm_kwargs": {"eps": 1e-6},
            },
            "text_cfg": {**TEXT, "norm_kwargs": {"eps": 1e-3}, "eos_id": 2, "pool_type": "argmax"},
        }
    )
    vision = vit.vision_config
    assert (vision.image_size, vision.hidden_size, vision.num_attention_heads) == (240, 896, 16)
    assert (vision.intermediate_size, vision.layer_norm_eps, vision.hidden_act) == (2240, 1e-6, "gelu")
    assert vit.text_config.layer_norm_eps == 1e-3
    assert vit.projection_dim == 512


def test_published_configs_give_the_published_towers():
    text = {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12}
    vision = {"image_size": 224, "layers": [3, 4, 6, 3], "width": 64, "patch_size": None}
    rn50 = config_from_open_clip({"quick_gelu": True, "embed_dim": 1024, "vision_cfg": vision, "text_cfg": text})
    preset = CLIPResNetConfig.from_preset("RN50")
    assert rn50.vision_config.to_dict() == preset.vision_config.to_dict()
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers"):
        assert getattr(rn50.text_config, name) == getattr(preset.text_config, name)
    # ViT-bigG-14, whose ratio is written with four digits
    vision = {"image_size": 224, "layers": 48, "width": 1664, "head_width": 104, "mlp_ratio": 4.9231, "patch_size": 14}
    text = {"context_length": 77, "vocab_size": 49408, "width": 1280, "heads": 20, "layers": 32}
    big = config_from_open_clip({"embed_dim": 1280, "vision_cfg": vision, "text_cfg": text}).vision_config
    assert (big.intermediate_size, big.num_attention_heads, big.hidden_act) == (8192, 16, "gelu")


@pytest.mark.parametrize(
    ("section", "options", "named"),
    [
        ("vision_cfg", {"timm_model_name": "convnext_base"}, r"vision_cfg\.timm_model_name='convnext_base'"),
        ("vision_cfg", {"ls_init_value": 1e-5}, r"vision_cfg\.ls_init_value"),
        ("vision_cfg", {"pool_type": "avg"}, r"vision_cfg\.pool_type='avg'"),
        ("vision_cfg", {"attentional_pool": True}, r"vision_cfg\.attentional_pool"),
        ("vision_cfg", {"norm_kwargs": {"elementwise_affine": False}}, r"vision_cfg\.norm_kwargs\.elementwise_affine"),
        ("text_cfg", {"hf_model_name": "roberta-base"}, r"text_cfg\.hf_model_name='roberta-base'"),
        (
            "text_cfg",
            {"no_causal_mask": True, "pool_type": "last"},
            r"no_causal_mask=True, text_cfg\.pool_type='last'",
        ),
        ("text_cfg", {"proj_type": "none"}, r"text_cfg\.proj_type='none'"),
        (None, {"multimodal_cfg": {"width": 64}}, "multimodal_cfg"),
        (None, {"init_logit_bias": -10}, "init_logit_bias=-10"),
    ],
)
def test_what_transformers_clip_does_not_have_is_refused_by_name(section, options, named):
    model_cfg = json.loads(json.dumps(MODEL_CFG["vit"]))
    (model_cfg[section] if section else model_cfg).update(options)
    with pytest.raises(ValueError, match=named):
        config_from_open_clip(model_cfg)


def test_options_that_are_off_are_no_options():
    model_cfg = json.loads(json.dumps(MODEL_CFG["vit"]))
    model_cfg["vision_cfg"] |= {"ls_init_value": None, "attentional_pool": False, "pool_type": "tok"}
    model_cfg["text_cfg"] |= {"no_causal_mask": False, "hf_tokenizer_name": "some/name"}
    assert config_from_open_clip(model_cfg).projection_dim == 48


def test_a_config_without_its_parts_or_square_sizes_is_refused():
    with pytest.raises(ValueError, match="must have vision_cfg, text_cfg and embed_dim"):
        config_from_open_clip({"embed_dim": 48})
    wide = json.loads(json.dumps(MODEL_CFG["vit"]))
    wide["vision_cfg"]["image_size"] = [224, 320]
    with pytest.raises(ValueError, match=r"\[224, 320\].*not square"):
        config_from_open_clip(wide)


def test_a_config_that_does_not_fit_the_weights_names_them(tmp_path):
    folder = write_open_clip_folder(tmp_path / "model", "vit", text_cfg={**TEXT, "layers": 3})
    with pytest.raises(ValueError, match=r"12 missing: transformer\.resblocks\.2\.attn\.in_proj_bias"):
        load_dual_encoder(folder)


def test_the_configs_json_is_read_with_care(tmp_path):
    folder = write_open_clip_folder(tmp_path / "model", "vit")
    (folder / "open_clip_config.json").write_text('{"model_cfg": ')
    with pytest.raises(ValueError, match=r"open_clip_config\.json is not valid JSON"):
        load_dual_encoder(folder)
    (folder / "open_clip_config.json").write_text("[1]")
    with pytest.raises(ValueError, match="must hold a mapping, not list"):
        load_dual_encoder(folder)


def test_the_preparation_of_images(tmp_path):
    preprocess = {
        "mean": [0.5, 0.4, 0.3],
        "std": [0.2, 0.2, 0.1],
        "interpolation": "bilinear",
        "resize_mode": "squash",
    }
    folder = write_open_clip_folder(tmp_path / "model", "vit", preprocess_cfg=preprocess)
    config = load_dual_encoder(folder).config
    processor = load_image_processor(folder, config)
    assert list(processor.image_mean) == [0.5, 0.4, 0.3]
    assert list(processor.image_std) == [0.2, 0.2, 0.1]
    assert (int(processor.resample), processor.do_center_crop) == (2, False)
    assert (processor.size["height"], processor.size["width"]) == (32, 32)
    with pytest.raises(ValueError, match="resize_mode 'longest'"):
        image_processor_values({"resize_mode": "longest"})
    with pytest.raises(ValueError, match="'lanczos'"):
        image_processor_values({"interpolation": "lanczos"})


def test_the_dtype_can_be_told_and_other_arguments_are_refused(tmp_path):
    folder = write_open_clip_folder(tmp_path / "model", "vit")
    assert load_dual_encoder(folder, dtype="bfloat16").dtype == torch.bfloat16
    with pytest.raises(ValueError, match="does not take attn_implementation"):
        load_dual_encoder(folder, attn_implementation="eager")
    with pytest.raises(ValueError, match="dtype is 'int8'"):
        load_dual_encoder(folder, dtype="int8")


def build(state, source="weights.pt", **kwargs):
    return model_from_state(state, infer_config(state, TEXT_HEADS), source, **kwargs)


@pytest.mark.parametrize("kind", KINDS)
def test_features_and_logits_are_those_of_the_original_code(kind):
    model = build(openai_state(kind))
    assert type(model) is {"vit": CLIPModel, "resnet": CLIPResNetModel}[kind]
    assert not model.training
    assert_is_the_original(model, kind)


def test_the_shapes_of_the_vit_give_its_config():
    config = infer_config(openai_state("vit"), TEXT_HEADS)
    vision, text = config.vision_config, config.text_config
    # conv1 is (64, 3, 8, 8); 17 positions are 1 + 4 x 4 cells of 8 pixels; c_fc is 256 wide; 64 wide is 1 head
    assert (vision.hidden_size, vision.patch_size, vision.image_size) == (64, 8, 32)
    assert (vision.num_hidden_layers, vision.num_attention_heads, vision.intermediate_size) == (2, 1, 256)
    assert (text.vocab_size, text.max_position_embeddings, text.hidden_size) == (300, 77, 64)
    assert (text.num_hidden_layers, text.num_attention_heads, text.intermediate_size) == (2, 2, 256)
    assert (text.bos_token_id, text.eos_token_id) == (298, 299)
    assert config.projection_dim == vision.projection_dim == text.projection_dim == 48
    assert vision.hidden_act == text.hidden_act == "quick_gelu"


def test_the_shapes_of_the_resnet_give_its_config():
    vision = infer_config(openai_state("resnet")).vision_config
    # the stem's first convolution has half the width, 4; 5 positions are 1 + 2 x 2 cells of 32 pixels
    assert (vision.depths, vision.width, vision.image_size) == ([1, 2, 1, 1], 8, 64)
    assert (vision.hidden_size, vision.num_attention_heads) == (256, 4)


def test_text_heads_are_64_wide_unless_told():
    state = openai_state("vit")
    assert infer_config(state).text_config.num_attention_heads == 1
    assert infer_config(state, text_attention_heads=4).text_config.num_attention_heads == 4
    with pytest.raises(ValueError, match="3 attention heads don't divide the width 64 of the text tower"):
        infer_config(state, text_attention_heads=3)
    with pytest.raises(ValueError, match="0 attention heads"):
        infer_config(state, text_attention_heads=0)


def test_a_hidden_width_that_is_not_four_times_the_width_is_seen():
    state = openai_state("vit")
    for block in range(2):
        prefix = f"visual.transformer.resblocks.{block}.mlp"
        state[f"{prefix}.c_fc.weight"] = torch.zeros(96, 64)
        state[f"{prefix}.c_fc.bias"] = torch.zeros(96)
        state[f"{prefix}.c_proj.weight"] = torch.zeros(64, 96)
    assert build(state).config.vision_config.intermediate_size == 96


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_weights_become_float32_of_the_same_values(kind):
    state = {name: value.half() if value.is_floating_point() else value for name, value in openai_state(kind).items()}
    model = build(state)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    expected = state["text_projection"].float().T
    assert torch.equal(model.text_projection.weight, expected)
    assert build(state, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_query_key_and_value_have_storages_of_their_own():
    state = openai_state("vit")
    model = build(state)
    attention = model.text_model.encoder.layers[0].self_attn
    stacked = state["transformer.resblocks.0.attn.in_proj_weight"]
    for third, projection in enumerate((attention.q_proj, attention.k_proj, attention.v_proj)):
        assert torch.equal(projection.weight, stacked[64 * third : 64 * third + 64])
        assert projection.weight.untyped_storage().nbytes() == 64 * 64 * 4
        assert projection.weight.untyped_storage().data_ptr() != stacked.untyped_storage().data_ptr()


def test_batch_counts_may_be_missing_but_running_statistics_may_not():
    state = openai_state("resnet")
    lean = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    assert_is_the_original(build(lean), "resnet")
    del lean["visual.layer2.1.bn3.running_var"]
    with pytest.raises(ValueError, match=r"1 missing: visual\.layer2\.1\.bn3\.running_var\."):
        build(lean)


def test_all_that_is_wrong_comes_in_one_message():
    state = openai_state("vit")
    del state["ln_final.bias"]
    del state["visual.transformer.resblocks.1.ln_2.weight"]
    state["visual.head.weight"] = torch.zeros(2, 2)
    state["visual.ln_post.weight"] = torch.zeros(65)
    with pytest.raises(ValueError, match="tower.pt") as caught:
        build(state, "tower.pt")
    message = str(caught.value)
    assert "2 missing: ln_final.bias, visual.transformer.resblocks.1.ln_2.weight" in message
    assert "1 unexpected: visual.head.weight" in message
    assert "1 of another shape: visual.ln_post.weight (65,) for (64,)" in message


def test_a_gap_between_the_layers_is_missing_names_not_a_shorter_tower():
    state = openai_state("vit")
    for name in [name for name in state if name.startswith("transformer.resblocks.0.")]:
        del state[name]
    with pytest.raises(ValueError, match=r"missing: transformer\.resblocks\.0\.attn\.in_proj_bias.*unexpected"):
        build(state)


def test_a_layer_number_of_any_size_makes_no_such_tower():
    state = openai_state("vit")
    state["transformer.resblocks.999999999.ln_1.weight"] = torch.zeros(64)
    with pytest.raises(ValueError, match=r"resblocks\.999999999\.ln_1\.weight"):
        build(state)


def test_weights_of_something_else_say_what_is_missing():
    with pytest.raises(ValueError, match=r"text_projection.*visual\.conv1\.weight.*first names there are fc\.weight"):
        infer_config({"fc.weight": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match="first names there are none"):
        infer_config({})


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_of_the_wrong_rank_are_named(kind):
    state = openai_state(kind)
    state["text_projection"] = torch.zeros(64)
    with pytest.raises(ValueError, match="number of dimensions of text_projection"):
        infer_config(state)
    state = openai_state(kind)
    state["visual.conv1.weight"] = torch.zeros(64, 3)
    with pytest.raises(ValueError, match=r"number of dimensions of visual\.conv1\.weight"):
        infer_config(state)


def test_positions_that_are_no_square_are_named():
    state = openai_state("vit")
    state["visual.positional_embedding"] = torch.zeros(12, 64)
    with pytest.raises(ValueError, match="11 cells, which is no square"):
        infer_config(state)


def test_only_a_leading_module_is_stripped():
    state = {"module.ln.weight": torch.zeros(1), "a.module.b": torch.zeros(1)}
    assert strip_data_parallel(state).keys() == {"ln.weight", "a.module.b"}
