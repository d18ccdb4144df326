"""Tables on disk are whole or not there; the cache finds what was built, and serves nothing damaged or foreign."""

import errno
import json
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ballad_hf import BalladForImageClassification
from ballad_hf.features.cache import (
    HEAD,
    MANIFEST,
    DamagedTableError,
    FeatureCache,
    ShardPlan,
    StoredTable,
    digest_of,
    encoder_fingerprint,
    preprocessing_fingerprint,
)


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


TEN_VECTORS = ShardPlan.of(10, 4, torch.float32, vectors_per_shard=4)
PARTS = [torch.arange(4.0 * rows).view(rows, 4) + rows for rows in (4, 4, 2)]


@pytest.fixture
def stored(tmp_path) -> StoredTable:
    return StoredTable(tmp_path / "table", TEN_VECTORS, {"encoder": "x"})


def write_all(stored: StoredTable) -> None:
    stored.folder.mkdir(exist_ok=True)
    for shard in (2, 0, 1):  # as several processes may write them
        stored.write_shard(shard, PARTS[shard])
    stored.write_head({"labels": torch.arange(10)})
    stored.finish()


@given(st.integers(1, 10_000_000), st.one_of(st.none(), st.integers(10_000, 10**7)), st.integers(1, 12))
def test_spans_follow_one_another_and_end_with_the_vectors(vectors, vectors_per_shard, multiple_of):
    plan = ShardPlan.of(vectors, 1024, torch.bfloat16, vectors_per_shard, multiple_of)
    spans = [plan.span(number) for number in range(plan.shards)]
    assert spans[0].start == 0
    assert spans[-1].stop == vectors
    assert all(before.stop == after.start for before, after in zip(spans, spans[1:], strict=False))
    assert min(map(len, spans)) > 0
    assert plan.shards <= 1024
    assert plan.nbytes == vectors * 1024 * 2
    assert vectors_per_shard is not None or plan.vectors_per_shard % multiple_of == 0


def test_shards_come_back_in_order(stored):
    write_all(stored)
    opened = StoredTable.open(stored.folder)
    assert opened == stored
    opened.verify()
    for shard, part in zip(opened.read_shards(), PARTS, strict=True):
        assert torch.equal(shard, part)
    assert opened.read_head()["labels"].tolist() == list(range(10))


def test_shards_that_do_not_fit_the_plan_are_missing(stored):
    stored.folder.mkdir()
    assert stored.missing_shards() == [0, 1, 2]
    stored.write_shard(0, PARTS[0])
    stored.write_shard(1, PARTS[1][:3])  # a vector short
    stored.write_shard(2, PARTS[2].half())
    assert stored.missing_shards() == [1, 2]
    (stored.folder / TEN_VECTORS.file_name(0)).write_bytes(b"junk")
    assert stored.missing_shards() == [0, 1, 2]


@pytest.mark.parametrize("foreign", ["another model", "another place", "without metadata"])
def test_a_foreign_shard_of_the_right_shape_is_refused(stored, tmp_path, foreign):
    write_all(stored)
    victim = stored.folder / TEN_VECTORS.file_name(1)
    if foreign == "another model":
        other = replace(stored, folder=tmp_path / "other", provenance={"encoder": "y"})
        write_all(other)
        shutil.copy(other.folder / TEN_VECTORS.file_name(1), victim)
    elif foreign == "another place":
        shutil.copy(stored.folder / TEN_VECTORS.file_name(0), victim)
    else:
        from safetensors.torch import save_file

        save_file({"features": PARTS[1]}, victim)
    assert stored.missing_shards() == [1]
    with pytest.raises(DamagedTableError, match="shard-00001"):
        stored.verify(checksums=False)


def test_a_flipped_bit_of_a_partial_table_is_found_on_resume(stored):
    stored.folder.mkdir()
    stored.write_shard(0, PARTS[0])
    path = stored.folder / TEN_VECTORS.file_name(0)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert stored.missing_shards() == [0, 1, 2]


def test_a_link_in_the_place_of_a_shard_is_not_followed(stored, tmp_path):
    write_all(stored)
    path = stored.folder / TEN_VECTORS.file_name(1)
    elsewhere = tmp_path / "elsewhere.safetensors"
    os.replace(path, elsewhere)
    path.symlink_to(elsewhere)
    with pytest.raises(DamagedTableError, match="shard-00001"):
        stored.verify()
    before = elsewhere.read_bytes()
    stored.write_shard(1, PARTS[1] + 1)
    assert not path.is_symlink()
    assert elsewhere.read_bytes() == before


@pytest.mark.parametrize(
    "plan",
    [
        {"vectors": 10**15},  # would be 250 trillion shards
        {"vectors": -1},
        {"vectors": True},
        {"dim": 0},
        {"vectors_per_shard": 0},
        {"dtype": "int8"},
        {"more": 1},
    ],
)
def test_a_manifest_with_an_impossible_plan_is_refused(stored, plan):
    write_all(stored)
    path = stored.folder / MANIFEST
    manifest = json.loads(path.read_text())
    manifest["plan"] |= plan
    path.write_text(json.dumps(manifest))
    with pytest.raises(DamagedTableError, match=MANIFEST):
        StoredTable.open(stored.folder)


@pytest.mark.parametrize("content", ["", "[]", "{}", "null", "[" * 100_000, " " * 2**21])
def test_a_damaged_manifest_is_refused(stored, content):
    write_all(stored)
    (stored.folder / MANIFEST).write_text(content)
    with pytest.raises(DamagedTableError, match=MANIFEST):
        StoredTable.open(stored.folder)


def test_a_failed_write_leaves_the_old_file_and_no_temporary_one(stored, monkeypatch):
    stored.folder.mkdir()
    stored.write_shard(0, PARTS[0])
    path = stored.folder / TEN_VECTORS.file_name(0)
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="full"):
        stored.write_shard(0, PARTS[1])
    assert path.read_bytes() == before
    assert [path.name for path in stored.folder.iterdir()] == [path.name]


def test_temporary_files_of_killed_runs_are_removed(stored):
    write_all(stored)
    names = sorted(path.name for path in stored.folder.iterdir())
    Path(stored.folder, f".{TEN_VECTORS.file_name(0)}.writing").write_bytes(b"half")
    stored.remove_temporary_files()
    assert sorted(path.name for path in stored.folder.iterdir()) == names


def test_damage_of_many_files_names_some_and_counts_all(tmp_path):
    stored = StoredTable(tmp_path, ShardPlan.of(11, 4, torch.float32, vectors_per_shard=1), {})
    with pytest.raises(DamagedTableError, match=r"12 files .* \.\.\. \(12 in all\)") as error:
        stored.verify()
    assert error.value.files == [HEAD, *map(stored.plan.file_name, range(11))]


def test_dtypes_that_can_not_be_kept_are_refused():
    with pytest.raises(ValueError, match="can't be kept as int64: choose one of float32, float16, bfloat16"):
        ShardPlan.of(1, 1, torch.int64)


def test_the_digest_ignores_the_order_of_keys():
    assert digest_of({"a": 1, "b": 2}) == digest_of({"b": 2, "a": 1}) != digest_of({"a": 2, "b": 1})
