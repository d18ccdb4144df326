"""from_clip takes every dual encoder that it says it takes, and says so of those that it can't."""

import copy
import gzip
import shutil

import huggingface_hub
import pytest
import torch
from PIL import Image
from transformers import (
    AlignConfig,
    AlignModel,
    AltCLIPConfig,
    AltCLIPModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    ChineseCLIPConfig,
    ChineseCLIPModel,
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
    MetaClip2Config,
    MetaClip2Model,
    Siglip2Config,
    Siglip2Model,
    SiglipConfig,
    SiglipModel,
    pipeline,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ballad_hf import BalladForImageClassification
from ballad_hf.conversion import dual_encoders
from ballad_hf.conversion.dual_encoders import (
    check_interface,
    check_model_source,
    clip_image_processor,
    is_local_path,
    load_dual_encoder,
    load_image_processor,
    load_processor,
    load_tokenizer,
    processor_of,
)

from .conftest import CLASS_NAMES
from .reference import KINDS, TEXT_HEADS, assert_is_the_original, openai_file
from .test_join_towers import tiny_joined
from .test_modeling_clip_resnet import built, tiny_config, tiny_image


pytestmark = pytest.mark.numeric

TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION = {**TOWER, "image_size": 32, "patch_size": 16}
FAMILIES = ("clip", "clip_resnet", "siglip", "siglip2", "metaclip_2", "altclip", "chinese_clip", "joined_towers")
WITH_PROJECTION = ("clip", "clip_resnet", "metaclip_2", "altclip", "chinese_clip", "joined_towers")


def tiny_model(family: str, tokenizer):
    """A random model of a family, in which no bias or scale has its default."""
    text = {**TOWER, "vocab_size": len(tokenizer), "max_position_embeddings": 77}
    ends = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if family == "clip":
            model = CLIPModel(CLIPConfig(text_config={**text, **ends}, vision_config=VISION, projection_dim=16))
        elif family == "clip_resnet":
            model = built(tiny_config(tokenizer))
        elif family == "siglip":
            model = SiglipModel(SiglipConfig(text_config={**text, **ends}, vision_config=VISION))
        elif family == "siglip2":
            vision = {**TOWER, "patch_size": 16, "num_patches": 16}
            model = Siglip2Model(Siglip2Config(text_config={**text, **ends}, vision_config=vision))
        elif family == "joined_towers":
            model = tiny_joined(tokenizer)
        elif family == "metaclip_2":
            config = MetaClip2Config(text_config={**text, **ends}, vision_config=VISION, projection_dim=16)
            model = MetaClip2Model(config)
        elif family == "altclip":
            text |= {"project_dim": 24, "max_position_embeddings": 128}
            model = AltCLIPModel(AltCLIPConfig(text_config=text, vision_config=VISION, projection_dim=16))
        else:
            model = ChineseCLIPModel(ChineseCLIPConfig(text_config=text, vision_config=VISION, projection_dim=16))
        with torch.no_grad():
            model.logit_scale.fill_(1.5)
            if "siglip" in family:
                model.logit_bias.fill_(-3.0)
    return model.eval()


def tiny_images(family: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    if family != "siglip2":
        return {"pixel_values": torch.randn(3, 3, 32, 32, generator=generator)}
    return {  # patches of images of several shapes, as SigLIP 2 takes them
        "pixel_values": torch.randn(3, 16, 3 * 16 * 16, generator=generator),
        "pixel_attention_mask": (torch.arange(16) < torch.tensor([[16], [6], [8]])).int(),
        "spatial_shapes": torch.tensor([[4, 4], [2, 3], [4, 2]]),
    }


def tokenizer_for(family: str, tokenizer):
    """SigLIP's own, like the released ones, gives no mask: the padding was part of the training."""
    if "siglip" in family:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.model_input_names = ["input_ids"]
    return tokenizer


def saved(model, tokenizer, folder):
    for part in (model, tokenizer):
        part.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_of_transformers_keeps_its_own_logits(family, tiny_clip, tmp_path):
    tokenizer = tokenizer_for(family, tiny_clip.tokenizer)
    own = tiny_model(family, tokenizer)
    folder = saved(own, tokenizer, tmp_path / "model")
    model = BalladForImageClassification.from_clip(folder, CLASS_NAMES, tokenizer if "siglip" in family else None)
    assert type(model.clip) is type(own)
    pictures = tiny_images(family)
    padding = {"padding": "max_length", "max_length": 77} if "siglip" in family else {"padding": True}
    tokens = tokenizer([f"a photo of a {name}." for name in CLASS_NAMES], return_tensors="pt", **padding)
    with torch.no_grad():
        expected = own(**pictures, **tokens).logits_per_image
        stored = model(**pictures).logits
        given = model(**pictures, **tokens).logits_per_image
    assert expected.shape == (3, 5)
    assert expected.std() > 1e-3
    torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stored, expected, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path / "ballad")
    again = BalladForImageClassification.from_pretrained(tmp_path / "ballad")
    assert type(again.clip) is type(own)
    with torch.no_grad():
        torch.testing.assert_close(again(**pictures).logits, stored, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["siglip", "siglip2"])
@pytest.mark.parametrize("gives_mask", [True, False])
def test_siglip_is_right_in_the_stock_pipeline_whoever_pads(family, gives_mask, tiny_clip):
    """transformers pads to a fixed length for models of the type "siglip" alone, so the model has to."""
    own = tiny_model(family, tiny_clip.tokenizer)
    tokenizer = tokenizer_for(family, tiny_clip.tokenizer)
    labels = ["cat", "a dog and another dog", "owl"]
    tokens = tokenizer(labels, padding="max_length", max_length=77, return_tensors="pt")
    pictures = tiny_images(family)
    with torch.no_grad():
        expected = own(**pictures, **tokens).logits_per_image
    model = BalladForImageClassification.from_dual_encoder(own, CLASS_NAMES, tokenizer)
    used = tiny_clip.tokenizer if gives_mask else tokenizer
    for texts in ([0, 1, 2], [0, 2]):  # the latter are of one length, where no mask could tell the padding
        given = used([labels[index] for index in texts], padding=True, return_tensors="pt")
        assert ("attention_mask" in given) == gives_mask
        with torch.no_grad():
            logits = model(**pictures, **given).logits_per_image
        torch.testing.assert_close(logits, expected[:, texts], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["siglip", "siglip2"])
def test_siglips_scale_and_bias_are_respected(family, tiny_clip, tmp_path):
    tokenizer = tokenizer_for(family, tiny_clip.tokenizer)
    folder = saved(tiny_model(family, tokenizer), tokenizer, tmp_path)
    model = BalladForImageClassification.from_clip(folder, CLASS_NAMES, tokenizer)
    with torch.no_grad():
        output = model(**tiny_images(family))
    cosines = output.image_embeds @ output.text_embeds.T
    e = 2.718281828459045
    torch.testing.assert_close(output.logits, e**1.5 * cosines - 3.0, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", WITH_PROJECTION)
def test_every_family_with_a_projection_folds(family, tiny_clip):
    own = tiny_model(family, tiny_clip.tokenizer)
    model = BalladForImageClassification.from_dual_encoder(own, CLASS_NAMES, tiny_clip.tokenizer)
    weight = model.adapter.linear.weight
    with torch.no_grad():
        weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(2)))
        folded = model.fold_adapter()
        assert type(folded) is type(own)
        inputs = {
            **tiny_images(family),
            **tiny_clip.tokenizer(["a cat", "an owl"], padding=True, return_tensors="pt"),
        }
        torch.testing.assert_close(
            folded(**inputs).logits_per_image, model(**inputs).logits_per_image, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_serves_without_its_text_tower(family, tiny_clip, tmp_path):
    own = tiny_model(family, tiny_clip.tokenizer)
    model = BalladForImageClassification.from_dual_encoder(own, CLASS_NAMES, tiny_clip.tokenizer)
    pictures = tiny_images(family)
    with torch.no_grad():
        logits = model(**pictures).logits
        assert model.remove_text_tower() > 0
        model.save_pretrained(tmp_path)
        again = BalladForImageClassification.from_pretrained(tmp_path)
        torch.testing.assert_close(again(**pictures).logits, logits, rtol=1e-5, atol=1e-5)
    assert not [name for name in again.state_dict() if "text" in name]


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_openai_feeds_from_clip(kind):
    model = BalladForImageClassification.from_clip(openai_file(kind), text_attention_heads=TEXT_HEADS)
    assert_is_the_original(model.clip, kind)
    half = BalladForImageClassification.from_clip(openai_file(kind), dtype="bfloat16")
    assert half.dtype == half.adapter.linear.weight.dtype == torch.bfloat16


class Sequence(torch.nn.Module):
    """Nests a state dict into modules, as OpenAI's archives do."""

    def __init__(self, state: dict[str, torch.Tensor]):
        super().__init__()
        below: dict[str, dict] = {}
        for name, value in state.items():
            head, _, rest = name.partition(".")
            if rest:
                below.setdefault(head, {})[rest] = value
            elif value.is_floating_point():
                self.register_parameter(head, torch.nn.Parameter(value))
            else:
                self.register_buffer(head, value)
        for head, part in below.items():
            self.add_module(head, Sequence(part))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.parametrize("kind", KINDS)
def test_a_torchscript_archive_feeds_from_clip(kind, tmp_path):
    state = torch.load(openai_file(kind), weights_only=True)
    torch.jit.save(torch.jit.script(Sequence(state)), tmp_path / "archive.pt")
    model = BalladForImageClassification.from_clip(tmp_path / "archive.pt", text_attention_heads=TEXT_HEADS)
    assert_is_the_original(model.clip, kind)


def test_a_training_checkpoint_of_open_clip_feeds_from_clip(tmp_path):
    state = torch.load(openai_file("vit"), weights_only=True)
    wrapped = {"epoch": 3, "state_dict": {f"module.{name}": value for name, value in state.items()}}
    torch.save(wrapped, tmp_path / "epoch_3.pt")
    assert_is_the_original(load_dual_encoder(tmp_path / "epoch_3.pt", text_attention_heads=TEXT_HEADS), "vit")


def test_the_whole_way_of_a_resnet_to_the_stock_pipeline(tiny_clip, tmp_path):
    folder = saved(tiny_model("clip_resnet", tiny_clip.tokenizer), tiny_clip.tokenizer, tmp_path / "rn")
    model = BalladForImageClassification.from_clip(folder, class_names=CLASS_NAMES)
    processor = clip_image_processor(model.config.clip_config.vision_config.image_size)
    for part in (model, processor):
        part.save_pretrained(tmp_path / "ballad")
    rows = pipeline("image-classification", model=str(tmp_path / "ballad"))(tiny_image())
    with torch.no_grad():
        expected = model(processor(tiny_image(), return_tensors="pt").pixel_values).logits[0].softmax(-1)
    assert {row["label"]: row["score"] for row in rows} == pytest.approx(
        dict(zip(CLASS_NAMES, expected.tolist(), strict=True)), abs=1e-5
    )


def test_models_without_the_interface_are_refused_with_what_they_lack(tmp_path):
    text = {"vocab_size": 99, **TOWER}
    bert = BertModel(BertConfig(**text))
    bert.save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="A BertModel has no get_image_features, get_text_features, logit_scale"):
        BalladForImageClassification.from_clip(tmp_path / "bert")
    with torch.device("meta"):  # ALIGN has a temperature, by which it divides, in the place of a scale
        align = AlignModel(AlignConfig(text_config=text))
    with pytest.raises(ValueError, match="A AlignModel has no logit_scale"):
        check_interface(align)


