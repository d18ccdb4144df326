"""Shards on disk: a plan that covers every row once, files that are whole or not there."""

import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ballad_hf.features import shards as disk


PLAN = disk.ShardPlan.of(10, 2, 4, torch.float32, rows_per_shard=4)


def shard(rows: int, views: int = 2, dim: int = 4, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {"features": torch.arange(rows * views * dim).reshape(rows, views, dim).to(dtype)}


@given(st.integers(1, 10_000_000), st.one_of(st.none(), st.integers(10_000, 10**7)))
def test_spans_follow_one_another_and_end_with_the_rows(rows, rows_per_shard):
    plan = disk.ShardPlan.of(rows, 1, 1024, torch.bfloat16, rows_per_shard)
    spans = [plan.span(number) for number in range(plan.shards)]
    assert spans[0].start == 0
    assert spans[-1].stop == rows
    assert all(before.stop == after.start for before, after in zip(spans, spans[1:], strict=False))
    assert min(map(len, spans)) > 0
    assert plan.shards <= 1024
    assert plan.nbytes == rows * 1024 * 2


def test_shards_that_do_not_fit_the_plan_are_missing(tmp_path):
    assert disk.missing_shards(tmp_path, PLAN) == [0, 1, 2]
    disk.write_tensors(tmp_path, PLAN.file_name(0), shard(4))
    disk.write_tensors(tmp_path, PLAN.file_name(1), shard(3))  # a row short
    disk.write_tensors(tmp_path, PLAN.file_name(2), shard(2, dtype=torch.float16))
    assert disk.missing_shards(tmp_path, PLAN) == [1, 2]
    (tmp_path / PLAN.file_name(0)).write_bytes(b"junk")
    assert disk.missing_shards(tmp_path, PLAN) == [0, 1, 2]
    disk.write_tensors(tmp_path, PLAN.file_name(0), {"labels": torch.zeros(4)})
    assert disk.missing_shards(tmp_path, PLAN) == [0, 1, 2]


def test_a_write_that_fails_leaves_the_old_file_and_no_rest(tmp_path, monkeypatch):
    disk.write_tensors(tmp_path, "a", shard(4))
    before = (tmp_path / "a").read_bytes()

    def full(descriptor):
        raise OSError(28, "full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="full"):
        disk.write_tensors(tmp_path, "a", shard(1))
    assert (tmp_path / "a").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_shards_come_back_in_order(tmp_path):
    parts = [shard(4), shard(4), shard(2)]
    for number in (2, 0, 1):  # as several processes may write them
        disk.write_tensors(tmp_path, PLAN.file_name(number), parts[number])
    disk.write_tensors(tmp_path, disk.HEAD, {"labels": torch.arange(10)})
    disk.finish(tmp_path, PLAN, {"encoder": "x"})
    plan, provenance, files = disk.read_manifest(tmp_path)
    assert (plan, provenance) == (PLAN, {"encoder": "x"})
    assert set(files) == {disk.HEAD, *map(PLAN.file_name, range(3))}
    disk.verify(tmp_path, files)
    for opened, part in zip(disk.open_shards(tmp_path, PLAN), parts, strict=True):
        assert torch.equal(opened, part["features"])
    assert disk.read_head(tmp_path)["labels"].tolist() == list(range(10))


def test_damage_of_many_files_names_some_and_counts_all(tmp_path):
    files = {f"f{number}": {"bytes": 1, "sha256": ""} for number in range(12)}
    with pytest.raises(disk.DamagedTableError, match=r"12 files .* \.\.\. \(12 in all\)") as error:
        disk.verify(tmp_path, files)
    assert len(error.value.files) == 12


def test_dtypes_that_can_not_be_kept_are_refused():
    with pytest.raises(ValueError, match="can't be kept as int64: choose one of float32, float16, bfloat16"):
        disk.ShardPlan.of(1, 1, 1, torch.int64)
