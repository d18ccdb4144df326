"""The cache: what was built is found, what is damaged or foreign is not served, and nothing outside is touched."""

import errno
import json
import os
import shutil
from dataclasses import dataclass

import pytest
import torch

from ballad_hf import BalladForImageClassification
from ballad_hf.features.cache import FeatureCache, encoder_fingerprint, preprocessing_fingerprint
from ballad_hf.features.shards import MANIFEST, ShardPlan, StoredTable


PLAN = ShardPlan.of(4, 8, torch.float32, vectors_per_shard=2)


@pytest.fixture
def cache(tmp_path) -> FeatureCache:
    return FeatureCache(tmp_path / "cache")


@pytest.fixture
def entry(cache) -> StoredTable:
    return cache.entry(PLAN, {"encoder": "a"})


def fill(stored: StoredTable) -> None:
    for shard in range(PLAN.shards):
        stored.write_shard(shard, torch.full((2, 8), float(shard)))
    stored.write_head({"offsets": torch.arange(5)})
    stored.finish()


def add(cache: FeatureCache, entry: StoredTable) -> None:
    with cache.build(entry) as partial:
        fill(partial)


def missing(cache: FeatureCache, entry: StoredTable) -> list[int]:
    """The shards that a run would compute; it completes the entry."""
    with cache.build(entry) as partial:
        shards = partial.missing_shards()
        fill(partial)
    return shards


def test_what_was_built_is_found(cache, entry):
    assert not cache.find(entry)
    add(cache, entry)
    assert cache.find(entry)
    assert not cache.find(cache.entry(PLAN, {"encoder": "b"}))


def test_a_failed_build_is_resumed(cache, entry):
    with pytest.raises(RuntimeError, match="stop"), cache.build(entry) as partial:  # noqa: PT012
        partial.write_shard(0, torch.zeros(2, 8))
        raise RuntimeError("stop")
    assert not cache.find(entry)
    assert missing(cache, entry) == [1]
    assert cache.find(entry)


def test_leftovers_of_a_killed_run_are_removed_by_the_next(cache, entry):
    with pytest.raises(RuntimeError), cache.build(entry) as partial:
        raise RuntimeError
    (partial.folder / ".shard-00000.safetensors.writing").write_bytes(b"half")
    add(cache, entry)
    assert sorted(path.name for path in entry.folder.iterdir()) == [
        "head.safetensors",
        MANIFEST,
        "shard-00000.safetensors",
        "shard-00001.safetensors",
    ]


def test_another_run_may_have_been_faster(cache, entry):
    add(cache, entry)
    with cache.build(entry) as partial:
        assert partial is None
    assert cache.find(entry)


@pytest.mark.parametrize("damage", ["byte", "missing", "cut", "manifest", "no manifest"])
def test_damage_is_found_and_intact_shards_stay(cache, entry, damage):
    add(cache, entry)
    shard = entry.folder / PLAN.file_name(1)
    if damage == "byte":
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        shard.write_bytes(content)
    elif damage == "missing":
        shard.unlink()
    elif damage == "cut":
        shard.write_bytes(shard.read_bytes()[:-4])
    elif damage == "manifest":
        (entry.folder / MANIFEST).write_text("{")
    else:
        (entry.folder / MANIFEST).unlink()
    assert not cache.find(entry)
    assert missing(cache, entry) == ([] if "manifest" in damage else [1])
    assert cache.find(entry)


def test_entries_swapped_between_two_models_are_not_served(cache, entry):
    other = cache.entry(PLAN, {"encoder": "b"})
    add(cache, entry)
    add(cache, other)
    aside = cache.folder / "aside"
    entry.folder.rename(aside)
    other.folder.rename(entry.folder)
    aside.rename(other.folder)
    assert not cache.find(entry)
    assert not cache.find(other)
    assert missing(cache, entry) == [0, 1]
    assert cache.find(entry)


def test_a_manifest_that_names_other_files_deletes_none(cache, entry, tmp_path):
    victims = [tmp_path / "victim", cache.folder / "victim"]
    add(cache, entry)
    for victim in victims:
        victim.write_text("mine")
    manifest = json.loads((entry.folder / MANIFEST).read_text())
    names = ["../../victim", "../victim", str(victims[0])]
    manifest["files"] = {name: {"bytes": 1, "sha256": ""} for name in names}
    manifest["plan"]["vectors"] = 5
    (entry.folder / MANIFEST).write_text(json.dumps(manifest))
    assert not cache.find(entry)
    missing(cache, entry)
    assert [victim.read_text() for victim in victims] == ["mine", "mine"]


