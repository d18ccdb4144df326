"""Shards on disk: a plan that covers every vector once, files that are whole, and of this table, or not there."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ballad_hf.features.shards import HEAD, MANIFEST, DamagedTableError, ShardPlan, StoredTable, digest_of


PLAN = ShardPlan.of(10, 4, torch.float32, vectors_per_shard=4)
PARTS = [torch.arange(4.0 * rows).view(rows, 4) + rows for rows in (4, 4, 2)]


@pytest.fixture
def stored(tmp_path) -> StoredTable:
    return StoredTable(tmp_path / "table", PLAN, {"encoder": "x"})


def fill(stored: StoredTable) -> None:
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
    fill(stored)
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
    (stored.folder / PLAN.file_name(0)).write_bytes(b"junk")
    assert stored.missing_shards() == [0, 1, 2]


@pytest.mark.parametrize("foreign", ["another model", "another place", "without metadata"])
def test_a_foreign_shard_of_the_right_shape_is_refused(stored, tmp_path, foreign):
    fill(stored)
    victim = stored.folder / PLAN.file_name(1)
    if foreign == "another model":
        other = replace(stored, folder=tmp_path / "other", provenance={"encoder": "y"})
        fill(other)
        shutil.copy(other.folder / PLAN.file_name(1), victim)
    elif foreign == "another place":
        shutil.copy(stored.folder / PLAN.file_name(0), victim)
    else:
        from safetensors.torch import save_file

        save_file({"features": PARTS[1]}, victim)
    assert stored.missing_shards() == [1]
    with pytest.raises(DamagedTableError, match="shard-00001"):
        stored.verify(checksums=False)


def test_a_flipped_bit_of_a_partial_table_is_found_on_resume(stored):
    stored.folder.mkdir()
    stored.write_shard(0, PARTS[0])
    path = stored.folder / PLAN.file_name(0)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert stored.missing_shards() == [0, 1, 2]


def test_a_link_in_the_place_of_a_shard_is_not_followed(stored, tmp_path):
    fill(stored)
    path = stored.folder / PLAN.file_name(1)
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
    fill(stored)
    path = stored.folder / MANIFEST
    manifest = json.loads(path.read_text())
    manifest["plan"] |= plan
    path.write_text(json.dumps(manifest))
    with pytest.raises(DamagedTableError, match=MANIFEST):
        StoredTable.open(stored.folder)


@pytest.mark.parametrize("content", ["", "[]", "{}", "null", "[" * 100_000, " " * 2**21])
def test_a_damaged_manifest_is_refused(stored, content):
    fill(stored)
    (stored.folder / MANIFEST).write_text(content)
    with pytest.raises(DamagedTableError, match=MANIFEST):
        StoredTable.open(stored.folder)


def test_a_failed_write_leaves_the_old_file_and_no_temporary_one(stored, monkeypatch):
    stored.folder.mkdir()
    stored.write_shard(0, PARTS[0])
    path = stored.folder / PLAN.file_name(0)
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="full"):
        stored.write_shard(0, PARTS[1])
    assert path.read_bytes() == before
    assert [path.name for path in stored.folder.iterdir()] == [path.name]


def test_temporary_files_of_killed_runs_are_removed(stored):
    fill(stored)
    names = sorted(path.name for path in stored.folder.iterdir())
    Path(stored.folder, f".{PLAN.file_name(0)}.writing").write_bytes(b"half")
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
