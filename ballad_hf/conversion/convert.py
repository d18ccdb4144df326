"""Convert other checkpoints to folders of transformers, and BALLAD models to plain CLIP or vision-only models.

Every folder is written beside its place and moved there when it is whole, so that a failure leaves nothing
half-written.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from transformers import AutoImageProcessor, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..files import explain_full_disk
from ..models.modeling_ballad import BalladForImageClassification, check_finite_weights
from .checkpoint_files import read_checkpoint
from .dual_encoders import (
    NO_HUB,
    clip_image_processor,
    find_model_type,
    hub_arguments,
    load_dual_encoder,
    load_image_processor,
    load_openai_clip,
    load_tokenizer,
)
from .layouts import infer_config, model_from_state, strip_data_parallel


logger = logging.get_logger(__name__)

# A tokenizer, where to find one, `None` for the checkpoint's own (OpenAI's from the Hub), or `False` for none.
TokenizerSource: TypeAlias = PreTrainedTokenizerBase | str | os.PathLike | Literal[False] | None

OFFICIAL_RATIO = 0.2
OFFICIAL_SCALE = 100.0


def convert_openai_clip(
    checkpoint: str | os.PathLike,
    output_dir: str | os.PathLike,
    tokenizer: TokenizerSource = None,
    text_attention_heads: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Convert a CLIP model in OpenAI's layout to a folder of transformers.

    Args:
        checkpoint: a TorchScript archive as OpenAI published it, or a state dict (`torch.save` or safetensors). ViT
            or modified ResNet; the architecture follows from the shapes.
        output_dir: the folder to make; it must not exist, or be empty.
        tokenizer: what [`load_tokenizer`] takes; `None` fetches OpenAI's from the Hub, `False` writes none.
        text_attention_heads: the one thing that shapes don't tell; default: heads of width 64.
        dtype: of the written weights.

    Returns:
        The folder, with the model, the image processor and the tokenizer.

    Raises:
        FileNotFoundError, FileExistsError: no checkpoint; a folder that is not empty.
        ValueError: no checkpoint, a truncated one, or not CLIP's weights, with all names that are missing, unexpected
            or of another shape.

    Example:

    >>> from ballad_hf import convert_openai_clip
    >>> convert_openai_clip("RN50.pt", "clip-rn50")  # doctest: +SKIP
    PosixPath('clip-rn50')
    """
    with whole_folder(output_dir) as folder:
        clip = load_openai_clip(checkpoint, text_attention_heads, dtype)
        tokenizer = _tokenizer_for(clip, tokenizer, checkpoint)
        _save(folder, clip, tokenizer, clip_image_processor(clip.config.vision_config.image_size))
    return Path(output_dir)


def convert_open_clip(
    name_or_path: str | os.PathLike, output_dir: str | os.PathLike, tokenizer: TokenizerSource = None, **kwargs: Any
) -> Path:
    """Convert an open_clip Hub repository or folder into a folder of transformers.

    Args:
        name_or_path: with `open_clip_config.json` and its weights.
        output_dir: the folder to make; it must not exist, or be empty.
        tokenizer: default: the repository's own, or OpenAI's where it has none; `False` writes none.
        kwargs: `dtype`, and what finds files on the Hub, such as `revision` and `token`.

    Raises:
        FileNotFoundError, FileExistsError: no such model; a folder that is not empty.
        ValueError: a tower or an option that transformers' CLIP does not have; weights that don't fit.
    """
    hub = hub_arguments(kwargs)
    with whole_folder(output_dir) as folder:
        clip = load_dual_encoder(name_or_path, **kwargs)
        image_processor = load_image_processor(name_or_path, clip.config, **hub)
        _save(folder, clip, _tokenizer_for(clip, tokenizer, name_or_path, hub), image_processor)
    return Path(output_dir)