def test_a_ballad_is_no_clip_checkpoint(tiny_ballad, tmp_path):
    tiny_ballad.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a BALLAD model already.*from_pretrained"):
        BalladForImageClassification.from_clip(tmp_path)


def test_weights_that_are_missing_from_a_checkpoint_are_named(clip_folder):
    from safetensors.torch import load_file, save_file

    state = load_file(clip_folder / "model.safetensors")
    del state["logit_scale"], state["visual_projection.weight"]
    save_file(state, clip_folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks weights of a CLIPModel.*logit_scale, visual_projection.weight"):
        BalladForImageClassification.from_clip(clip_folder)


def test_a_truncated_folder_is_a_clear_error(clip_folder):
    weights = clip_folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"model\.safetensors has 5,000 bytes on disk"):
        BalladForImageClassification.from_clip(clip_folder)


def test_what_is_not_there_says_what_was_looked_for(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"neither a config\.json of transformers nor an open_clip_config\.json"
    ):
        BalladForImageClassification.from_clip(tmp_path)
    for name in (tmp_path / "RN50.pt", tmp_path / "nowhere", "weights/RN50.pt"):
        with pytest.raises(FileNotFoundError, match="There is no file or folder"):
            BalladForImageClassification.from_clip(name)
    with pytest.raises(OSError, match="'nobody/nothing' is not on this machine.*HF_HUB_OFFLINE.*--model lite"):
        BalladForImageClassification.from_clip("nobody/nothing")


