"""benchmarks/phase_a.py: what it calls naive is the same update, and what it counts is what there is to count."""

import importlib
from pathlib import Path

import pytest
import torch


pytestmark = pytest.mark.numeric


@pytest.fixture
def phase_a(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    return importlib.import_module("phase_a")


@pytest.fixture
def tiny(phase_a):
    return phase_a.Size(32, 32, 32, 1, 16, patch_size=8)


@pytest.mark.parametrize("resnet", [False, True])
def test_the_naive_step_and_ours_are_the_same_update(phase_a, tiny, resnet):
    """77 tokens against 11 change no weight by more than rounding: three steps, both kinds of towers."""
    size = phase_a.Size(32, 4, 32, 1, 16, depths=(1, 1, 1, 1)) if resnet else tiny
    case = phase_a.Case(size, classes=12, batch_size=8, device="cpu")
    naive, ours = phase_a.naive_step(case), phase_a.our_step(case, phase_a.Way("ours", "class_prompt"))
    for number in range(3):
        labels = phase_a.draw_labels(case, number)
        assert ours(labels) == pytest.approx(naive(labels), rel=1e-4)
    expected = naive.clip.state_dict()
    for name, value in ours.clip.state_dict().items():
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=1e-5)


def test_names_are_different_and_prompts_short(phase_a):
    names = phase_a.class_names(8142)
    assert len(set(names)) == 8142
    assert {len(name.split()) for name in names} == {2, 3, 4}


def test_labels_of_a_step_are_the_same_for_every_way_and_long_tailed(phase_a, tiny):
    case = phase_a.Case(tiny, classes=20, batch_size=4000, device="cpu")
    labels = phase_a.draw_labels(case, 1)
    assert torch.equal(labels, phase_a.draw_labels(case, 1))
    assert not torch.equal(labels, phase_a.draw_labels(case, 2))
    counts = labels.bincount(minlength=20)
    assert counts[0] > 10 * counts[-1]


def test_arithmetic_by_hand(phase_a, tiny):
    """Multiply-adds count as two; a layer has 12 w^2 weights a token, and attention 2 n w a token."""
    width, patches = 32, 16
    tokens = patches + 1
    layer = tokens * 2 * (12 * width**2 + 2 * tokens * width)
    image = patches * 2 * width * 3 * 8**2 + layer + 2 * width * 16
    assert phase_a.training_flops(tiny, images=5, prompts=0, length=0) == 3 * 5 * image
    prompt = 77 * 2 * (12 * width**2 + 2 * 77 * width)
    assert phase_a.training_flops(tiny, images=0, prompts=7, length=77) == 3 * 7 * prompt


@pytest.mark.slow
def test_a_way_is_measured_in_a_process_of_its_own(phase_a, tiny):
    case = phase_a.Case(tiny, classes=40, batch_size=4, device="cpu")
    found = phase_a.measure(case, [phase_a.Way("naive")], steps=1)
    assert found["naive"]["first_loss"] == pytest.approx(
        phase_a.naive_step(case)(phase_a.draw_labels(case, 0)), rel=1e-4
    )
    assert found["naive"]["seconds"] > 0
    assert found["naive"]["bytes"] > 40 * 77 * 32 * 4  # one activation of the prompts


def test_ratios_are_those_to_the_naive_way(phase_a, tiny):
    case = phase_a.Case(tiny, classes=40, batch_size=4, device="cpu")
    ways = [phase_a.Way("naive"), phase_a.Way("ours", "class_prompt")]
    found = {
        "naive": {"seconds": 3.0, "bytes": 8e6, "first_loss": 1.0},
        "ours": {"seconds": 0.5, "bytes": 2e6, "first_loss": 1.0},
    }
    first, second = phase_a.rows_of(case, "tiny", ways, found)
    assert first["times_faster"] == first["times_less_memory"] == first["times_less_arithmetic"] == 1
    assert (second["times_faster"], second["times_less_memory"]) == (6, 4)
    assert second["times_less_arithmetic"] > 1
    assert "| tiny | 40 | ours | 0.500 | 6.0 | 2 | 4.0 |" in phase_a.show([first, second])
    gone = phase_a.rows_of(case, "tiny", ways, {**found, "naive": {"out_of_memory": True}})
    assert "out of memory" in phase_a.show(gone)


def test_counting_runs_nothing(phase_a, capsys):
    phase_a.main(["--count", "--size", "vit_b16", "--classes", "1000", "--device", "cpu"])
    *_, naive, class_prompt, contrastive = capsys.readouterr().out.splitlines()
    assert naive.endswith("| 1.0 |")
    # 17.5 billion multiply-adds an image and 3 a prompt, as published: 3 * 2 * (128 * 17.5 + 1000 * 3) / 1000
    assert float(naive.split("|")[4]) == pytest.approx(31.4, rel=0.02)
    assert float(class_prompt.split("|")[5]) < float(contrastive.split("|")[5])


def test_the_share_of_a_rate_is_that_of_the_image_tower(phase_a, tiny, monkeypatch):
    case = phase_a.Case(tiny, classes=1, batch_size=2, device="cpu")
    assert phase_a.matmul_rate("cpu", side=64, repeats=2) > 0
    monkeypatch.setattr(phase_a, "timed", lambda step, device, repeats: step() or 2.0)
    share = phase_a.utilisation(case, rate=1e9, compiled=False)
    assert share == phase_a.training_flops(tiny, 2, 0, 0) / 2 / 1e9