def convert_official_ballad(
    checkpoint: str | os.PathLike,
    output_dir: str | os.PathLike,
    class_names: Sequence[str] | None = None,
    templates: Sequence[str] | None = None,
    tokenizer: TokenizerSource = None,
    text_attention_heads: int | None = None,
    adapter_ratio: float = OFFICIAL_RATIO,
    logit_scale: float = OFFICIAL_SCALE,
) -> Path:
    """Convert a checkpoint of the official BALLAD code (github.com/gaopengcuhk/BALLAD) to a BALLAD model.

    Args:
        checkpoint: of phase A, without an adapter, which then starts at the identity; or of phase B, with one.
        output_dir: the folder to make; it must not exist, or be empty.
        class_names: the classes in label order, which the checkpoint does not hold; without, call `set_class_names`.
        templates: prompts with `{}`; default: the official one, `a photo of a {}.`
        tokenizer: see [`convert_openai_clip`].
        text_attention_heads: see [`convert_openai_clip`].
        adapter_ratio: lambda; the official code has 0.2.
        logit_scale: the official code fixes 100 and keeps no learnt one.

    Returns:
        The folder of a [`BalladForImageClassification`], with the image processor and the tokenizer.

    Raises:
        FileNotFoundError, FileExistsError: no checkpoint; a folder that is not empty.
        ValueError: no such checkpoint, an adapter that does not fit the tower, class names without a tokenizer.
    """
    if class_names is not None and tokenizer is False:
        raise ValueError("class_names need a tokenizer to make class embeddings: leave out one or both.")
    with whole_folder(output_dir) as folder:
        towers, adapter = _official_parts(read_checkpoint(checkpoint), checkpoint, logit_scale)
        clip = model_from_state(towers, infer_config(towers, text_attention_heads), str(checkpoint))
        width = clip.config.projection_dim
        if adapter is not None and tuple(adapter.shape) != (width, width):
            raise ValueError(
                f"The adapter in {checkpoint} is {tuple(adapter.shape)}, but the towers' features are {width} wide: "
                f"it must be ({width}, {width}). It belongs to other towers."
            )
        tokenizer = _tokenizer_for(clip, tokenizer, checkpoint)
        model = BalladForImageClassification.from_dual_encoder(
            clip, class_names, tokenizer, templates=templates, adapter_ratio=adapter_ratio, logit_scale=logit_scale
        )
        if adapter is not None:
            with torch.no_grad():
                model.adapter.linear.weight.copy_(adapter)
        _save(folder, model, tokenizer, clip_image_processor(clip.config.vision_config.image_size))
    return Path(output_dir)


def convert_to_clip(ballad: str | os.PathLike, output_dir: str | os.PathLike, **kwargs: Any) -> Path:
    """Fold a saved BALLAD model to a plain dual encoder, see `BalladForImageClassification.fold_adapter`.

    A modified ResNet is not in transformers: its folder contains its code, and loads with `trust_remote_code=True`
    where ballad_hf is not installed. All others are stock classes.

    Args:
        ballad: folder or Hub name of a BALLAD model.
        output_dir: the folder to make; it must not exist, or be empty.
        kwargs: for `from_pretrained`.

    Raises:
        FileExistsError: a folder that is not empty.
        ValueError: no BALLAD model, a damaged one, or one whose image tower has no projection to fold into.
    """
    with whole_folder(output_dir) as folder:
        folded = load_ballad(ballad, **kwargs).fold_adapter()
        _save(folder, folded, *_processors(ballad, (AutoTokenizer, AutoImageProcessor), kwargs))
    return Path(output_dir)


def convert_to_vision_only(ballad: str | os.PathLike, output_dir: str | os.PathLike, **kwargs: Any) -> Path:
    """Save a BALLAD model without its text tower; it serves its stored classes. The sizes are logged.

    Args:
        ballad: folder or Hub name of a BALLAD model with class embeddings.
        output_dir: the folder to make; it must not exist, or be empty.
        kwargs: for `from_pretrained`.

    Raises:
        FileExistsError: a folder that is not empty.
        ValueError: no BALLAD model, a damaged one, or one without class embeddings.
    """
    with whole_folder(output_dir) as folder:
        model = load_ballad(ballad, **kwargs)
        before = sum(tensor.nbytes for tensor in model.state_dict().values())
        removed = model.remove_text_tower()
        _save(folder, model, *_processors(ballad, (AutoImageProcessor,), kwargs))
        logger.info(
            f"The weights take {(before - removed) / 1e6:.1f} MB without the text tower, {before / 1e6:.1f} MB with."
        )
    return Path(output_dir)


