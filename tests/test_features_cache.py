"""The cache: whole entries only, found, rebuilt and pruned, whatever lies in its folder."""

import errno
import os
import shutil

import pytest
import torch
from filelock import FileLock

from ballad_hf.features import shards as disk
from ballad_hf.features.cache import FeatureCache


PLAN = disk.ShardPlan.of(4, 1, 8, torch.float32, rows_per_shard=2)


def fill(folder) -> None:
    for shard in range(PLAN.shards):
        disk.write_tensors(folder, PLAN.file_name(shard), {"features": torch.full((2, 1, 8), float(shard))})
    disk.write_tensors(folder, disk.HEAD, {"labels": torch.zeros(4, dtype=torch.int64)})
    disk.finish(folder, PLAN, {})


def add(cache: FeatureCache, key: str, used: float | None = None) -> None:
    with cache.build(key, PLAN.nbytes) as folder:
        fill(folder)
    if used is not None:
        os.utime(cache.folder / key / disk.MANIFEST, (used, used))


@pytest.fixture
def cache(tmp_path):
    return FeatureCache(tmp_path / "cache")


def test_what_was_built_is_found(cache):
    assert cache.find("a") is None
    add(cache, "a")
    assert cache.find("a") == cache.folder / "a"
    (entry,) = cache.list()
    assert (entry.key, entry.complete, entry.rows, entry.views, entry.dim, entry.dtype) == (
        "a",
        True,
        4,
        1,
        8,
        "float32",
    )
    assert entry.nbytes == cache.size() > PLAN.nbytes


def test_a_build_that_fails_stays_apart_and_is_taken_up(cache):
    with pytest.raises(RuntimeError, match="stop"), cache.build("a", PLAN.nbytes) as folder:  # noqa: PT012
        disk.write_tensors(folder, PLAN.file_name(0), {"features": torch.zeros(2, 1, 8)})
        raise RuntimeError("stop")
    assert cache.find("a") is None
    assert [entry.complete for entry in cache.list()] == [False]
    with cache.build("a", PLAN.nbytes) as folder:
        assert disk.missing_shards(folder, PLAN) == [1]
        fill(folder)
    assert cache.find("a") is not None


def test_a_build_waits_for_nothing_where_another_run_was_faster(cache):
    add(cache, "a")
    with cache.build("a", PLAN.nbytes) as folder:
        assert folder == cache.folder / "a"
    assert cache.find("a") is not None


@pytest.mark.parametrize("damage", ["byte", "missing", "cut", "manifest"])
def test_damage_is_found_and_what_is_whole_stays(cache, damage):
    add(cache, "a")
    shard = cache.folder / "a" / PLAN.file_name(1)
    if damage == "byte":
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        shard.write_bytes(content)
    elif damage == "missing":
        shard.unlink()
    elif damage == "cut":
        shard.write_bytes(shard.read_bytes()[:-4])
    else:
        (cache.folder / "a" / disk.MANIFEST).write_text("{")
    assert cache.find("a") is None
    with cache.build("a", PLAN.nbytes) as folder:
        assert disk.missing_shards(folder, PLAN) == ([] if damage == "manifest" else [1])
        fill(folder)
    assert cache.find("a") is not None


def test_what_was_not_used_for_longest_makes_room(tmp_path):
    probe = FeatureCache(tmp_path / "probe")
    add(probe, "a")
    cache = FeatureCache(tmp_path / "cache", max_bytes=int(2.5 * probe.size()))
    add(cache, "a", used=100)
    add(cache, "b", used=200)
    cache.find("a")  # used again
    add(cache, "c")
    assert {entry.key for entry in cache.list()} == {"a", "c"}
    assert cache.size() <= cache.max_bytes


def test_prune_takes_the_unfinished_first_and_leaves_what_is_being_built(cache):
    add(cache, "a", used=100)
    add(cache, "b", used=200)
    (cache.folder / "c.partial").mkdir()
    (cache.folder / "c.partial" / "junk").write_bytes(b"x" * 1000)
    assert cache.prune(cache.size() - 1) == 1000
    with FileLock(cache.folder / "a.lock"):
        freed = cache.prune(1)
    assert freed > 0
    assert [entry.key for entry in cache.list()] == ["a"]
    cache.prune()
    assert cache.list() == []
    assert cache.size() == 0


def test_an_open_table_outlives_its_entry(cache):
    add(cache, "a")
    _, second = disk.open_shards(cache.folder / "a", PLAN)
    cache.prune()
    assert torch.equal(second, torch.ones(2, 1, 8))


def test_a_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="is a file: name a folder"):
        FeatureCache(tmp_path / "file")
    with pytest.raises(NotADirectoryError), FeatureCache(tmp_path / "file" / "below").build("a", 1):
        pass


@pytest.mark.parametrize("how", ["by its mode", "by the file system"])
def test_a_folder_that_can_not_be_written_is_refused(cache, monkeypatch, how):
    if how == "by its mode":  # root may write everywhere, so the answer is put in its mouth
        monkeypatch.setattr(os, "access", lambda *args: False)
    else:

        def read_only(*args, **kwargs):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

        monkeypatch.setattr("pathlib.Path.mkdir", read_only)
    with pytest.raises(PermissionError, match="can't be written: choose another cache_dir"), cache.build("a", 1):
        pass


def test_no_space_is_said_before_anything_is_computed(cache, monkeypatch):
    add(cache, "a")
    usage = shutil.disk_usage(cache.folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
    refused = pytest.raises(OSError, match=r"No space .* needed and 0.00 MiB are free\. The finished entries")
    with refused, cache.build("b", PLAN.nbytes):
        raise AssertionError("There is no space to build in.")
    assert cache.find("a") is not None


def test_a_disk_that_fills_up_leaves_the_entries_alone(cache):
    add(cache, "a")
    with pytest.raises(OSError, match="what was computed waits in") as error, cache.build("b", PLAN.nbytes):
        raise OSError(errno.ENOSPC, "full")
    assert error.value.errno == errno.ENOSPC
    assert cache.find("a") is not None


def test_limits_that_make_no_sense_are_refused(tmp_path):
    with pytest.raises(ValueError, match="max_bytes is 0"):
        FeatureCache(tmp_path, max_bytes=0)
    small = FeatureCache(tmp_path, max_bytes=1000)
    with pytest.raises(ValueError, match="may hold 0.00 MiB: raise max_bytes"), small.build("a", 2000):
        pass