def test_a_model_without_a_home_asks_for_its_tokenizer(tiny_clip):
    with pytest.raises(ValueError, match="pass tokenizer="):
        BalladForImageClassification.from_dual_encoder(tiny_clip.clip, class_names=["cat"])


def test_the_tokenizer_must_fit_the_text_tower(tiny_clip):
    config = CLIPConfig(text_config={"vocab_size": 300})
    count = len(tiny_clip.tokenizer)
    with pytest.raises(ValueError, match=f"has {count} tokens, but the text tower only 300"):
        load_tokenizer(tiny_clip.tokenizer, config)
    with pytest.raises(OSError, match="pass tokenizer= with a tokenizer"):
        load_tokenizer(openai_file("vit"), CLIPConfig())  # OpenAI's, which is not in the cache of a machine offline


@pytest.mark.parametrize("compressed", [True, False])
def test_openais_list_of_merges_makes_its_tokenizer(tmp_path, compressed):
    merges = ["c a", "ca t</w>", "d o", "do g</w>"]
    lines = "#version: 0.2\n" + "\n".join([*merges, "x y"]) + "\n"  # the published list goes on beyond the models' use
    path = tmp_path / ("bpe_simple_vocab_16e6.txt.gz" if compressed else "merges.txt")
    path.write_bytes(gzip.compress(lines.encode()) if compressed else lines.encode())
    size = 2 * 256 + len(merges) + 2
    tokenizer = load_tokenizer(path, CLIPConfig(text_config={"vocab_size": size}))
    letters = list(bytes_to_unicode().values())
    # 256 bytes, 256 at a word's end, then the merges in order, then the two marks
    first, last = size - 2, size - 1
    assert tokenizer("cat dog")["input_ids"] == [first, 512 + 1, 512 + 3, last]
    assert tokenizer("do")["input_ids"] == [first, letters.index("d"), 256 + letters.index("o"), last]
    with pytest.raises(ValueError, match="the text tower has 49408: not its merges"):
        load_tokenizer(path, CLIPConfig())