def load_ballad(ballad: str | os.PathLike, **kwargs: Any) -> BalladForImageClassification:
    """`BalladForImageClassification.from_pretrained` for BALLAD models alone.

    Args:
        ballad: folder or Hub name of a BALLAD model.
        kwargs: for `from_pretrained`.

    Raises:
        ValueError: no BALLAD model, or a damaged one.
    """
    model_type = find_model_type(ballad, hub_arguments(kwargs))
    if model_type != "ballad":
        raise ValueError(
            f"{ballad} is not a saved BALLAD model ({'no model_type' if model_type is None else repr(model_type)}): "
            f"give the folder or Hub name of a trained one.{'' if Path(ballad).exists() else NO_HUB}"
        )
    return BalladForImageClassification.from_pretrained(ballad, **kwargs)


@contextlib.contextmanager
def whole_folder(output_dir: str | os.PathLike) -> Iterator[Path]:
    """A temporary folder beside `output_dir` that is renamed to it when the block ends without an error.

    Raises:
        FileExistsError: `output_dir` is not empty.
        OSError: the disk is full; names `output_dir`.
    """
    output = Path(output_dir)
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise FileExistsError(f"{output} exists and is not empty: give a new folder, or empty this one first.")
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.parent / f".{output.name}-{uuid.uuid4().hex[:8]}"
    temporary.mkdir()
    try:
        with explain_full_disk(output):
            yield temporary
        if output.exists():
            output.rmdir()  # empty: seen above
        temporary.rename(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _official_parts(
    content: Mapping[str, Any], checkpoint: str | os.PathLike, logit_scale: float
) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
    """Both towers in OpenAI's layout, and the adapter where there is one."""
    networks = content.get("state_dict_best", content)
    named: dict[str, Any] = networks if isinstance(networks, dict) else {}
    parts = {name: named[name] for name in ("visual_model", "text_model") if isinstance(named.get(name), dict)}
    absent = [name for name in ("visual_model", "text_model") if name not in parts]
    if absent:
        raise ValueError(
            f"{checkpoint} is no checkpoint of the official BALLAD code: it has no {' and no '.join(absent)}. "
            "Convert a plain CLIP model with convert_openai_clip."
        )
    towers = {f"visual.{name}": value for name, value in strip_data_parallel(parts["visual_model"]).items()}
    towers |= strip_data_parallel(parts["text_model"])
    towers.setdefault("logit_scale", torch.tensor(math.log(logit_scale)))
    adapter = strip_data_parallel(named.get("classifier") or {})
    foreign = sorted(adapter.keys() - {"weight"})
    if foreign:
        raise ValueError(f"The classifier in {checkpoint} is no linear adapter without bias: {', '.join(foreign)}.")
    return towers, adapter.get("weight")


def _tokenizer_for(
    clip: PreTrainedModel, tokenizer: TokenizerSource, checkpoint: str | os.PathLike, hub: dict | None = None
) -> PreTrainedTokenizerBase | None:
    if tokenizer is False:
        return None
    return load_tokenizer(checkpoint if tokenizer is None else tokenizer, clip.config, **(hub or {}))


def _processors(ballad: str | os.PathLike, loaders: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """The tokenizer and the image processor of a saved model, where there are some."""
    found = []
    for loader in loaders:
        try:
            found.append(loader.from_pretrained(ballad, **hub_arguments(kwargs)))
        except (OSError, ValueError) as error:
            logger.warning(f"{ballad} has no {loader.__name__.removeprefix('Auto')} to copy: {error}")
    return found


def _save(folder: Path, *parts: Any) -> None:
    for part in parts:
        if isinstance(part, PreTrainedModel):
            check_finite_weights(part)
        if part is not None:
            part.save_pretrained(folder)
