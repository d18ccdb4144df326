"""The prior correction against Bayes' rule, worked out by hand, and the estimate against a known mixture."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ballad_hf.models.prior import estimate_prior, prior_shift, resolve_prior


pytestmark = pytest.mark.numeric


def test_names_and_powers_of_the_counts():
    assert resolve_prior("uniform", 4, None).tolist() == [0.25] * 4
    # 16, 4 and an empty class, which counts as one image: 21 in all.
    assert resolve_prior("train", 3, [16, 4, 0]).tolist() == pytest.approx([16 / 21, 4 / 21, 1 / 21])
    # Square roots 4, 2, 1; and the other way round for -0.5: 1/4, 1/2, 1.
    assert resolve_prior(0.5, 3, [16, 4, 1]).tolist() == pytest.approx([4 / 7, 2 / 7, 1 / 7])
    assert resolve_prior(-0.5, 3, [16, 4, 1]).tolist() == pytest.approx([1 / 7, 2 / 7, 4 / 7])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0.01, 10), min_size=2, max_size=6), st.integers(0, 1000))
def test_the_shift_is_bayes_rule(weights, seed):
    generator = np.random.default_rng(seed)
    likelihood = generator.uniform(0.1, 1, len(weights))
    target = np.array(weights) / np.sum(weights)
    logits = torch.from_numpy(np.log(likelihood / likelihood.sum()))  # right under the uniform prior
    shifted = torch.softmax(logits + prior_shift(weights, len(weights)), dim=0)
    expected = likelihood * target / (likelihood * target).sum()
    np.testing.assert_allclose(shifted.numpy(), expected, rtol=1e-4)


def test_to_the_source_and_back_is_no_shift():
    assert prior_shift("train", 3, [9, 3, 1], source_prior="train").tolist() == [0.0, 0.0, 0.0]
    there = prior_shift("train", 3, [9, 3, 1]) + prior_shift("uniform", 3, [9, 3, 1], source_prior="train")
    assert there.tolist() == pytest.approx([0.0] * 3, abs=1e-6)


def test_the_estimate_finds_the_mixture_that_made_the_images():
    # One measurement an image, from N(0, 1) or N(1.5, 1): the logits are the two log densities.
    generator = np.random.default_rng(0)
    share = 0.85
    kinds = generator.random(20_000) >= share
    values = generator.normal(1.5 * kinds, 1.0)
    logits = torch.from_numpy(np.stack([-(values**2) / 2, -((values - 1.5) ** 2) / 2], axis=1))
    assert estimate_prior(logits).tolist() == pytest.approx([share, 1 - share], abs=0.02)
    # Counting predictions instead is far off, so the test tells the two apart.
    assert abs((logits[:, 0] > logits[:, 1]).double().mean().item() - share) > 0.05
    # The same images through logits that are right under another prior.
    tilted = logits + torch.tensor([math.log(0.3), math.log(0.7)])
    assert estimate_prior(tilted, torch.tensor([0.3, 0.7])).tolist() == pytest.approx([share, 1 - share], abs=0.02)


@pytest.mark.parametrize(
    ("prior", "counts", "says"),
    [
        ("often", None, "choose 'uniform'"),
        ("train", None, "has no training counts"),
        (float("nan"), [1, 2, 3], "finite number"),
        ([1, 2], None, "one weight a class"),
        ([1, 0, 2], None, r"classes \[1\]"),
        ("train", [1, 2], "2 training counts for 3"),
    ],
)
def test_bad_priors_are_refused(prior, counts, says):
    with pytest.raises(ValueError, match=says):
        resolve_prior(prior, 3, counts)


def test_bad_logits_are_refused():
    with pytest.raises(ValueError, match="one image or more"):
        estimate_prior(torch.zeros(0, 3))
    with pytest.raises(ValueError, match="not finite"):
        estimate_prior(torch.tensor([[0.0, float("nan")]]))