def test_the_tokenizer_of_a_folder_is_its_own(clip_folder, tiny_clip):
    tokenizer = load_tokenizer(clip_folder, tiny_clip.clip.config)
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(clip_folder).get_vocab()


def test_the_image_processor_of_a_folder_is_its_own_and_a_files_is_openais(clip_folder, tiny_clip):
    tiny_clip.image_processor.image_mean = [0.1, 0.2, 0.3]
    tiny_clip.image_processor.save_pretrained(clip_folder)
    assert list(load_image_processor(clip_folder, tiny_clip.clip.config).image_mean) == [0.1, 0.2, 0.3]
    processor = load_image_processor(openai_file("resnet"), load_dual_encoder(openai_file("resnet")).config)
    assert processor.crop_size["height"] == 64
    assert list(processor.image_mean) == [0.48145466, 0.4578275, 0.40821073]
    assert list(processor.image_std) == [0.26862954, 0.26130258, 0.27577711]


def test_a_subfolder_is_found(clip_folder, tmp_path):
    shutil.copytree(clip_folder, tmp_path / "repository" / "towers")
    model = BalladForImageClassification.from_clip(
        tmp_path / "repository", class_names=["cat", "dog"], subfolder="towers"
    )
    assert model.config.class_names == ["cat", "dog"]


def assert_feeds(processor, model):
    inputs = processor(text=["a cat"], images=Image.new("RGB", (40, 32)), return_tensors="pt")
    with torch.no_grad():
        assert model(**inputs).logits_per_image.shape == (1, 1)


def test_from_clip_keeps_the_checkpoints_processor(clip_folder, tiny_clip):
    for names in (None, CLASS_NAMES):
        model = BalladForImageClassification.from_clip(clip_folder, names)
        assert processor_of(model) is model.processing_class
        assert model.processing_class.tokenizer.get_vocab() == tiny_clip.tokenizer.get_vocab()
        assert_feeds(processor_of(model), model)


def test_a_given_processor_is_the_models_and_encodes_its_classes(tiny_clip):
    processor = CLIPProcessor(tiny_clip.image_processor, tiny_clip.tokenizer)
    model = BalladForImageClassification.from_dual_encoder(tiny_clip.clip, CLASS_NAMES, processing_class=processor)
    assert processor_of(model) is processor
    assert model.stored_class_embeds().shape == (5, 16)


