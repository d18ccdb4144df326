"""Prior correction: adapt the logits to how common each class is where the model is used.

By Bayes' rule, a classifier whose logits are right under the class prior `p` is right under the prior `q` once
`log q - log p` is added to them (Saerens, Latinne and Decaestecker, 2002, "Adjusting the outputs of a classifier to
new a priori probabilities", Neural Computation 14). The balanced phase of BALLAD leaves logits for a uniform prior.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers.utils import logging


logger = logging.get_logger(__name__)

Prior = str | float | int | Sequence[float] | torch.Tensor


def resolve_prior(prior: Prior, num_classes: int, class_counts: Sequence[int] | torch.Tensor | None) -> torch.Tensor:
    """A class prior, in any form, as probabilities.

    Args:
        prior: `"uniform"`; `"train"`, the frequency of each class in the training images; a number `t` for
            frequencies proportional to `counts ** t` (0 is uniform, 1 is train, below 0 favours the tail); or one
            weight a class, not necessarily summing to 1.
        num_classes: number of classes.
        class_counts: (classes,) training images of each class, for `"train"` and a number. A class that had none
            counts as if it had one.

    Returns:
        (classes,) float64 probabilities, in label order.

    Raises:
        ValueError: an unknown name, no counts where they are needed, weights that do not fit or are not above 0.

    Example:

    >>> from ballad_hf.models.prior import resolve_prior
    >>> resolve_prior([3, 1], 2, None).tolist()
    [0.75, 0.25]
    >>> [round(p, 3) for p in resolve_prior(0.5, 2, [16, 1]).tolist()]
    [0.8, 0.2]
    """
    if isinstance(prior, str) and prior not in ("uniform", "train"):
        raise ValueError(
            f"The prior is {prior!r}: choose 'uniform', 'train', a number (the power of the training counts), or one "
            "weight a class."
        )
    if isinstance(prior, str):
        prior = 0.0 if prior == "uniform" else 1.0
    if isinstance(prior, int | float):
        return _power_of_counts(float(prior), num_classes, class_counts)
    weights = torch.as_tensor(prior, dtype=torch.float64).detach().cpu()
    if weights.shape != (num_classes,):
        raise ValueError(
            f"The prior has shape {tuple(weights.shape)} for {num_classes} classes: give one weight a class."
        )
    if not (torch.isfinite(weights).all() and (weights > 0).all()):
        wrong = (~(torch.isfinite(weights) & (weights > 0))).nonzero().flatten().tolist()
        raise ValueError(
            f"A prior's weights must be finite and above 0, but those of classes {wrong[:10]} are not; a class that "
            "never occurs is better taken out with remove_classes."
        )
    return weights / weights.sum()


def _power_of_counts(
    power: float, num_classes: int, class_counts: Sequence[int] | torch.Tensor | None
) -> torch.Tensor:
    if power == 0:
        return torch.full((num_classes,), 1 / num_classes, dtype=torch.float64)
    if not abs(power) < float("inf"):
        raise ValueError(f"The prior is {power}: the power of the training counts must be a finite number.")
    if class_counts is None:
        raise ValueError(
            "The model has no training counts (config.class_counts), so the prior of the training images is unknown: "
            "set the counts, or give one weight a class."
        )
    counts = torch.as_tensor(class_counts, dtype=torch.float64).cpu()
    if counts.shape != (num_classes,):
        raise ValueError(f"There are {len(counts)} training counts for {num_classes} classes.")
    return torch.softmax(power * counts.clamp(min=1).log(), dim=0)


def prior_shift(
    target_prior: Prior,
    num_classes: int,
    class_counts: Sequence[int] | torch.Tensor | None = None,
    source_prior: Prior = "uniform",
) -> torch.Tensor:
    """What to add to the logits so that they are right under the target prior.

    Args:
        target_prior: the prior where the model is used, in any form that `resolve_prior` takes.
        num_classes: number of classes.
        class_counts: (classes,) training images of each class.
        source_prior: the prior that the logits are right under: uniform after class-balanced training or a loss with
            logit adjustment, `"train"` after plain training on the images as they come.

    Returns:
        (classes,) float32: `log target - log source`.

    Example:

    >>> from ballad_hf.models.prior import prior_shift
    >>> prior_shift([0.75, 0.25], 2).exp().tolist()
    [1.5, 0.5]
    """
    target = resolve_prior(target_prior, num_classes, class_counts)
    source = resolve_prior(source_prior, num_classes, class_counts)
    return (target.log() - source.log()).float()  # (classes,)


@torch.no_grad()
def estimate_prior(
    logits: torch.Tensor,
    source_prior: torch.Tensor | None = None,
    max_iterations: int = 1000,
    tolerance: float = 1e-6,
) -> torch.Tensor:
    """Estimate how common each class is among unlabelled images, by expectation-maximisation.

    Repeats two steps (Saerens et al., 2002): the posteriors under the present estimate, and their mean as the next
    estimate. The likelihood of the images never falls. It trusts the model's probabilities: logits that are too
    sharp give an estimate that only counts predictions.

    Args:
        logits: (images, classes) of the model without a target prior.
        source_prior: (classes,) prior that the logits are right under; `None` for uniform.
        max_iterations: after which it stops with a warning.
        tolerance: stop when the estimate moves by less than this, as the sum of absolute differences.

    Returns:
        (classes,) float64 probabilities; `model.set_target_prior(...)` takes them.

    Raises:
        ValueError: no images, logits of another shape, or some that are not finite.

    Example:

    >>> import torch
    >>> from ballad_hf.models.prior import estimate_prior
    >>> certain = torch.tensor([[20.0, 0.0], [20.0, 0.0], [20.0, 0.0], [0.0, 20.0]])
    >>> [round(p, 3) for p in estimate_prior(certain).tolist()]
    [0.75, 0.25]
    """
    if logits.ndim != 2 or len(logits) == 0:
        raise ValueError(f"logits have shape {tuple(logits.shape)}: give (images, classes), one image or more.")
    if not torch.isfinite(logits).all():
        raise ValueError("Some logits are not finite, so the class prior can't be estimated from them.")
    classes = logits.shape[1]
    source = resolve_prior("uniform" if source_prior is None else source_prior, classes, None).to(logits.device)
    likelihood = torch.softmax(logits.double(), dim=1) / source  # (images, classes), up to a factor an image
    prior = source
    for _ in range(max_iterations):
        joint = likelihood * prior
        updated = (joint / joint.sum(dim=1, keepdim=True)).mean(dim=0)  # (classes,)
        moved = (updated - prior).abs().sum()
        prior = updated
        if moved < tolerance:
            break
    else:
        logger.warning(f"The prior still moved by {moved:.1e} after {max_iterations} iterations.")
    # A probability of zero would forbid its class for good.
    prior = prior.clamp(min=1e-12)
    return prior / prior.sum()