@pytest.mark.parametrize("place", ["", ".partial", ".lock"])
def test_links_in_the_cache_are_refused_and_not_followed(cache, entry, tmp_path, place):
    cache.folder.mkdir()
    target = tmp_path / "target"
    target.mkdir()
    (target / MANIFEST).write_text("mine")
    link = entry.folder.with_name(entry.folder.name + place)
    link.symlink_to(target / MANIFEST if place == ".lock" else target)
    with pytest.raises(ValueError, match="is a symbolic link, which is not followed: remove it"), cache.build(entry):
        pass
    assert (target / MANIFEST).read_text() == "mine"


def test_an_open_table_outlives_its_entry(cache, entry):
    add(cache, entry)
    _, second = entry.read_shards()
    shutil.rmtree(cache.folder)
    assert torch.equal(second, torch.ones(2, 8))


def test_a_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="is a file: name a folder"):
        FeatureCache(tmp_path / "file")
    below = FeatureCache(tmp_path / "file" / "below")
    with pytest.raises(NotADirectoryError), below.build(below.entry(PLAN, {})):
        pass


@pytest.mark.parametrize("how", ["by its mode", "by the file system"])
def test_a_folder_that_can_not_be_written_is_refused(cache, entry, monkeypatch, how):
    if how == "by its mode":  # root may write everywhere, so the answer is made up
        monkeypatch.setattr(os, "access", lambda *args: False)
    else:

        def read_only(*args, **kwargs):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

        monkeypatch.setattr("pathlib.Path.mkdir", read_only)
    with pytest.raises(PermissionError, match="can't be written: choose another cache_dir"), cache.build(entry):
        pass


def test_too_little_space_is_found_before_anything_is_computed(cache, entry, monkeypatch):
    add(cache, entry)
    usage = shutil.disk_usage(cache.folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
    refused = pytest.raises(
        OSError, match=r"No space .* are needed and 0.0 MiB are free\. Complete entries are intact"
    )
    with refused, cache.build(cache.entry(PLAN, {"encoder": "b"})):
        raise AssertionError("There is no space to build in.")
    assert cache.find(entry)


def test_a_disk_that_fills_up_leaves_the_entries_alone(cache, entry):
    add(cache, entry)
    other = cache.entry(PLAN, {"encoder": "b"})
    with pytest.raises(OSError, match="computed shards are kept in") as error, cache.build(other):
        raise OSError(errno.ENOSPC, "full")
    assert error.value.errno == errno.ENOSPC
    assert cache.find(entry)


@torch.no_grad()
def test_the_encoder_fingerprint_covers_every_image_weight_and_no_other(tiny_ballad):
    before = encoder_fingerprint(tiny_ballad)
    for name, parameter in tiny_ballad.named_parameters():
        kept = parameter.clone()
        parameter.view(-1)[-1] += 0.5
        changed = encoder_fingerprint(tiny_ballad) != before
        assert changed == ("clip.vision" in name or "clip.visual" in name), name
        parameter.copy_(kept)
    assert encoder_fingerprint(tiny_ballad) == before


def test_saving_keeps_the_fingerprint_and_another_dtype_does_not(tiny_ballad, tmp_path):
    tiny_ballad.save_pretrained(tmp_path)
    again = BalladForImageClassification.from_pretrained(tmp_path)
    assert encoder_fingerprint(again) == encoder_fingerprint(tiny_ballad)
    assert encoder_fingerprint(again.bfloat16()) != encoder_fingerprint(tiny_ballad)


def test_the_encoder_fingerprint_covers_the_config(tiny_ballad):
    before = encoder_fingerprint(tiny_ballad)
    tiny_ballad.config.clip_config.vision_config.hidden_act = "gelu"
    assert encoder_fingerprint(tiny_ballad) != before


def test_the_encoder_fingerprint_ignores_adapter_and_class_names(tiny_ballad, tiny_clip):
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


class WithFingerprint:
    def __init__(self, text):
        self.text = text

    def fingerprint(self):
        return self.text


def test_transforms_differ_by_class_and_by_value():
    prints = [
        preprocessing_fingerprint(each)
        for each in (Crop(), Crop(0.6), Zoom(), WithFingerprint("a"), WithFingerprint("b"))
    ]
    assert len(set(prints)) == 5
    assert preprocessing_fingerprint(Crop(0.5)) == prints[0]


@pytest.mark.parametrize("transform", [lambda image, rng: image, Crop])
def test_transforms_without_a_fingerprint_are_refused(transform):
    with pytest.raises(ValueError, match="make it a dataclass, give it a `fingerprint"):
        preprocessing_fingerprint(transform)
