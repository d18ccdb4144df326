"""Fingerprints: one change to what a feature depends on, another print; anything else, the same."""

from dataclasses import dataclass

import pytest
import torch

from ballad_hf import BalladForImageClassification
from ballad_hf.features.fingerprints import digest_of, encoder_fingerprint, preprocessing_fingerprint


@torch.no_grad()
def test_every_image_weight_counts_and_no_other(tiny_ballad):
    before = encoder_fingerprint(tiny_ballad)
    for name, parameter in tiny_ballad.named_parameters():
        kept = parameter.clone()
        parameter.view(-1)[-1] += 0.5
        changed = encoder_fingerprint(tiny_ballad) != before
        assert changed == ("clip.vision" in name or "clip.visual" in name), name
        parameter.copy_(kept)
    assert encoder_fingerprint(tiny_ballad) == before


def test_it_survives_saving_and_tells_dtypes_apart(tiny_ballad, tmp_path):
    tiny_ballad.save_pretrained(tmp_path)
    again = BalladForImageClassification.from_pretrained(tmp_path)
    assert encoder_fingerprint(again) == encoder_fingerprint(tiny_ballad)
    assert encoder_fingerprint(again.bfloat16()) != encoder_fingerprint(tiny_ballad)


def test_a_value_of_the_config_counts(tiny_ballad):
    before = encoder_fingerprint(tiny_ballad)
    tiny_ballad.config.clip_config.vision_config.hidden_act = "gelu"
    assert encoder_fingerprint(tiny_ballad) != before


def test_adapter_and_class_names_do_not_count(tiny_ballad, tiny_clip):
    before = encoder_fingerprint(tiny_ballad)
    tiny_ballad.config.adapter_ratio = 0.9
    tiny_ballad.set_class_names(["a", "b"], tiny_clip.tokenizer)
    assert encoder_fingerprint(tiny_ballad) == before


@dataclass(frozen=True)
class Crop:
    scale: float = 0.5


@dataclass(frozen=True)
class Zoom:
    scale: float = 0.5


class Told:
    def __init__(self, text):
        self.text = text

    def fingerprint(self):
        return self.text


def test_transforms_differ_by_class_and_by_value():
    prints = [preprocessing_fingerprint(each) for each in (Crop(), Crop(0.6), Zoom(), Told("a"), Told("b"))]
    assert len(set(prints)) == 5
    assert preprocessing_fingerprint(Crop(0.5)) == prints[0]


@pytest.mark.parametrize("transform", [lambda picture, rng: picture, Crop])
def test_transforms_that_can_not_be_told_apart_are_refused(transform):
    with pytest.raises(ValueError, match="make it a dataclass, give it a `fingerprint"):
        preprocessing_fingerprint(transform)


def test_the_order_of_names_does_not_count():
    assert digest_of({"a": 1, "b": 2}) == digest_of({"b": 2, "a": 1}) != digest_of({"a": 2, "b": 1})
