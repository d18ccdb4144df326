"""Configuration of a BALLAD model: the dual encoder's own config, the adapter, the classes and their prompts."""

# No `from __future__ import annotations` here: transformers checks field types only where they are real objects.
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import CLIPConfig, PreTrainedConfig


DEFAULT_TEMPLATE = "a photo of a {}."


@strict
class BalladConfig(PreTrainedConfig):
    """Configuration of [`BalladForImageClassification`].

    Args:
        clip_config: config of the dual encoder, as an object or a dict; `model_type` selects the class. Default: CLIP.
        adapter_ratio: lambda of `f' = lambda * W f + (1 - lambda) * f`, from 0 (the dual encoder alone) to 1.
        adapter_init: `"identity"` starts phase B at the model of phase A; `"random"` is the official code's.
        logit_scale: multiplier of the cosine similarities; `None` takes the CLIP model's own learnt scale. The
            official code fixes 100.
        templates: prompts that name a class at `{}`; the embeddings of several are averaged.
        class_descriptions: class name -> prompts that replace the templates for that class.
        class_counts: training images of each class, in label order. Kept for the shot groups and the prior
            correction.
        target_prior: class prior where the model is used: `"uniform"`, `"train"`, a power of the training counts, or
            one weight a class; `None` leaves the logits alone. Set it by `set_target_prior`.
        source_prior: the prior that the logits are right under without it, in the same forms.
        class_embeds_digest: of the class names, the prompts and the stored class embeddings, which must belong
            together. Written by `set_class_names`; never set it by hand.
        text_tower_digest: of the text weights that the class embeddings were made with; written with the above.
        has_text_tower: `False` for a model without a text tower, which serves its stored classes and no others.
        initializer_range: standard deviation for weights that have no rule of their own.

    Raises:
        ValueError: a ratio outside 0 to 1, an unknown initialisation, a template without `{}`, counts that do not fit.

    Example:

    >>> from ballad_hf import BalladConfig
    >>> config = BalladConfig(adapter_ratio=0.2, id2label={0: "cat", 1: "dog"})
    >>> config.label2id
    {'cat': 0, 'dog': 1}
    """

    model_type = "ballad"
    sub_configs = {"clip_config": PreTrainedConfig}

    clip_config: dict | PreTrainedConfig | None = None
    adapter_ratio: float | int = 0.2
    adapter_init: str = "identity"
    logit_scale: float | int | None = None
    templates: list[str] | tuple[str, ...] = (DEFAULT_TEMPLATE,)
    class_descriptions: dict[str, list[str]] | None = None
    class_counts: list[int] | None = None
    target_prior: str | float | int | list[float] | None = None
    source_prior: str | float | int | list[float] = "uniform"
    class_embeds_digest: str | None = None
    text_tower_digest: str | None = None
    has_text_tower: bool = True
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        self.clip_config = _as_config(self.clip_config)
        if self.id2label is not None and kwargs.get("num_labels") not in (None, len(self.id2label)):
            # `from_pretrained(..., num_labels=3)` on a model of other classes: what belongs to those goes.
            self.class_counts = self.class_descriptions = self.target_prior = self.class_embeds_digest = None
            self.source_prior = "uniform"
        super().__post_init__(**kwargs)
        # label2id is always derived: a missing one, or one left from other names, would disagree in silence.
        self.label2id = {name: index for index, name in self.id2label.items()}
        # Called here so that a user meets a plain ValueError; `@strict` calls them again before a save.
        self.validate_adapter()
        self.validate_labels()

    @property
    def class_names(self) -> list[str]:
        """The class names in label order.

        Raises:
            ValueError: `id2label` was edited and its keys are not 0 to n - 1.
        """
        names = {int(index): name for index, name in self.id2label.items()}
        if sorted(names) != list(range(len(names))):
            raise ValueError(
                f"The keys of id2label are {sorted(names)[:10]}, but must be 0 to {len(names) - 1}: call "
                "model.set_class_names(names, tokenizer) instead of editing the config."
            )
        return [names[index] for index in range(len(names))]

    @property
    def processor_class(self) -> str | None:
        """What `AutoProcessor` loads from a model directory: any image processor and tokenizer, side by side."""
        return "CLIPProcessor" if self.has_text_tower else None

    @property
    def projection_dim(self) -> int:
        """Width of the shared image and text space, in which the adapter works."""
        return joint_width(self.clip_config)

    def validate_adapter(self) -> None:
        if not (math.isfinite(self.adapter_ratio) and 0 <= self.adapter_ratio <= 1):
            raise ValueError(
                f"adapter_ratio is {self.adapter_ratio}, but it weighs the adapted against the original feature: "
                "choose a number from 0 (the CLIP model itself) to 1 (the adapter alone); the paper uses 0.2."
            )
        if self.adapter_init not in ("identity", "random"):
            raise ValueError(f"adapter_init is {self.adapter_init!r}: choose 'identity' or 'random'.")
        if self.logit_scale is not None and not (math.isfinite(self.logit_scale) and self.logit_scale > 0):
            raise ValueError(
                f"logit_scale is {self.logit_scale}: it multiplies cosine similarities, so it must be a finite number "
                "above 0 (the official code uses 100), or None for the CLIP model's own scale."
            )

    def validate_labels(self) -> None:
        check_templates(self.templates)
        repeated = sorted(name for name, count in Counter(self.id2label.values()).items() if count > 1)
        if repeated:
            raise ValueError(f"Class names must differ, but these occur more than once: {', '.join(repeated)}.")
        if self.class_counts is not None and len(self.class_counts) != self.num_labels:
            raise ValueError(
                f"class_counts has {len(self.class_counts)} entries for {self.num_labels} classes; "
                "give the number of training images of each class, in label order."
            )


