"""A dual encoder from an image classifier and a sentence encoder, in closed form and without an image.

The classifier's rows say where its classes lie in feature space, the sentence encoder says which texts are alike. A
kernel ridge regression from prompts to rows predicts a row for any text; see `models/modeling_joined_towers.py` for
the formula. The defaults were chosen by leaving out classes of ImageNet, 100 of 1,000 at a time: for 59 % of their
rows the prediction from the own name is the nearest of the 100, with a linear ridge map for 53 % at best
(`benchmarks/lite.py names`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..models.class_embeddings import check_class_names, evaluation_mode, tokenize_prompts
from ..models.configuration_ballad import DEFAULT_TEMPLATE, check_templates
from ..models.configuration_joined_towers import JoinedTowersConfig
from ..models.modeling_joined_towers import JoinedTowersModel, mean_embeddings


_PROMPTS_A_BATCH = 256


@torch.no_grad()
def join_towers(
    image_tower: PreTrainedModel,
    classifier_weight: torch.Tensor,
    class_names: Sequence[str],
    text_tower: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str = DEFAULT_TEMPLATE,
    sharpness: float = 6.0,
    ridge: float = 0.1,
    logit_scale: float = 25.0,
    image_mean: torch.Tensor | None = None,
) -> JoinedTowersModel:
    """Join the backbone of an image classifier and a sentence encoder into a dual encoder.

    Args:
        image_tower: a vision model of transformers, or an EfficientNet-Lite, whose `pooler_output` is what the
            classifier's rows multiply.
        classifier_weight: (classes, width) weight of the classifier's last linear layer.
        class_names: one name a row, in the order of the rows, all different.
        text_tower: a text model of transformers whose mean over the tokens is the sentence embedding.
        tokenizer: of the text tower.
        template: prompt with `{}` for the name of a class; use the same one for new classes.
        sharpness: of the kernel `exp(sharpness * (cosine - 1))`; higher, and only close names have a say.
        ridge: regularisation of the regression, above 0.
        logit_scale: scale of the cosines to start from.
        image_mean: (width,) mean of the image tower's pooled features over images of any kind, which is subtracted;
            it helps zero-shot a little. Default: nothing is subtracted.

    Returns:
        The dual encoder in evaluation mode, for `BalladForImageClassification.from_dual_encoder`. The towers are
        copied.

    Raises:
        ValueError: an image tower without pooled features or rows that do not fit them, names that do not match the
            rows or are not distinct, a setting out of range.

    Example:

    >>> import torch
    >>> from transformers import BertConfig, BertModel, ResNetConfig, ResNetModel
    >>> from ballad_hf import join_towers
    >>> from ballad_hf.conversion.tiny_clip import build_tiny_clip
    >>> tokenizer = build_tiny_clip(words=["cat", "dog", "owl"]).tokenizer
    >>> image_tower = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]))
    >>> text = BertConfig(vocab_size=len(tokenizer), hidden_size=32, num_attention_heads=2, num_hidden_layers=1)
    >>> rows = torch.randn(3, 16)  # of the classifier
    >>> clip = join_towers(image_tower, rows, ["cat", "dog", "owl"], BertModel(text), tokenizer)
    >>> clip.config.projection_dim
    16
    """
    rows = _checked_rows(classifier_weight, class_names)
    check_templates([template])
    for name, value in (("sharpness", sharpness), ("ridge", ridge), ("logit_scale", logit_scale)):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} is {value}: give a finite number above 0.")
    width = _pooled_width(image_tower)
    if rows.shape[1] != width:
        raise ValueError(
            f"The classifier's rows are {rows.shape[1]} wide, but the image tower's pooled features {width}: give "
            "the weight of the linear layer that takes the pooled features."
        )
    if image_mean is not None and image_mean.shape != (width,):
        raise ValueError(f"image_mean is {tuple(image_mean.shape)}: give the mean of pooled features, ({width},).")
    config = JoinedTowersConfig(
        text_config=text_tower.config,
        vision_config=image_tower.config,
        projection_dim=width,
        num_anchors=len(rows),
        sharpness=float(sharpness),
        logit_scale_init_value=math.log(logit_scale),
    )
    with torch.random.fork_rng(devices=[]):  # the random start is overwritten
        model = JoinedTowersModel(config).eval()
    _copy_weights(image_tower, model.vision_model)
    _copy_weights(text_tower, model.text_model.encoder)
    anchors = _embed([template.replace("{}", name) for name in class_names], model, tokenizer)  # (classes, hidden)
    kernel = torch.exp(sharpness * (anchors @ anchors.T - 1))  # (classes, classes)
    centred = rows - rows.mean(dim=0)  # what all rows share moves no softmax
    weights = torch.linalg.solve(kernel + ridge * torch.eye(len(rows), dtype=torch.float64), centred)
    model.text_model.anchors.copy_(anchors)
    model.text_projection.weight.copy_(weights.T)  # (width, classes)
    if image_mean is not None:
        model.visual_projection.bias.copy_(-image_mean)
    return model


def _checked_rows(classifier_weight: torch.Tensor, class_names: Sequence[str]) -> torch.Tensor:
    """The rows in float64, on the CPU: (classes, width)."""
    if not isinstance(classifier_weight, torch.Tensor) or classifier_weight.ndim != 2:
        shape = getattr(classifier_weight, "shape", None)
        given = f"of shape {tuple(shape)}" if shape is not None else repr(classifier_weight)
        raise ValueError(
            f"classifier_weight is {given}: joining needs an image classifier's rows, (classes, width); a "
            "self-supervised image tower has none."
        )
    names = check_class_names(class_names)
    if len(names) != len(classifier_weight):
        raise ValueError(
            f"There are {len(names)} class names for {len(classifier_weight)} rows of the classifier: give one name a "
            "row, in the order of the rows."
        )
    rows = classifier_weight.detach().cpu().double()
    if not rows.isfinite().all():
        raise ValueError("classifier_weight holds values that are not finite: it is damaged.")
    return rows


def _pooled_width(image_tower: PreTrainedModel) -> int:
    config = image_tower.config
    size = getattr(config, "image_size", 224)
    height, width = (size, size) if isinstance(size, int) else size
    pixels = torch.zeros(1, getattr(config, "num_channels", 3), height, width)
    with evaluation_mode(image_tower):
        output = image_tower(pixels.to(image_tower.device, image_tower.dtype))
    pooled = getattr(output, "pooler_output", None)
    if pooled is None:
        raise ValueError(
            f"A {type(image_tower).__name__} gives no pooler_output: give an image tower that pools, as ResNetModel, "
            "ConvNextModel and EfficientNetLiteModel do."
        )
    return pooled.flatten(1).shape[1]


def _copy_weights(source: PreTrainedModel, target: PreTrainedModel) -> None:
    state = source.state_dict()
    target.load_state_dict({name: state[name] for name in target.state_dict()})


def _embed(prompts: Sequence[str], model: JoinedTowersModel, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Sentence embeddings in float64: (prompts, hidden), rows of length 1."""
    # Sorted by length, so that a batch carries little padding.
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    embeds = torch.empty(len(prompts), model.text_model.anchors.shape[1], dtype=torch.float64)
    for start in range(0, len(order), _PROMPTS_A_BATCH):
        batch = order[start : start + _PROMPTS_A_BATCH]
        tokens = tokenize_prompts([prompts[index] for index in batch], tokenizer, model.config)
        hidden = model.text_model.encoder(**tokens).last_hidden_state  # (batch, length, hidden)
        embeds[batch] = mean_embeddings(hidden.double(), tokens.get("attention_mask"))
    return embeds
