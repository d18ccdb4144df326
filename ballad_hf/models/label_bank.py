"""From class names to class embeddings: prompts, their features, and the fingerprint that keeps both in step.

A class embedding is the mean of the normalised text features of the class's prompts, normalised again (Radford et al.,
2021, section 3.1.4, for prompt ensembles; one template gives the plain CLIP classifier). A class's prompts are the
templates with its name, or its own descriptions (Menon and Vondrick, 2023, https://arxiv.org/abs/2210.07183).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from .configuration_ballad import BalladConfig, check_templates


logger = logging.get_logger(__name__)

_VALUES_OF_A_TENSOR = 1024  # that enter its fingerprint: a training step changes nearly all


def check_class_names(class_names: Sequence[str]) -> list[str]:
    """Return the names as a list, or raise a `ValueError` that lists every empty or repeated one."""
    if isinstance(class_names, str):
        raise ValueError(f"class_names is the single string {class_names!r}: give a list of names.")
    names = list(class_names)
    if not names:
        raise ValueError("class_names is empty: give at least one class name.")
    empty = [index for index, name in enumerate(names) if not isinstance(name, str) or not name.strip()]
    if empty:
        raise ValueError(f"Class names must be non-empty text, but those at positions {empty} are not.")
    repeated = sorted(name for name, count in Counter(names).items() if count > 1)
    if repeated:
        raise ValueError(f"Class names must differ, but these occur more than once: {', '.join(repeated)}.")
    return names


def check_text_tower(config: BalladConfig) -> None:
    """Raise a `ValueError` for a model without its text tower."""
    if not config.has_text_tower:
        raise ValueError(
            "This model was saved without its text tower, so it can't encode text: it serves its stored classes. "
            "Load the full model, or use remove_classes to serve fewer."
        )


def check_descriptions(descriptions: Mapping[str, Sequence[str]], class_names: Sequence[str]) -> dict[str, list[str]]:
    """Return the descriptions as plain lists, or raise a `ValueError` for an unknown class or an empty entry."""
    unknown = sorted(set(descriptions) - set(class_names))
    if unknown:
        raise ValueError(f"descriptions names classes that do not exist: {', '.join(map(repr, unknown))}.")
    for name, texts in descriptions.items():
        if isinstance(texts, str) or not texts or not all(isinstance(text, str) and text.strip() for text in texts):
            raise ValueError(f"The descriptions of {name!r} are {texts!r}: give a list of non-empty texts.")
    return {name: list(texts) for name, texts in descriptions.items()}


def class_prompts(
    class_names: Sequence[str],
    templates: Sequence[str],
    descriptions: Mapping[str, Sequence[str]] | None = None,
) -> list[list[str]]:
    """The prompts of each class: its descriptions where it has some, else the templates with its name.

    Example:

    >>> from ballad_hf.models.label_bank import class_prompts
    >>> class_prompts(["cat", "owl"], ["a photo of a {}."], {"owl": ["a round face", "wings that make no sound"]})
    [['a photo of a cat.'], ['a round face', 'wings that make no sound']]
    """
    check_templates(templates)
    own = descriptions or {}
    return [
        list(own[name]) if name in own else [template.replace("{}", name) for template in templates]
        for name in class_names
    ]


def names_fingerprint(
    class_names: Sequence[str],
    templates: Sequence[str],
    descriptions: Mapping[str, Sequence[str]] | None = None,
) -> str:
    """Fingerprint of what the class embeddings say; it changes with any name, their order, or a prompt."""
    said: list = [list(class_names), list(templates)]
    if descriptions:
        said.append({name: list(texts) for name, texts in sorted(descriptions.items())})
    return hashlib.sha256(json.dumps(said, ensure_ascii=False).encode()).hexdigest()[:32]


def text_parameters(clip: nn.Module) -> list[nn.Parameter]:
    """The parameters that a text feature depends on: all but the image tower's and the scale's.

    Walks the modules by hand, because this is asked at every forward pass and `named_parameters` takes eight times
    as long.
    """
    found: list[nn.Parameter] = []
    waiting = [
        module
        for name, module in clip._modules.items()
        if module is not None and not name.startswith(("vision", "visual"))
    ]
    while waiting:
        module = waiting.pop()
        # A layer of peft, whose own weights change nothing until they are merged.
        module = module._modules.get("base_layer") or module
        found.extend(parameter for parameter in module._parameters.values() if parameter is not None)
        waiting.extend(child for child in module._modules.values() if child is not None)
    return found


@torch.no_grad()
def text_weights_fingerprint(clip: nn.Module) -> str:
    """Fingerprint of the text tower's weights, as `dtype:digest` thrice: as they are, and rounded to half precision.

    A digest is one of evenly spaced values of every tensor. It is the same on every device, after saving and loading,
    and in every dtype that holds the values exactly.
    """
    values = _sampled_text_weights(clip)
    if not values:
        return "none:"
    made_in = str(values[0].dtype).removeprefix("torch.")
    rounded = {"float16": torch.float16, "bfloat16": torch.bfloat16}
    pairs = {made_in: _digest(values)}
    for name, dtype in rounded.items():
        pairs.setdefault(name, _digest([value.to(dtype) for value in values]))
    return ":".join(f"{name}:{digest}" for name, digest in pairs.items())


@torch.no_grad()
def text_weights_fit(clip: nn.Module, fingerprint: str) -> bool:
    """Whether the text tower's weights are those of the fingerprint, or those rounded to half precision.

    Rounded weights may be cast back to float32: they are then exactly the rounded values, which the smallest step of
    a training moves. In half precision they can't be compared with what was made in another dtype, as they may have
    been rounded twice; the answer is yes.
    """
    made_in, *digests = fingerprint.split(":")
    values = _sampled_text_weights(clip)
    if (_digest(values) if values else "") in digests[::2]:
        return True
    dtype = str(values[0].dtype).removeprefix("torch.") if values else "none"
    return dtype not in (made_in, "float32", "float64")


def _sampled_text_weights(clip: nn.Module) -> list[torch.Tensor]:
    values = []
    for parameter in text_parameters(clip):
        flat = parameter.detach().reshape(-1)
        # An odd step visits every column of a matrix whose width is a power of two.
        values.append(flat[:: max(1, flat.numel() // _VALUES_OF_A_TENSOR) | 1])
    return values


def _digest(values: list[torch.Tensor]) -> str:
    content = torch.cat([value.double() for value in values]).cpu().numpy().tobytes()
    return hashlib.sha256(content).hexdigest()[:32]


def text_weights_state(clip: nn.Module) -> tuple:
    """Changes whenever a text weight is written in place or replaced; costs a third of a millisecond."""
    return tuple(
        [
            (id(parameter), parameter.data_ptr(), 0 if parameter.is_inference() else parameter._version)
            for parameter in text_parameters(clip)
        ]
    )


def is_fixed_length(clip_config: PreTrainedConfig) -> bool:
    """Whether the text tower pools the last of a fixed number of positions, as SigLIP's does.

    Such a tower was trained without a mask, so the padding is a part of its input.
    """
    return "siglip" in clip_config.model_type


def pad_as_trained(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, clip_config: PreTrainedConfig
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Token ids and mask as the text tower saw them in training, whoever made them.

    Args:
        input_ids: (texts, length), padded on the right to any length.
        attention_mask: (texts, length), or `None`.
        clip_config: of the dual encoder.
    """
    if not is_fixed_length(clip_config):
        return input_ids, attention_mask
    text = clip_config.text_config
    missing = max(0, text.max_position_embeddings - input_ids.shape[1])
    return F.pad(input_ids, (0, missing), value=text.pad_token_id), None  # (texts, positions)


