"""The contrastive loss of phase A, and the classification losses for long-tailed data.

In every equation `z` are the logits of one image, `y` its class, `p(c)` the share of class `c` among the images that
the sampler draws, `n_c` the draws of class `c` in an epoch, and `C` the number of classes. Under instance sampling,
`n_c` is the number of training images. Every loss is computed in float32 whatever the autocast.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn


class NonFiniteLossError(FloatingPointError):
    """A training loss became NaN or infinite."""


def contrastive_loss(similarity: torch.Tensor, image_labels: torch.Tensor, text_labels: torch.Tensor) -> torch.Tensor:
    """The contrastive loss of phase A in both directions, with every pair of one class as a positive.

    Ma et al. (2021, section 3.2) pair every image `i` of the batch with the prompt of its class and average over the
    positives `P(i)`, which are all pairs of the same class:

        L_image = -1/N sum_i 1/|P(i)| sum_{p in P(i)} log( exp(s_ip) / sum_j exp(s_ij) )

    and the same with images and prompts exchanged; the loss is the mean of both. Pairs of one class share one
    prompt, so a column for each class that occurs, counted as often as it occurs, gives the same value from fewer
    texts.

    Args:
        similarity: scaled cosines, (batch, classes of the batch).
        image_labels: (batch,) class of each image.
        text_labels: (classes of the batch,) class of each column, all different; every image's class is among them.

    Returns:
        A scalar in float32.

    Example:

    >>> import torch
    >>> from ballad_hf.training.losses import contrastive_loss
    >>> round(contrastive_loss(torch.zeros(2, 2), torch.tensor([3, 5]), torch.tensor([3, 5])).item(), 4)  # ln 2
    0.6931
    """
    with torch.autocast(similarity.device.type, enabled=False):
        similarity = similarity.float()
        same_class = (image_labels[:, None] == text_labels[None, :]).float()  # (batch, classes)
        images = same_class.sum(dim=0)  # (classes,)
        # A class with k images occurs k times in the image's denominator: add log k to its column.
        image_log_probs = similarity - torch.logsumexp(similarity + images.log(), dim=1, keepdim=True)
        image_to_text = -(image_log_probs * same_class).sum(dim=1).mean()
        # Its prompt occurs k times, each with the mean over k positives: the k cancels.
        text_log_probs = similarity.log_softmax(dim=0)
        text_to_image = -(text_log_probs * same_class).sum() / len(similarity)
        return (image_to_text + text_to_image) / 2


class ClassificationLoss(nn.Module):
    """A classification loss with its constants, made by [`build_classification_loss`].

    Called with `logits` (batch, classes) and `labels` (batch,), it returns the mean over the batch, or with
    `reduction="none"` the loss of each image, (batch,).
    """

    def __init__(self, name: str, terms: Callable[..., torch.Tensor], **constants: torch.Tensor):
        super().__init__()
        self.name = name
        self.terms = terms
        self.constants = tuple(constants)
        for constant, value in constants.items():
            self.register_buffer(constant, value, persistent=False)

    @property
    def couples_batch(self) -> bool:
        """Whether an image's loss depends on the rest of the batch, so that micro-batches need cached gradients."""
        return self.name == "lade"

    def forward(
        self, logits: torch.Tensor, labels: torch.Tensor, reduction: Literal["mean", "none"] = "mean"
    ) -> torch.Tensor:
        constants = {name: getattr(self, name).to(logits.device) for name in self.constants}
        with torch.autocast(logits.device.type, enabled=False):
            losses = self.terms(logits.float(), labels, **constants)  # (batch,)
        return losses.mean() if reduction == "mean" else losses


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
    """`-log softmax(z)_y`; with smoothing `e`, the target is `1 - e` on `y` plus `e / C` on every class."""
    return F.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)


def focal(logits: torch.Tensor, labels: torch.Tensor, gamma: float = 2.0) -> torch.Tensor:
    """`-(1 - p_y)^gamma log p_y`: easy images count less (Lin et al., 2017, equation 4)."""
    losses = cross_entropy(logits, labels)
    return (1 - (-losses).exp()) ** gamma * losses


def margin_cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, margins: torch.Tensor, label_smoothing: float = 0.0
) -> torch.Tensor:
    """Cross-entropy after the logit of the true class is lowered by its margin (LDAM, Cao et al., 2019, eq. 13)."""
    lowered = F.one_hot(labels, len(margins)) * margins  # (batch, classes)
    return cross_entropy(logits - lowered, labels, label_smoothing)


def weighted_cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, label_smoothing: float = 0.0
) -> torch.Tensor:
    """`w_y * cross-entropy`.

    torch's `cross_entropy(weight=)` divides by the weights of the batch. Here the weights have a mean of 1 over what
    the sampler draws: the same in expectation, and micro-batches add up to the gradient of the whole batch.
    """
    return weights[labels] * cross_entropy(logits, labels, label_smoothing)