def check_templates(templates: Sequence[str]) -> None:
    """Refuse an empty list and any template that would give every class the same prompt."""
    if not templates:
        raise ValueError(f"templates is empty: give at least one prompt with {{}}, such as {DEFAULT_TEMPLATE!r}.")
    for template in templates:
        if template.count("{}") != 1:
            raise ValueError(
                f"The template {template!r} must contain {{}} exactly once, where the class name goes; "
                f"for example {DEFAULT_TEMPLATE!r}."
            )
        if set("{}") & set(template.replace("{}", "")):
            raise ValueError(
                f"The template {template!r} has curly brackets beside the {{}} of the class name, which formatting "
                "would take for another value: leave them out."
            )


def joint_width(clip_config: PreTrainedConfig) -> int:
    """Width of a dual encoder's projected features, by whichever name its family keeps it."""
    width = getattr(clip_config, "projection_dim", None)
    if width is None:  # SigLIP has no projection: its image tower's width is the joint width.
        width = getattr(clip_config.vision_config, "hidden_size", None)
    if width is None:
        raise ValueError(
            f"Can't tell the width of the image features of a {clip_config.model_type!r} model: its config has "
            "neither projection_dim nor vision_config.hidden_size."
        )
    return width


def _as_config(clip_config: dict | PreTrainedConfig | None) -> PreTrainedConfig:
    if clip_config is None:
        return CLIPConfig()
    if isinstance(clip_config, PreTrainedConfig):
        return clip_config
    values = dict(clip_config)
    model_type = values.pop("model_type", "clip")
    if model_type == "clip_resnet":
        from .configuration_clip_resnet import CLIPResNetConfig

        return CLIPResNetConfig(**values)
    if model_type == "joined_towers":
        from .configuration_joined_towers import JoinedTowersConfig

        return JoinedTowersConfig(**values)
    from transformers import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"clip_config has model_type {model_type!r}, which this version of transformers does not know; "
            "it must name a dual encoder such as 'clip', 'clip_resnet' or 'siglip'."
        )
    return CONFIG_MAPPING[model_type](**values)
