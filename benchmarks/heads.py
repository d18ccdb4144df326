"""Heads that the benchmarks compare with phase B, beside those that the package offers.

| name | head | source |
|---|---|---|
| `zero_shot` | the class embeddings | Radford et al., 2021 |
| `logit_adjusted` | `zero_shot` minus `tau log p(c)`, without training | Menon et al., 2021, section 4.1 |
| `nearest_mean` | cosine to the mean of the class's normalised features | Mensink et al., 2013 |
| `linear` | softmax regression on instance sampling | |
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ballad_hf.features.table import FeatureTable
from ballad_hf.training.heads import HEADS, HeadFitting, HeadResult, LinearHead, fit_heads


ALL_HEADS = ("zero_shot", "logit_adjusted", "nearest_mean", "linear", *HEADS)


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


def compare_heads(
    table: FeatureTable, eval_table: FeatureTable, names: Sequence[str] = ALL_HEADS, *, epochs: int = 10, seed: int = 0
) -> dict[str, HeadResult]:
    """As `ballad_hf.training.heads.compare_heads`, with the heads of this file too."""
    return fit_heads(BenchmarkFitting(table, epochs, seed), eval_table, names)
