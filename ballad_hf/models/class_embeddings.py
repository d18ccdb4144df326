"""Class embeddings: the text features of the classes' prompts, kept in the checkpoint and checked before use.

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
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from .configuration_ballad import BalladConfig, check_templates
from .prior import Prior, prior_shift


logger = logging.get_logger(__name__)

_SAMPLED_VALUES = 1024  # of each tensor of the text tower; a training step changes nearly all


class ClassEmbeddingsMixin:
    """The classes of a model: a persistent float32 buffer `class_embeds` (classes, dim), with names and prompts.

    The config holds two digests. `class_embeds_digest` is of the names, the prompts and the embeddings;
    `text_tower_digest` is of the weights that made the embeddings. Both are compared before the embeddings are used,
    and again only after a name, a prompt, an embedding or a text weight has changed.
    """

    config: BalladConfig
    clip: PreTrainedModel
    class_embeds: torch.Tensor
    _checked: tuple | None = None
    _cached_shift: tuple[tuple, torch.Tensor] | None = None

    @property
    def logit_scale(self) -> torch.Tensor:
        """The multiplier of the cosines, not its logarithm: the fixed one of the config, else the dual encoder's."""
        if self.config.logit_scale is not None:
            return torch.tensor(float(self.config.logit_scale), device=self.class_embeds.device)
        return self.clip.logit_scale.float().exp()

    def stored_class_embeds(self) -> torch.Tensor:
        """The class embeddings (classes, dim), after the check that they belong to this model.

        Raises:
            ValueError: there are none, or they do not belong to the names, the prompts or the text tower.
        """
        if self.config.class_embeds_digest is None:
            raise ValueError(
                "This model has no class embeddings yet: call model.set_class_names(names, tokenizer), "
                "or pass input_ids with the texts to compare."
            )
        if torch.compiler.is_compiling():  # a graph keeps the embeddings as they were checked before
            return self.class_embeds
        state = self._state()
        if state != self._checked:
            self._check()
            self._checked = state
        return self.class_embeds

    def set_class_names(
        self,
        names: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        templates: Sequence[str] | None = None,
        batch_size: int = 256,
        descriptions: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        """Make `names` the classes of this model, with new class embeddings.

        Call it again with the same names after the text tower has been trained.

        Args:
            names: class names in label order, all different.
            tokenizer: the tokenizer of the text tower.
            templates: prompts with `{}` for the name, averaged; default: the config's.
            batch_size: prompts a forward pass.
            descriptions: class name -> prompts that replace the templates for this class. Default: those of the
                config for the names that stay; `{}` drops them.

        Raises:
            ValueError: an empty or repeated name, a template without `{}`, a description of no class, a model
                without a text tower.
        """
        config = self.config
        names = check_class_names(names)
        templates = list(config.templates if templates is None else templates)
        if descriptions is None:
            descriptions = {n: texts for n, texts in (config.class_descriptions or {}).items() if n in set(names)}
        descriptions = check_descriptions(descriptions, names)
        embeds = self._encode(names, tokenizer, templates, batch_size, descriptions)
        counts = config.class_counts
        # Counts and priors of other classes would shift the wrong logits.
        if list(config.id2label.values()) != names or (counts is not None and len(counts) != len(names)):
            config.class_counts = None
            self._drop_priors_by_class()
        self._write(names, templates, descriptions, embeds, config.class_counts, text_tower_digest(self.clip))

    def add_classes(
        self,
        names: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        descriptions: Mapping[str, Sequence[str]] | None = None,
        class_counts: Sequence[int] | None = None,
        batch_size: int = 256,
    ) -> None:
        """Append classes without training. The embeddings of the others stay bit for bit.

        Args:
            names: names of the new classes.
            tokenizer: the tokenizer of the text tower.
            descriptions: new class name -> prompts that replace the templates for this class.
            class_counts: training images of the new classes; default: none.
            batch_size: prompts a forward pass.

        Raises:
            ValueError: an empty name, one that exists already, counts that do not fit; stale class embeddings.
        """
        config = self.config
        new = check_class_names(names)
        names = check_class_names(config.class_names + new)
        own = check_descriptions(descriptions or {}, new)
        counts = [0] * len(new) if class_counts is None else [int(count) for count in class_counts]
        if len(counts) != len(new):
            raise ValueError(f"class_counts has {len(counts)} entries for {len(new)} new classes.")
        old = self.stored_class_embeds()
        embeds = torch.cat([old, self._encode(new, tokenizer, config.templates, batch_size, own).to(old)])
        self._drop_priors_by_class()
        all_counts = None if config.class_counts is None else list(config.class_counts) + counts
        descriptions = {**(config.class_descriptions or {}), **own}
        self._write(names, config.templates, descriptions, embeds, all_counts)

    def remove_classes(self, names: Sequence[str]) -> None:
        """Remove classes; the embeddings, counts and order of the others stay. Needs no text tower.

        Args:
            names: names of the classes to remove.

        Raises:
            ValueError: a name that is no class of this model, no class would be left, stale class embeddings.
        """
        config = self.config
        removed = set(check_class_names(names))
        unknown = sorted(removed - set(config.class_names))
        if unknown:
            raise ValueError(f"These are no classes of this model: {', '.join(map(repr, unknown))}.")
        kept = [index for index, name in enumerate(config.class_names) if name not in removed]
        if not kept:
            raise ValueError("No class would be left: a model needs at least one.")
        embeds = self.stored_class_embeds()[kept]
        names = [config.class_names[index] for index in kept]
        counts = None if config.class_counts is None else [config.class_counts[index] for index in kept]
        descriptions = {n: texts for n, texts in (config.class_descriptions or {}).items() if n not in removed}
        self._drop_priors_by_class()
        self._write(names, config.templates, descriptions, embeds, counts)

    def set_class_embeds(self, class_embeds: torch.Tensor) -> None:
        """Replace the class embeddings by trained ones of the same classes, such as a cosine head's weights.

        Args:
            class_embeds: (classes, dim); rows are normalised.

        Raises:
            ValueError: another shape, rows that are zero or not finite, stale class embeddings.
        """
        old = self.stored_class_embeds()
        embeds = F.normalize(class_embeds.detach().to(old), dim=-1)
        if embeds.shape != old.shape or not bool((embeds.norm(dim=-1) > 0.5).all()):
            raise ValueError(
                f"class_embeds have shape {tuple(class_embeds.shape)}: give {tuple(old.shape)}, of finite rows that "
                "are not zero."
            )
        config = self.config
        self._write(config.class_names, config.templates, config.class_descriptions, embeds, config.class_counts)

    def set_target_prior(self, target_prior: Prior | None, source_prior: Prior = "uniform") -> None:
        """Set how common the classes are where the model is used. Kept in the config and so in the checkpoint.

        Args:
            target_prior: `"uniform"`, `"train"`, a number (the power of the training counts: 0 is uniform, 1 is
                train), or one weight a class; `None` turns the prior correction off.
            source_prior: the prior that the logits are right under without it; see `prior_shift`.

        Raises:
            ValueError: a prior that does not fit the classes; no training counts where they are needed.
        """
        if target_prior is not None:
            prior_shift(target_prior, self.config.num_labels, self.config.class_counts, source_prior)
        self.config.target_prior = _as_plain_prior(target_prior)
        self.config.source_prior = _as_plain_prior(source_prior)

    def logit_shift(self, target_prior: Prior | None = None) -> torch.Tensor | None:
        """What the prior correction adds to the logits: (classes,) float32, or `None` where it is off.

        Args:
            target_prior: replaces the config's.
        """
        config = self.config
        if config.num_labels == 1 and not hasattr(self.clip, "logit_bias"):
            # Softmax over one class is 1 whatever is added, but transformers' pipeline takes a sigmoid.
            return 2 * self.logit_scale.detach() + 20
        target = config.target_prior if target_prior is None else _as_plain_prior(target_prior)
        if target is None:
            return None
        key = tuple(map(_hashable, (target, config.source_prior, config.class_counts, config.num_labels)))
        cached = self._cached_shift  # read once, as another thread may replace it
        if cached is None or cached[0] != key:
            shift = prior_shift(target, config.num_labels, config.class_counts, config.source_prior)
            cached = self._cached_shift = (key, shift)
        return cached[1].to(self.class_embeds.device)

    def _encode(
        self,
        names: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        templates: Sequence[str],
        batch_size: int,
        descriptions: Mapping[str, Sequence[str]],
    ) -> torch.Tensor:
        check_text_tower(self.config)
        remember_padding(self.clip.config, tokenizer)
        return encode_class_prompts(self.clip, tokenizer, names, templates, batch_size, descriptions)

    def _write(
        self,
        names: Sequence[str],
        templates: Sequence[str],
        descriptions: Mapping[str, Sequence[str]] | None,
        class_embeds: torch.Tensor,
        class_counts: Sequence[int] | None,
        text_digest: str | None = None,
    ) -> None:
        config = self.config
        self.class_embeds = class_embeds.to(self.class_embeds.device, torch.float32)
        config.id2label = dict(enumerate(names))
        config.label2id = {name: index for index, name in enumerate(names)}
        config.templates = list(templates)
        config.class_descriptions = {name: list(texts) for name, texts in (descriptions or {}).items()} or None
        config.class_counts = None if class_counts is None else list(class_counts)
        config.class_embeds_digest = self._digest()
        config.text_tower_digest = text_digest or config.text_tower_digest

    def _digest(self) -> str:
        config = self.config
        prompts = prompts_digest(config.class_names, config.templates, config.class_descriptions)
        return _sha256(prompts.encode() + self.class_embeds.detach().float().cpu().numpy().tobytes())

    def _state(self) -> tuple:
        """Changes with everything that the digests are made from, and costs a third of a millisecond."""
        config = self.config
        return (
            (config.class_embeds_digest, config.text_tower_digest),
            dict(config.id2label),
            tuple(config.templates),
            {name: tuple(texts) for name, texts in (config.class_descriptions or {}).items()},
            _version(self.class_embeds),
            text_tower_state(self.clip) if config.has_text_tower else (),
        )

    def _check(self) -> None:
        config = self.config
        if self._digest() != config.class_embeds_digest:
            raise ValueError(
                "The class embeddings are not those of the class names and prompts in the config: names, prompts or "
                "weights were edited, mixed up or damaged, and predictions would carry wrong names. Call "
                "model.set_class_names(names, tokenizer) instead of editing the config, or get the saved model again."
            )
        if config.has_text_tower and not text_tower_fits(self.clip, config.text_tower_digest):
            raise ValueError(
                "The text tower has changed since the class embeddings were made (it was trained, merged or loaded "
                "anew): call model.set_class_names(model.config.class_names, tokenizer) to make them again."
            )

    def _drop_priors_by_class(self) -> None:
        for name, off in (("target_prior", None), ("source_prior", "uniform")):
            if isinstance(getattr(self.config, name), list):
                logger.warning(f"{name} has one weight a class and the classes change: it is {off!r} again.")
                setattr(self.config, name, off)


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


def check_descriptions(descriptions: Mapping[str, Sequence[str]], class_names: Sequence[str]) -> dict[str, list[str]]:
    """Return the descriptions as plain lists, or raise a `ValueError` for an unknown class or an empty entry."""
    unknown = sorted(set(descriptions) - set(class_names))
    if unknown:
        raise ValueError(f"descriptions names classes that do not exist: {', '.join(map(repr, unknown))}.")
    for name, texts in descriptions.items():
        if isinstance(texts, str) or not texts or not all(isinstance(text, str) and text.strip() for text in texts):
            raise ValueError(f"The descriptions of {name!r} are {texts!r}: give a list of non-empty texts.")
    return {name: list(texts) for name, texts in descriptions.items()}


def check_text_tower(config: BalladConfig) -> None:
    """Raise a `ValueError` for a model without its text tower."""
    if not config.has_text_tower:
        raise ValueError(
            "This model was saved without its text tower, so it can't encode text: it serves its stored classes. "
            "Load the full model, or use remove_classes to serve fewer."
        )


def class_prompts(
    class_names: Sequence[str],
    templates: Sequence[str],
    descriptions: Mapping[str, Sequence[str]] | None = None,
) -> list[list[str]]:
    """The prompts of each class: its descriptions where it has some, else the templates with its name.

    Example:

    >>> from ballad_hf.models.class_embeddings import class_prompts
    >>> class_prompts(["cat", "owl"], ["a photo of a {}."], {"owl": ["a round face", "wings that make no sound"]})
    [['a photo of a cat.'], ['a round face', 'wings that make no sound']]
    """
    check_templates(templates)
    own = descriptions or {}
    return [
        list(own[name]) if name in own else [template.replace("{}", name) for template in templates]
        for name in class_names
    ]


def prompts_digest(
    class_names: Sequence[str],
    templates: Sequence[str],
    descriptions: Mapping[str, Sequence[str]] | None = None,
) -> str:
    """A digest that changes with any class name, their order, or a prompt."""
    content = [
        list(class_names),
        list(templates),
        {n: list(texts) for n, texts in sorted((descriptions or {}).items())},
    ]
    return _sha256(json.dumps(content, ensure_ascii=False).encode())


@torch.no_grad()
def text_tower_digest(clip: nn.Module) -> str:
    """Digests of the text tower's weights: as they are, and rounded to bfloat16 and to float16.

    Each is of evenly spaced values of every tensor, as float32: the same on every device and after saving and loading.
    """
    values = _sampled_text_weights(clip)
    rounded = (values, values.to(torch.bfloat16).float(), values.to(torch.float16).float())
    return ":".join(_sha256(version.numpy().tobytes()) for version in rounded)


@torch.no_grad()
def text_tower_fits(clip: nn.Module, digests: str | None) -> bool:
    """Whether the text tower's weights are those of the digests, or those rounded once to half precision.

    Quantised weights can't be compared; the answer is yes.
    """
    if not all(parameter.is_floating_point() for parameter in _text_parameters(clip)):
        return True
    return _sha256(_sampled_text_weights(clip).numpy().tobytes()) in (digests or "").split(":")


def text_tower_state(clip: nn.Module) -> tuple:
    """Changes whenever a text weight is written in place or replaced."""
    return tuple([_version(parameter) for parameter in _text_parameters(clip, idle_updates=True)])


def _version(tensor: torch.Tensor) -> tuple[int, int, int]:
    return id(tensor), tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


def _sampled_text_weights(clip: nn.Module) -> torch.Tensor:
    values = []
    for parameter in _text_parameters(clip):
        flat = parameter.detach().reshape(-1)
        # An odd step visits every column of a matrix whose width is a power of two.
        values.append(flat[:: max(1, flat.numel() // _SAMPLED_VALUES) | 1].float())
    return torch.cat(values).cpu()


def _text_parameters(clip: nn.Module, idle_updates: bool = False) -> list[nn.Parameter]:
    """The parameters that a text feature depends on: all but the image tower's and the scale's.

    Walks the modules by hand, because this is asked at every forward pass and `named_parameters` takes eight times
    as long.

    Args:
        clip: the dual encoder.
        idle_updates: also low-rank updates of peft that are still zero, and so change nothing.
    """
    found: list[nn.Parameter] = []
    waiting = [
        module
        for name, module in clip._modules.items()
        if module is not None and not name.startswith(("vision", "visual"))
    ]
    while waiting:
        module = waiting.pop()
        if not idle_updates and "base_layer" in module._modules and not _is_updated(module):
            module = module.get_submodule("base_layer")
        found.extend(parameter for parameter in module._parameters.values() if parameter is not None)
        waiting.extend(child for child in module._modules.values() if child is not None)
    return found


def _is_updated(module: nn.Module) -> bool:
    """Whether a layer of peft computes something else than the layer below it."""
    return any(bool(parameter.any()) for name, parameter in module.named_parameters() if name.startswith("lora_B"))


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def is_fixed_length(clip_config: PreTrainedConfig) -> bool:
    """Whether the text tower pools the last of a fixed number of positions, as SigLIP's does.

    Such a tower was trained without a mask, so the padding is a part of its input.
    """
    return "siglip" in clip_config.model_type


def remember_padding(clip_config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Keep the tokenizer's padding token in the config, where `pad_as_trained` looks for it."""
    if is_fixed_length(clip_config) and tokenizer.pad_token_id is not None:
        clip_config.text_config.pad_token_id = tokenizer.pad_token_id


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


def tokenize_prompts(
    prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase, clip_config: PreTrainedConfig
) -> dict[str, torch.Tensor]:
    """Token batch of the prompts, padded to the longest one unless the text tower was trained on a fixed length.

    A prompt that is too long for the text tower is truncated, with a warning that names it.
    """
    max_length = min(tokenizer.model_max_length, clip_config.text_config.max_position_embeddings)
    padding = "max_length" if is_fixed_length(clip_config) else "longest"
    tokens = tokenizer(list(prompts), padding=padding, truncation=True, max_length=max_length, return_tensors="pt")
    encodings = tokens.encodings or ()
    cut = [prompt for prompt, encoding in zip(prompts, encodings, strict=False) if encoding.overflowing]
    if cut:
        shown = "; ".join(f"{prompt[:60]}..." for prompt in cut[:3])
        logger.warning(
            f"{len(cut)} prompts are longer than the {max_length} tokens that the text tower reads, and were "
            f"truncated: {shown}"
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
        descriptions: class name -> prompts that replace the templates for this class.

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


def _progress_bar(batches: int) -> Any:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    quiet = batches <= 4 or (distributed and torch.distributed.get_rank() > 0)
    return logging.tqdm(total=batches, desc="Encoding class prompts", disable=quiet, leave=False)


def _as_plain_prior(prior: Any) -> Any:
    """As the config keeps it: a name, a float, or a list of floats."""
    if prior is None or isinstance(prior, str):
        return prior
    if isinstance(prior, int | float):
        return float(prior)
    return torch.as_tensor(prior, dtype=torch.float64).tolist()


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
