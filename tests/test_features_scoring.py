"""Logits and accuracies of adapters, against the model's own forward and against counting by hand."""

import pytest
import torch
import torch.nn.functional as F

from ballad_hf import FeatureTable
from ballad_hf.features.scoring import (
    GroupAccuracies,
    adapted_logits,
    adapter_accuracies,
    fold,
    moved_ratio_accuracies,
)


pytestmark = pytest.mark.numeric


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def table_of(views: int = 1) -> FeatureTable:
    return FeatureTable(
        random(40, views, 8), torch.arange(40) % 4, random(4, 8, seed=1), class_counts=[200, 50, 50, 3]
    )


def predictions_one_by_one(table: FeatureTable, weight: torch.Tensor, ratio: float) -> torch.Tensor:
    """Picture by picture and view by view, as the equation says."""
    chosen = []
    for views in table.features:
        logits = torch.zeros(table.classes)
        for feature in views:
            adapted = ratio * weight @ feature + (1 - ratio) * feature
            logits += torch.stack([F.cosine_similarity(adapted, embed, dim=0) for embed in table.class_embeds])
        chosen.append(logits.argmax())
    return torch.stack(chosen)


def test_logits_are_those_of_the_model(tiny_ballad):
    pixel_values = random(3, 3, 32, 32)
    with torch.no_grad():
        features = tiny_ballad.clip.get_image_features(pixel_values=pixel_values).pooler_output
        expected = tiny_ballad(pixel_values=pixel_values).logits
        logits = adapted_logits(
            features,
            tiny_ballad.adapter.linear.weight,
            tiny_ballad.config.adapter_ratio,
            tiny_ballad.class_embeds,
            tiny_ballad.logit_scale,
        )
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_a_stack_gives_what_each_adapter_gives_alone():
    features, weights, embeds = random(5, 8), random(3, 8, 8, seed=2), F.normalize(random(4, 8, seed=1), dim=1)
    ratios, scales = torch.tensor([0.0, 0.3, 1.0]), torch.tensor([1.0, 10.0, 100.0])
    together = adapted_logits(features, weights, ratios, embeds, scales)
    for index in range(3):
        alone = adapted_logits(features, weights[index], float(ratios[index]), embeds, float(scales[index]))
        torch.testing.assert_close(together[index], alone, rtol=1e-5, atol=1e-4)  # cosines to 1e-6, times 100


def test_fold_is_the_identity_at_ratio_zero_and_the_matrix_at_one():
    weight = random(4, 4)
    torch.testing.assert_close(fold(weight, 0.0), torch.eye(4))
    torch.testing.assert_close(fold(weight, 1.0), weight)


@pytest.mark.parametrize("views", [1, 3])
def test_accuracies_are_those_of_counting(views):
    table, weights, ratios = table_of(views), random(2, 8, 8, seed=3), [0.4, 1.0]
    scored = adapter_accuracies(table, weights, torch.tensor(ratios))
    for index, ratio in enumerate(ratios):
        right = predictions_one_by_one(table, weights[index], ratio) == table.labels
        by_class = [right[table.labels == label].float().mean() for label in range(4)]
        expected = {
            "overall": right.float().mean(),
            "mean_class": torch.stack(by_class).mean(),
            "many": by_class[0],
            "medium": (by_class[1] + by_class[2]) / 2,
            "few": by_class[3],
        }
        assert scored.of(index) == pytest.approx({name: float(value) for name, value in expected.items()})


@pytest.mark.parametrize("views", [1, 3])
def test_a_ratio_that_is_moved_scores_as_the_adapter_at_that_ratio(views):
    table, weight = table_of(views), random(8, 8, seed=3)
    ratios = [0.0, 0.15, 0.5, 1.0]
    moved = moved_ratio_accuracies(table, weight, ratios)
    for index, ratio in enumerate(ratios):
        assert moved.of(index) == pytest.approx(adapter_accuracies(table, weight, ratio).of())


def test_a_group_without_a_class_is_absent_and_a_class_without_rows_does_not_count():
    scored = GroupAccuracies.from_correct(
        torch.tensor([[3, 0, 1]]), torch.tensor([4, 0, 2]), torch.tensor([500, 300, 30])
    ).of()
    assert scored == {"overall": 4 / 6, "mean_class": (3 / 4 + 1 / 2) / 2, "many": 3 / 4, "medium": 1 / 2, "few": None}