def remember_padding(clip_config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Keep the tokenizer's padding token in the config, where `pad_as_trained` looks for it."""
    if is_fixed_length(clip_config) and tokenizer.pad_token_id is not None:
        clip_config.text_config.pad_token_id = tokenizer.pad_token_id


def tokenize_prompts(
    prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase, clip_config: PreTrainedConfig
) -> dict[str, torch.Tensor]:
    """Token batch of the prompts, padded to the longest one unless the text tower was trained on fixed lengths.

    A prompt that is too long for the text tower is cut, with a warning that names it.
    """
    max_length = min(tokenizer.model_max_length, clip_config.text_config.max_position_embeddings)
    padding = "max_length" if is_fixed_length(clip_config) else "longest"
    tokens = tokenizer(list(prompts), padding=padding, truncation=True, max_length=max_length, return_tensors="pt")
    encodings = tokens.encodings or ()
    cut = [prompt for prompt, encoding in zip(prompts, encodings, strict=False) if encoding.overflowing]
    if cut:
        shown = "; ".join(f"{prompt[:60]}..." for prompt in cut[:3])
        logger.warning(
            f"{len(cut)} prompts are longer than the {max_length} tokens that the text tower reads, and were cut: "
            f"{shown}"
        )
    input_ids, mask = tokens["input_ids"], tokens.get("attention_mask")
    if mask is None or is_fixed_length(clip_config):
        return {"input_ids": input_ids}
    return {"input_ids": input_ids, "attention_mask": mask}


@torch.no_grad()
def encode_class_prompts(
    clip: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    class_names: Sequence[str],
    templates: Sequence[str],
    batch_size: int = 256,
    descriptions: Mapping[str, Sequence[str]] | None = None,
) -> torch.Tensor:
    """Class embeddings of a dual encoder. A prompt that several classes share is encoded once.

    Args:
        clip: the dual encoder (`CLIPModel` or alike), on any device and in any dtype.
        tokenizer: its tokenizer.
        class_names: one name a class.
        templates: prompts with `{}` for the name.
        batch_size: prompts a forward pass.
        descriptions: class name -> prompts that take the place of the templates for this class.

    Returns:
        Float32 tensor of shape (classes, projection_dim) on the model's device, rows of length 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: give 1 prompt or more a forward pass.")
    by_class = class_prompts(class_names, templates, descriptions)
    # Sorted by length, so that a batch carries little padding.
    prompts = sorted({prompt for texts in by_class for prompt in texts}, key=lambda prompt: (len(prompt), prompt))
    row_of = {prompt: row for row, prompt in enumerate(prompts)}
    uses = torch.tensor([(row_of[prompt], index) for index, texts in enumerate(by_class) for prompt in texts])
    uses = uses[uses[:, 0].argsort(stable=True)]  # (uses, 2): row of the prompt, class
    starts = range(0, len(prompts), batch_size)
    total = None
    with evaluation_mode(clip), _progress_bar(len(starts)) as bar:
        for start in starts:
            tokens = tokenize_prompts(prompts[start : start + batch_size], tokenizer, clip.config)
            output = clip.get_text_features(**{name: value.to(clip.device) for name, value in tokens.items()})
            # Summed on the CPU: there the order of additions, and so the last bit, is always the same.
            features = F.normalize(output.pooler_output.float(), dim=-1).cpu()  # (prompts of the batch, dim)
            if total is None:
                total = features.new_zeros(len(by_class), features.shape[1])  # (classes, dim)
            first, last = torch.searchsorted(uses[:, 0].contiguous(), torch.tensor([start, start + len(features)]))
            rows, classes = uses[first:last].unbind(dim=1)
            total.index_add_(0, classes, features[rows - start])
            bar.update()
    assert total is not None
    return F.normalize(total, dim=-1).to(clip.device)  # (classes, dim); the mean has the same direction


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; after it every module has its own mode back.

    `model.train(was_training)` would not do: parts of a model in training may be kept in evaluation mode.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _progress_bar(batches: int):
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    quiet = batches <= 4 or (distributed and torch.distributed.get_rank() > 0)
    return logging.tqdm(total=batches, desc="Encoding class prompts", disable=quiet, leave=False)