def test_the_folder_of_a_model_or_dual_encoder_has_its_processor(tiny_ballad, tiny_clip, clip_folder, tmp_path):
    processor = CLIPProcessor(tiny_clip.image_processor, tiny_clip.tokenizer)
    for part in (tiny_ballad, processor):
        part.save_pretrained(tmp_path / "saved")
    saved = BalladForImageClassification.from_pretrained(tmp_path / "saved")
    assert_feeds(processor_of(saved), saved)
    clip = type(tiny_clip.clip).from_pretrained(clip_folder)
    model = BalladForImageClassification.from_dual_encoder(clip)
    assert_feeds(processor_of(model), model)
    tokenizer = load_processor(clip_folder, clip.config, tiny_clip.tokenizer).tokenizer
    assert tokenizer is tiny_clip.tokenizer


def test_without_a_text_tower_there_is_an_image_processor_alone(tiny_ballad, tiny_clip, tmp_path):
    tiny_ballad.remove_text_tower()
    for part in (tiny_ballad, tiny_clip.image_processor):
        part.save_pretrained(tmp_path)
    model = BalladForImageClassification.from_pretrained(tmp_path)
    processor = processor_of(model)
    assert processor.tokenizer is None
    assert model(**processor(Image.new("RGB", (40, 32)), return_tensors="pt")).logits.shape == (1, 5)
    processor.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "preprocessor_config.json").is_file()


def test_a_model_without_a_processor_says_what_to_pass(tiny_ballad, tmp_path):
    with pytest.raises(ValueError, match=r"\(in memory\): pass processing_class=CLIPProcessor"):
        processor_of(tiny_ballad)
    tiny_ballad.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="pass processing_class=CLIPProcessor"):
        processor_of(BalladForImageClassification.from_pretrained(tmp_path))


@pytest.mark.parametrize(
    ("name", "is_local"),
    [
        ("gpt2", False),
        ("openai/clip-vit-base-patch16", False),
        ("./clip", True),
        ("~/clip", True),
        ("outputs/mine/", True),
        ("outputs/mine/best", True),
        ("here/mine", True),  # "here" is a folder
        ("weights/RN50.pt", True),
    ],
)
def test_a_path_is_no_name_of_the_hub(name, is_local, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert is_local_path(name) == is_local


def _refuse_to_connect(calls):
    def get(url, **options):
        calls.append(url)
        raise OSError("Name or service not known")

    return get


def test_a_path_is_never_asked_of_the_hub(monkeypatch):
    calls = []
    monkeypatch.setattr(dual_encoders.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(dual_encoders, "get_hf_file_metadata", _refuse_to_connect(calls))
    with pytest.raises(FileNotFoundError, match="no file or folder './my_clip'"):
        BalladForImageClassification.from_clip("./my_clip")
    assert not calls


def test_an_unreachable_hub_is_asked_once_and_lite_is_named(monkeypatch):
    calls = []
    monkeypatch.setattr(dual_encoders.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(dual_encoders, "get_hf_file_metadata", _refuse_to_connect(calls))
    with pytest.raises(FileNotFoundError, match=r"Name or service not known.*--model lite.*ballad_hf\[lite\]"):
        BalladForImageClassification.from_clip("nobody/nothing")
    assert len(calls) == 1


def test_a_cached_model_needs_no_hub(tmp_path):
    snapshot = tmp_path / "models--nobody--nothing" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    (snapshot / "config.json").write_text("{}")
    assert huggingface_hub.constants.HF_HUB_OFFLINE
    check_model_source("nobody/nothing", hub={"cache_dir": str(tmp_path)})


def test_a_damaged_tokenizer_is_named(clip_folder):
    (clip_folder / "tokenizer.json").write_text('{"model": 5}')
    clip = load_dual_encoder(clip_folder)
    with pytest.raises(ValueError, match="tokenizer of .*tiny-clip can't be loaded.*download it again"):
        load_tokenizer(clip_folder, clip.config)


def test_merges_that_unfold_without_end_are_read_up_to_a_limit(tmp_path, tiny_clip):
    with gzip.open(tmp_path / "merges.txt.gz", "wb", compresslevel=1) as file:
        for _ in range(40):
            file.write(b"a" * 2**20)
    with pytest.raises(ValueError, match="not its merges"):
        load_tokenizer(tmp_path / "merges.txt.gz", tiny_clip.clip.config)
    (tmp_path / "merges.txt.gz").write_bytes(b"no gzip")
    with pytest.raises(ValueError, match=r"merges\.txt\.gz can't be read"):
        load_tokenizer(tmp_path / "merges.txt.gz", tiny_clip.clip.config)
