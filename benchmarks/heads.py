"""Heads that the benchmarks compare with phase B, beside those that the package offers.

| name | head | source |
|---|---|---|
| `zero_shot` | the class embeddings | Radford et al., 2021 |
| `logit_adjusted` | `zero_shot` minus `tau log p(c)`, without training | Menon et al., 2021, section 4.1 |
| `nearest_mean` | cosine to the mean of the class's normalised features | Mensink et al., 2013 |
| `linear` | softmax regression on instance sampling | |
| `balanced_softmax` | softmax regression with the Balanced Softmax loss | Ren et al., 2020 |
| `phase_b_official` | the adapter as the official code trains it: class-aware draws, ratio 0.2 | Ma et al., 2021 |
| `phase_b_root` | the adapter on draws by the root of the counts, with logit adjustment | |
| `phase_b_plain` | the adapter on the data as they are, with logit adjustment | |
| `phase_b` | the same with mixup of features: what `ballad train` uses for `lite` | |
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from ballad_hf.features.table import FeatureTable, adapted_logits
from ballad_hf.training.arguments import BalladTrainingArguments, PhaseBArguments
from ballad_hf.training.heads import HEADS, HeadFitting, HeadResult, LinearHead, fit_heads
from ballad_hf.training.losses import build_classification_loss
from ballad_hf.training.phase_b import AdapterTraining, TableBatches, adapter_start, phase_b_sampler
from ballad_hf.training.plan import JOINED, changed


ALL_HEADS = ("zero_shot", "logit_adjusted", "nearest_mean", "linear", "balanced_softmax", *HEADS)


@dataclass(frozen=True)
class AdapterHead:
    """The adapter of BALLAD before the class embeddings."""

    weight: torch.Tensor  # (dim, dim)
    class_embeds: torch.Tensor  # (classes, dim)
    ratio: float
    scale: float

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """Logits (n, classes) of features (n, dim)."""
        return adapted_logits(features, self.weight, self.ratio, self.class_embeds, self.scale)


class BenchmarkFitting(HeadFitting):
    """The heads of the table above, beside those of the package."""

    def zero_shot(self):
        yield {}, LinearHead(self.table.class_embeds, scale=self.table.logit_scale, cosine=True)

    def logit_adjusted(self):
        table = self.table
        counts = table.class_counts.double().clamp_min(1)  # (classes,); a class without an image counts as one
        log_prior = (counts / counts.sum()).log().float()
        for tau in (0.25, 0.5, 0.75, 1.0, 1.5, 2.0):
            bias = -tau * log_prior.to(table.class_embeds.device)
            yield {"tau": tau}, LinearHead(table.class_embeds, bias, scale=table.logit_scale, cosine=True)

    def nearest_mean(self):
        table = self.table
        sums = torch.zeros(table.classes, table.dim)
        for features, labels in table.batches():
            sums.index_add_(0, labels.cpu(), F.normalize(features[:, 0].float(), dim=1).cpu())
        # A class without a training row has no mean: its class embedding takes that place.
        absent = torch.bincount(table.labels.cpu(), minlength=table.classes) == 0
        sums[absent] = table.class_embeds.cpu()[absent]
        yield {}, LinearHead(sums, scale=table.logit_scale, cosine=True)

    def balanced_softmax(self):
        loss = build_classification_loss("balanced_softmax", self.table.class_counts)
        return self._softmax_regression(loss, balanced=False)

    def phase_b_official(self):
        return self._adapters([{}], PhaseBArguments(adapter_start="random"), scale=100.0)

    def phase_b_root(self):
        args = PhaseBArguments(loss="logit_adjustment", sampler="power", sampler_power=0.5)
        return self._adapters([{"learning_rate": rate} for rate in (0.2, 0.5, 2.0)], args)

    def phase_b_plain(self):
        args = PhaseBArguments(loss="logit_adjustment", sampler="power", sampler_power=1.0)
        return self._adapters([{"learning_rate": rate} for rate in (0.5, 2.0, 5.0)], args)

    def phase_b(self):
        return self._adapters([{}], changed(BalladTrainingArguments(), JOINED).phase_b)

    def _adapters(
        self, grid: Sequence[dict[str, Any]], args: PhaseBArguments, scale: float | None = None
    ) -> Iterator[tuple[dict[str, Any], AdapterHead]]:
        """Adapters after their last epoch, with the ratio 0.2 of the paper."""
        table, ratio, scale = self.table, 0.2, scale or self.table.logit_scale
        for settings in grid:
            own = replace(args, **settings)
            batches = TableBatches(
                table, phase_b_sampler(own, table.labels.numpy(), self.seed), own.rows_per_step(table.rows)
            )
            start = adapter_start(own.adapter_start, torch.eye(table.dim), self.seed)
            training = AdapterTraining(start, ratio, scale, batches, own, self.seed)
            for _ in range(own.epochs):
                training.train_epoch()
            yield settings, AdapterHead(training.weight.detach(), table.class_embeds, ratio, scale)


def compare_heads(
    table: FeatureTable, eval_table: FeatureTable, names: Sequence[str] = ALL_HEADS, *, epochs: int = 10, seed: int = 0
) -> dict[str, HeadResult]:
    """As `ballad_hf.training.heads.compare_heads`, with the heads of this file too."""
    return fit_heads(BenchmarkFitting(table, epochs, seed), eval_table, names)
