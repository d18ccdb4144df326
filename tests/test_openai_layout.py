"""OpenAI's layout: the architecture from the shapes, and the arithmetic of the original code."""

import pytest
import torch
from transformers import CLIPModel

from ballad_hf import CLIPResNetModel
from ballad_hf.conversion.openai_layout import infer_config, model_from_state, strip_data_parallel

from .reference import KINDS, TEXT_HEADS, assert_is_the_original, openai_state


pytestmark = pytest.mark.numeric


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