def adjusted_cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, offsets: torch.Tensor, label_smoothing: float = 0.0
) -> torch.Tensor:
    """Cross-entropy of `z + offset`, with one offset a class: the prior moves from the classifier into the loss."""
    return cross_entropy(logits + offsets, labels, label_smoothing)


def lade(
    logits: torch.Tensor,
    labels: torch.Tensor,
    prior: torch.Tensor,
    log_prior: torch.Tensor,
    divergence_weight: float = 0.1,
    regularizer_weight: float = 0.1,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """LADE (Hong et al., 2021): cross-entropy of `z + log p` plus the label-distribution regulariser LADER.

    As in the authors' code (hyperconnect/LADE), for every class `c`, also one that is absent from the batch:

        d_c = log( 1/N sum_i (1/C) / p(c) * exp(z_ic) )
        L_c = -mean_{i: y_i = c} z_ic + d_c + divergence_weight * d_c^2        # the mean is 0 for an absent class

    and LADER is `sum_c p(c) L_c`, with the weight `regularizer_weight`. Equation 8 of the paper has the prior of each
    image's own class, `p(y_i)`, in `d_c`; the code has that of the column. LADER is a property of the batch; it is
    added to the loss of every image, so that their mean is the loss.
    """
    batch, classes = logits.shape
    one_hot = F.one_hot(labels, classes).to(logits.dtype)  # (batch, classes)
    images = one_hot.sum(dim=0)  # (classes,)
    mean_logit = (logits * one_hot).sum(dim=0) / images.clamp(min=1)  # (classes,)
    log_partition = torch.logsumexp(logits, dim=0) - log_prior - math.log(classes * batch)  # (classes,)
    by_class = -mean_logit + log_partition + divergence_weight * log_partition**2
    regularizer = (prior * by_class).sum()
    return adjusted_cross_entropy(logits, labels, log_prior, label_smoothing) + regularizer_weight * regularizer


# The names that `build_classification_loss` accepts.
CLASSIFICATION_LOSSES = (
    "cross_entropy",
    "focal",
    "ldam",
    "class_balanced",
    "generalized_reweight",
    "balanced_softmax",
    "logit_adjustment",
    "lade",
)


def build_classification_loss(
    name: str,
    class_counts: Sequence[int] | torch.Tensor | None = None,
    *,
    class_distribution: Sequence[float] | torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    focal_gamma: float = 2.0,
    ldam_max_margin: float = 0.5,
    ldam_scale: float = 30.0,
    class_balanced_beta: float = 0.9999,
    reweight_exponent: float = 1.0,
    adjustment_strength: float = 1.0,
    lade_weight: float = 0.1,
) -> ClassificationLoss:
    """Build a classification loss by its name.

    | name | loss | source |
    |---|---|---|
    | `cross_entropy` | `-log softmax(z)_y` | |
    | `focal` | `-(1 - p_y)^gamma log p_y` | Lin et al., 2017 |
    | `ldam` | logit of `y` lowered by `s * m / n_y^(1/4)`, the largest being `s * max_margin` | Cao et al., 2019 |
    | `class_balanced` | weights `(1 - beta) / (1 - beta^n_y)` | Cui et al., 2019 |
    | `generalized_reweight` | weights `(1 / p(y))^exponent` | Zhang et al., 2021 |
    | `balanced_softmax` | cross-entropy of `z_c + log n_c` | Ren et al., 2020 |
    | `logit_adjustment` | cross-entropy of `z_c + strength * log p(c)` | Menon et al., 2021 |
    | `lade` | cross-entropy of `z_c + log p(c)` and the regulariser LADER | Hong et al., 2021 |

    A sampler and a loss that both balance would correct twice. So `p(c)` and `n_c` describe what the sampler draws:
    with `class_distribution`, `n_c` is that share of the training images. Under balanced sampling the last five
    losses become cross-entropy (LADE with its regulariser). Only `ldam` keeps the training counts: its margins are
    wide where a class has few different images, and drawing those more often adds none.

    Weights have a mean of 1 over what the sampler draws: `sum_c p(c) w_c = 1`. A class that is never drawn has the
    offset or weight of one draw an epoch.

    Args:
        name: one of the table.
        class_counts: training images of each class, in label order; all but the first two losses need it.
        class_distribution: (classes,) share of each class among the draws, in any scale, such as
            `sampler.class_distribution(classes)`; default: that of `class_counts`, which is instance sampling.
        label_smoothing: share of the target that is spread over all classes, from 0 to below 1; not for `focal`.
        focal_gamma: gamma of `focal`.
        ldam_max_margin: margin of the rarest class, on the cosine's scale.
        ldam_scale: multiplier of the cosines in the logits, `s`: give the logit scale of the model. The default is
            that of the official LDAM code, whose classifier has 30.
        class_balanced_beta: beta of `class_balanced`, from 0 (no weights) to below 1.
        reweight_exponent: exponent of `generalized_reweight`.
        adjustment_strength: tau of `logit_adjustment`.
        lade_weight: weight of LADER.

    Returns:
        A callable `loss(logits, labels, reduction="mean")` in float32.

    Raises:
        ValueError: an unknown name, missing or negative counts or shares, a smoothing out of range or not applicable.

    Example:

    >>> import torch
    >>> from ballad_hf.training.losses import build_classification_loss
    >>> loss = build_classification_loss("balanced_softmax", class_counts=[300, 100])
    >>> round(loss(torch.zeros(1, 2), torch.tensor([1])).item(), 4)  # -ln(100 / 400)
    1.3863
    >>> balanced = build_classification_loss("balanced_softmax", [300, 100], class_distribution=[0.5, 0.5])
    >>> round(balanced(torch.zeros(1, 2), torch.tensor([1])).item(), 4)  # -ln(1 / 2)
    0.6931
    """
    if name not in CLASSIFICATION_LOSSES:
        raise ValueError(
            f"There is no classification loss {name!r}: choose one of {', '.join(CLASSIFICATION_LOSSES)}."
        )
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing is {label_smoothing}: choose a number from 0 to below 1, such as 0.1.")
    if name == "focal" and label_smoothing:
        raise ValueError("The focal loss has no label smoothing: set label_smoothing=0.")
    if name == "cross_entropy":
        return ClassificationLoss(name, partial(cross_entropy, label_smoothing=label_smoothing))
    if name == "focal":
        return ClassificationLoss(name, partial(focal, gamma=focal_gamma))

    counts = _check_counts(name, class_counts)  # (classes,)
    if name == "ldam":
        margins = counts.clamp(min=1) ** -0.25
        margins = margins * (ldam_scale * ldam_max_margin / margins.max())
        return ClassificationLoss(
            name, partial(margin_cross_entropy, label_smoothing=label_smoothing), margins=margins.float()
        )

    prior = _check_distribution(class_distribution, counts)  # (classes,), sums to 1
    draws = prior * counts.sum()
    draws = torch.where(draws > 0, draws, 1.0)
    log_prior = (draws / draws.sum()).log()
    if name in ("balanced_softmax", "logit_adjustment"):
        offsets = draws.log() if name == "balanced_softmax" else adjustment_strength * log_prior
        return ClassificationLoss(
            name, partial(adjusted_cross_entropy, label_smoothing=label_smoothing), offsets=offsets.float()
        )
    if name == "lade":
        terms = partial(lade, regularizer_weight=lade_weight, label_smoothing=label_smoothing)
        return ClassificationLoss(name, terms, prior=prior.float(), log_prior=log_prior.float())
    if name == "class_balanced":
        if not 0 <= class_balanced_beta < 1:
            raise ValueError(
                f"class_balanced_beta is {class_balanced_beta}: choose from 0 to below 1, such as 0.9999."
            )
        weights = (1 - class_balanced_beta) / (1 - class_balanced_beta**draws)
    else:
        weights = (-reweight_exponent * log_prior).exp()
    weights = weights / (prior * weights).sum()
    return ClassificationLoss(
        name, partial(weighted_cross_entropy, label_smoothing=label_smoothing), weights=weights.float()
    )


def _check_counts(name: str, class_counts: Sequence[int] | torch.Tensor | None) -> torch.Tensor:
    if class_counts is None:
        raise ValueError(f"The loss {name!r} needs class_counts: the training images of each class, in label order.")
    counts = torch.as_tensor(class_counts, dtype=torch.float64)  # (classes,)
    if counts.ndim != 1 or not len(counts):
        raise ValueError(f"class_counts has shape {tuple(counts.shape)}: give one number a class, in label order.")
    _check_not_negative("class_counts", counts)
    return counts


def _check_distribution(
    class_distribution: Sequence[float] | torch.Tensor | None, counts: torch.Tensor
) -> torch.Tensor:
    if class_distribution is None:
        return counts / counts.sum()
    shares = torch.as_tensor(class_distribution, dtype=torch.float64)
    if shares.shape != counts.shape:
        raise ValueError(
            f"class_distribution has shape {tuple(shares.shape)}, but class_counts has {len(counts)} classes: give "
            "one share a class, in label order."
        )
    _check_not_negative("class_distribution", shares)
    return shares / shares.sum()


def _check_not_negative(name: str, values: torch.Tensor) -> None:
    wrong = torch.nonzero(~((values >= 0) & values.isfinite())).flatten().tolist()
    if wrong:
        raise ValueError(f"{name} is negative or not finite for the classes {wrong[:20]}: give 0 or more.")
    if not values.sum() > 0:
        raise ValueError(f"{name} is 0 for every class: give more than 0 for at least one.")
