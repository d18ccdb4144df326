"""Losses against values worked out by hand and against independent formulas."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ballad_hf.data.samplers import PowerSampler
from ballad_hf.training.losses import CLASSIFICATION_LOSSES, build_classification_loss, contrastive_loss


pytestmark = pytest.mark.numeric

COUNTS = [100, 20, 5]


def random_batch(seed=0, batch=6, classes=3):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(batch, classes, generator=generator)
    labels = torch.randint(classes, (batch,), generator=generator)
    return logits, labels


def naive_contrastive(image_embeds, text_embeds_of_pairs, labels, scale):
    """The paper's double sum, pair by pair, with one text for every image."""
    scores = scale * image_embeds @ text_embeds_of_pairs.T
    total = 0.0
    for matrix in (scores, scores.T):
        for i in range(len(labels)):
            positives = [p for p in range(len(labels)) if labels[p] == labels[i]]
            denominator = sum(math.exp(matrix[i, j]) for j in range(len(labels)))
            total -= sum(math.log(math.exp(matrix[i, p]) / denominator) for p in positives) / len(positives)
    return total / (2 * len(labels))


@settings(max_examples=30, deadline=None)
@given(labels=st.lists(st.integers(0, 4), min_size=1, max_size=9), seed=st.integers(0, 1000))
def test_contrastive_equals_the_sum_over_all_pairs(labels, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.tensor(labels)
    images = F.normalize(torch.randn(len(labels), 8, generator=generator), dim=-1)
    texts = F.normalize(torch.randn(5, 8, generator=generator), dim=-1)
    present = labels.unique()
    ours = contrastive_loss(7.0 * images @ texts[present].T, labels, present)
    assert ours.item() == pytest.approx(naive_contrastive(images, texts[labels], labels, 7.0), rel=1e-5, abs=1e-5)


def test_contrastive_does_not_push_images_of_one_class_apart():
    # All of one class: each of 4 texts is a positive, so the best possible loss is ln 4 and no gradient is left.
    similarity = torch.full((4, 1), 2.0, requires_grad=True)
    loss = contrastive_loss(similarity, torch.zeros(4, dtype=torch.long), torch.tensor([0]))
    loss.backward()
    assert loss.item() == pytest.approx(math.log(4), abs=1e-5)
    assert similarity.grad.abs().max() < 1e-6


def test_contrastive_is_float32_under_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = contrastive_loss(torch.zeros(2, 2, dtype=torch.bfloat16), torch.tensor([0, 1]), torch.tensor([0, 1]))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(math.log(2), abs=1e-5)


def test_cross_entropy_with_smoothing_is_torchs():
    logits, labels = random_batch()
    ours = build_classification_loss("cross_entropy", label_smoothing=0.2)(logits, labels)
    torch.testing.assert_close(ours, F.cross_entropy(logits, labels, label_smoothing=0.2))


def test_focal_by_hand():
    # p = 1/4 for the right class: -(3/4)^2 ln(1/4).
    logits = torch.log(torch.tensor([[0.25, 0.5, 0.25]]))
    loss = build_classification_loss("focal", focal_gamma=2.0)(logits, torch.tensor([0]))
    assert loss.item() == pytest.approx(0.5625 * math.log(4), rel=1e-5)


def test_ldam_by_hand():
    # Counts 16 and 1: n^(-1/4) is 1/2 and 1, so margins of 0.25 and 0.5 on the cosine, 2.5 and 5 on the logits.
    loss = build_classification_loss("ldam", [16, 1], ldam_max_margin=0.5, ldam_scale=10.0)
    head, tail = loss(torch.zeros(2, 2), torch.tensor([0, 1]), reduction="none").tolist()
    assert head == pytest.approx(math.log(1 + math.exp(2.5)), rel=1e-5)
    assert tail == pytest.approx(math.log(1 + math.exp(5)), rel=1e-5)


def test_class_balanced_by_hand():
    # beta 1/2, counts 1 and 2: weights 1 and 2/3. Their mean over the draws is 1/3 * 1 + 2/3 * 2/3 = 7/9.
    loss = build_classification_loss("class_balanced", [1, 2], class_balanced_beta=0.5)
    losses = loss(torch.zeros(2, 2), torch.tensor([0, 1]), reduction="none")
    assert losses.tolist() == pytest.approx([9 / 7 * math.log(2), 6 / 7 * math.log(2)], rel=1e-5)


def test_generalized_reweight_by_hand():
    # Counts 1 and 4 with exponent 1/2: sqrt(5) and sqrt(5)/2. Their mean over the draws is 3/5 sqrt(5).
    loss = build_classification_loss("generalized_reweight", [1, 4], reweight_exponent=0.5)
    losses = loss(torch.zeros(2, 2), torch.tensor([0, 1]), reduction="none")
    assert losses.tolist() == pytest.approx([5 / 3 * math.log(2), 5 / 6 * math.log(2)], rel=1e-5)


@pytest.mark.parametrize("name", ["class_balanced", "generalized_reweight"])
@pytest.mark.parametrize("distribution", [None, [0.5, 0.3, 0.2], [0, 1, 1]])
def test_weights_have_a_mean_of_one_over_what_the_sampler_draws(name, distribution):
    loss = build_classification_loss(name, COUNTS, class_distribution=distribution)
    weights = loss(torch.zeros(3, 3), torch.arange(3), reduction="none") / math.log(3)  # flat logits
    shares = torch.tensor(COUNTS if distribution is None else distribution, dtype=torch.float32)
    assert (weights @ (shares / shares.sum())).item() == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("name", ["class_balanced", "generalized_reweight", "balanced_softmax", "logit_adjustment"])
def test_balanced_draws_leave_plain_cross_entropy(name):
    logits, labels = random_batch()
    loss = build_classification_loss(name, COUNTS, class_distribution=[1, 1, 1])
    torch.testing.assert_close(loss(logits, labels), F.cross_entropy(logits, labels))


def test_adjustment_after_root_sampling_is_by_the_roots():
    # Counts 16 and 1 drawn by their roots: shares 4/5 and 1/5.
    distribution = PowerSampler([0] * 16 + [1], power=0.5).class_distribution(2)
    for name in ("balanced_softmax", "logit_adjustment"):
        loss = build_classification_loss(name, [16, 1], class_distribution=distribution)
        losses = loss(torch.zeros(2, 2), torch.tensor([0, 1]), reduction="none").tolist()
        assert losses == pytest.approx([-math.log(0.8), -math.log(0.2)], rel=1e-5)


def test_margins_follow_the_training_images_whatever_is_drawn():
    logits, labels = random_batch()
    drawn = build_classification_loss("ldam", COUNTS, class_distribution=[1, 1, 1])
    torch.testing.assert_close(drawn(logits, labels), build_classification_loss("ldam", COUNTS)(logits, labels))


def test_balanced_softmax_is_a_softmax_weighted_by_counts():
    logits, labels = random_batch()
    weighted = logits.double().exp() * torch.tensor(COUNTS)
    expected = -(weighted.gather(1, labels[:, None])[:, 0] / weighted.sum(1)).log()
    ours = build_classification_loss("balanced_softmax", COUNTS)(logits, labels, reduction="none")
    torch.testing.assert_close(ours, expected.float())


def test_logit_adjustment_of_strength_one_is_balanced_softmax_and_of_zero_is_cross_entropy():
    logits, labels = random_batch()
    torch.testing.assert_close(
        build_classification_loss("logit_adjustment", COUNTS)(logits, labels),
        build_classification_loss("balanced_softmax", COUNTS)(logits, labels),
    )
    torch.testing.assert_close(
        build_classification_loss("logit_adjustment", COUNTS, adjustment_strength=0.0)(logits, labels),
        F.cross_entropy(logits, labels),
    )
    # tau = 2, flat logits: p(c)^2 / sum p^2 = 400 / (10000 + 400 + 25) for the second class.
    loss = build_classification_loss("logit_adjustment", COUNTS, adjustment_strength=2.0)
    assert loss(torch.zeros(1, 3), torch.tensor([1])).item() == pytest.approx(-math.log(400 / 10425), rel=1e-5)


def test_lade_against_its_equations_class_by_class():
    logits, labels = random_batch(seed=3)
    labels[labels == 2] = 0  # the authors keep a class that is absent from the batch, with a mean logit of 0
    prior = [count / sum(COUNTS) for count in COUNTS]
    regularizer = 0.0
    for c in range(3):
        own = [logits[i, c].item() for i in range(len(labels)) if labels[i] == c]
        partition = sum(1 / 3 / prior[c] * math.exp(logits[i, c]) for i in range(len(labels))) / len(labels)
        log_partition = math.log(partition)
        mean_logit = sum(own) / len(own) if own else 0.0
        regularizer += prior[c] * (-mean_logit + log_partition + 0.1 * log_partition**2)
    softmax_part = F.cross_entropy(logits + torch.tensor(prior).log(), labels).item()
    ours = build_classification_loss("lade", COUNTS, lade_weight=0.3)(logits, labels)
    assert ours.item() == pytest.approx(softmax_part + 0.3 * regularizer, rel=1e-5)
    drawn = build_classification_loss("lade", [1, 1, 1], class_distribution=COUNTS, lade_weight=0.3)
    torch.testing.assert_close(drawn(logits, labels), ours)


@pytest.mark.parametrize("name", CLASSIFICATION_LOSSES)
def test_losses_are_float32_under_autocast_and_finite_for_a_class_without_images(name):
    logits, labels = random_batch()
    loss = build_classification_loss(name, [100, 20, 0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(logits.bfloat16(), labels)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(logits.bfloat16().float(), labels), rtol=0, atol=0)
    assert value.isfinite()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "hinge"}, "'hinge': choose one of cross_entropy, focal"),
        ({"name": "cross_entropy", "label_smoothing": 1.0}, "label_smoothing is 1.0"),
        ({"name": "focal", "label_smoothing": 0.1}, "label_smoothing=0"),
        ({"name": "lade", "class_counts": [0, 0]}, "class_counts is 0 for every class"),
        ({"name": "lade", "class_counts": [3, 1], "class_distribution": [0.2, 0.3, 0.5]}, r"shape \(3,\), but .* 2"),
        ({"name": "lade", "class_counts": [3, 1], "class_distribution": [1.5, -0.5]}, r"class_distribution .*\[1\]"),
        ({"name": "ldam"}, "'ldam' needs class_counts"),
        ({"name": "lade", "class_counts": [3, -1]}, r"classes \[1\]"),
        ({"name": "lade", "class_counts": [[3, 1]]}, r"shape \(1, 2\)"),
        ({"name": "class_balanced", "class_counts": [1, 2], "class_balanced_beta": 1.0}, "class_balanced_beta is 1.0"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        build_classification_loss(**arguments)
