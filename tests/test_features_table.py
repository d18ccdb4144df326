"""The feature table: what it refuses, what it hands out, and that it comes back from disk as it went."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ballad_hf import FeatureTable
from ballad_hf.features import shards as disk
from ballad_hf.features.shards import ShardPlan, StoredTable


pytestmark = pytest.mark.numeric

EMBEDS = torch.eye(3, 4)


def table_of(rows: int = 10, views: int = 2, dtype: torch.dtype = torch.float32, **kwargs) -> FeatureTable:
    features = torch.randn(rows, views, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    return FeatureTable(features, torch.arange(rows) % 3, EMBEDS, **kwargs)


def in_parts(table: FeatureTable, sizes: list[int]) -> FeatureTable:
    return FeatureTable(table.features.split(sizes), table.labels, table.class_embeds)


def test_plain_rows_are_one_view():
    table = FeatureTable(torch.ones(2, 4), [0, 1], EMBEDS)
    assert table.features.shape == (2, 1, 4)
    assert (len(table), table.views, table.dim, table.classes) == (2, 1, 4, 3)


def test_class_embeddings_are_normalised_and_counts_come_from_the_labels():
    table = FeatureTable(torch.ones(3, 4), [0, 2, 2], 5 * EMBEDS)
    assert torch.equal(table.class_embeds, EMBEDS)
    assert table.class_counts.tolist() == [1, 0, 2]


def test_class_embeddings_keep_their_bits_when_a_table_is_made_of_them_again():
    features, labels = torch.ones(1, 48), [0]
    first = FeatureTable(features, labels, torch.randn(500, 48, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(FeatureTable(features, labels, first.class_embeds).class_embeds, first.class_embeds)


def test_shot_groups_follow_the_training_counts():
    table = FeatureTable(torch.ones(3, 4), [0, 1, 2], EMBEDS, class_counts=[101, 100, 19])
    assert list(table.shot_groups.many) == [0]
    assert list(table.shot_groups.medium) == [1]
    assert list(table.shot_groups.few) == [2]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.data())
def test_take_is_the_same_however_the_rows_are_cut(sizes, data):
    whole = table_of(sum(sizes))
    rows = torch.tensor(data.draw(st.lists(st.integers(0, len(whole) - 1), max_size=20)), dtype=torch.int64)
    views = torch.tensor(data.draw(st.lists(st.integers(0, 1), min_size=len(rows), max_size=len(rows))), dtype=int)
    cut = in_parts(whole, sizes)
    assert torch.equal(cut.take(rows, views), whole.features[rows, views])
    assert torch.equal(cut.take(rows, 1), whole.features[rows, 1])


def test_batches_go_through_all_rows_in_order():
    whole = table_of(10)
    parts = list(in_parts(whole, [3, 7]).batches(2))
    assert [len(labels) for _, labels in parts] == [2] * 5
    assert torch.equal(torch.cat([features for features, _ in parts]), whole.features)
    assert torch.equal(torch.cat([labels for _, labels in parts]), whole.labels)


def uneven(**kwargs) -> FeatureTable:
    """Three rows of 2, 1 and 3 views."""
    return FeatureTable(torch.arange(24.0).view(6, 4), [0, 1, 2], EMBEDS, views_per_row=[2, 1, 3], **kwargs)


def test_rows_may_differ_in_views():
    table = uneven()
    assert (table.rows, table.views, table.vectors, table.has_equal_views) == (3, 3, 6, False)
    assert table.views_per_row.tolist() == [2, 1, 3]
    assert table.take(torch.tensor([2, 0, 2, 1]), torch.tensor([2, 1, 0, 0]))[:, 0].tolist() == [20, 4, 12, 8]
    assert repr(table) == "FeatureTable(rows=3, views=1 to 3, dim=4, classes=3, dtype=float32)"
    chosen = table.select([2, 0])
    assert chosen.views_per_row.tolist() == [3, 2]
    assert chosen.features[:, 0].tolist() == [12, 16, 20, 0, 4]
    assert chosen.labels.tolist() == [2, 0]
    with pytest.raises(ValueError, match="from 1 to 3 views"):
        next(table.batches())


@pytest.mark.parametrize(("row", "view"), [(0, 2), (1, 1), (2, 3), (0, -1), (3, 0), (-1, 0)])
def test_a_view_of_another_row_is_never_handed_out(row, view):
    with pytest.raises(IndexError):
        uneven().take(torch.tensor([row]), torch.tensor([view]))


def test_rows_that_differ_in_views_come_back_from_disk(tmp_path):
    # Four vectors a shard: the views of row 2 lie in both.
    back = FeatureTable.open(uneven().save(tmp_path / "table", vectors_per_shard=4))
    assert len(back.shards) == 2
    assert back.views_per_row.tolist() == [2, 1, 3]
    assert torch.equal(back.features, uneven().features)
    assert back.take(torch.tensor([2, 2, 0]), torch.tensor([0, 2, 1]))[:, 0].tolist() == [12, 20, 4]


def test_a_row_may_have_no_view():
    table = FeatureTable(torch.arange(12.0).view(3, 4), [0, 1, 2], EMBEDS, views_per_row=[1, 0, 2])
    assert table.take(torch.tensor([2, 0]), torch.tensor([0, 0]))[:, 0].tolist() == [4, 0]
    assert table.select([1, 2]).views_per_row.tolist() == [0, 2]
    with pytest.raises(IndexError, match="outside those of its row"):
        table.take(torch.tensor([1]))
    bad = torch.ones(3, 4)
    bad[1] = torch.nan
    with pytest.raises(ValueError, match=r"rows 2\."):
        FeatureTable(bad, [0, 1, 2], EMBEDS, views_per_row=[1, 0, 2])


@pytest.mark.parametrize("views", [[2, 1], [2, -1, 5], [2, 1, 4], [[2, 1, 3]]])
def test_views_that_do_not_fit_the_features_are_refused(views):
    with pytest.raises(ValueError, match="number of views of each row, 0 or more"):
        FeatureTable(torch.ones(6, 4), [0, 1, 2], EMBEDS, views_per_row=views)


def test_select_keeps_the_order_asked_for():
    chosen = in_parts(table_of(10), [4, 6]).select([9, 0, 4])
    assert torch.equal(chosen.features, table_of(10).features[[9, 0, 4]])
    assert chosen.labels.tolist() == [0, 0, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_comes_back_from_disk_bit_for_bit(tmp_path, dtype):
    table = table_of(dtype=dtype, logit_scale=30, class_names=["a", "b", "c"], provenance={"encoder": "x"})
    folder = table.save(tmp_path / "table", vectors_per_shard=8)
    assert sorted(path.name for path in folder.glob("shard*")) == [f"shard-0000{i}.safetensors" for i in range(3)]
    back = FeatureTable.open(folder)
    assert torch.equal(back.features, table.features)
    assert back.dtype == dtype
    assert torch.equal(back.labels, table.labels)
    assert (back.logit_scale, back.class_names, back.provenance) == (30.0, ["a", "b", "c"], {"encoder": "x"})


def test_an_open_table_takes_no_memory_of_its_own(tmp_path):
    process = pytest.importorskip("psutil").Process()

    def own_memory() -> int:  # without pages of files, which the system may drop at any time
        memory = process.memory_info()
        return memory.rss - memory.shared

    rows, dim = 60_000, 512  # 117 MiB
    table = FeatureTable(torch.ones(rows, dim), torch.zeros(rows, dtype=int), torch.ones(1, dim))
    folder = table.save(tmp_path / "table")
    del table
    before = own_memory()
    back = FeatureTable.open(folder, checksums=False)
    assert back.take(torch.arange(0, rows, rows // 50)).sum() == 50 * dim
    assert own_memory() - before < 20 * 2**20


def test_a_changed_byte_is_found_and_named(tmp_path):
    folder = table_of().save(tmp_path / "table", vectors_per_shard=8)
    victim = folder / "shard-00001.safetensors"
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(content)
    with pytest.raises(disk.DamagedTableError, match="shard-00001") as error:
        FeatureTable.open(folder)
    assert error.value.files == ["shard-00001.safetensors"]


def test_a_missing_shard_is_found_without_checksums(tmp_path):
    folder = table_of().save(tmp_path / "table", vectors_per_shard=8)
    (folder / "shard-00002.safetensors").unlink()
    with pytest.raises(disk.DamagedTableError, match="shard-00002"):
        FeatureTable.open(folder, checksums=False)


def test_finish_names_missing_shards(tmp_path):
    stored = StoredTable(tmp_path, ShardPlan.of(10, 4, torch.float32, vectors_per_shard=4), {})
    stored.write_shard(0, torch.ones(4, 4))
    stored.write_shard(2, torch.ones(3, 4))  # two vectors belong here
    with pytest.raises(RuntimeError, match="2 of 3 shards are missing .*: shard-00001.safetensors, shard-00002"):
        stored.finish()
    assert not (tmp_path / disk.MANIFEST).exists()


def test_plan_has_at_most_1024_files():
    assert ShardPlan.of(10_000_000, 1024, torch.float16).shards <= 1024
    assert ShardPlan.of(5000, 4, torch.float32).shards == 3


def test_save_keeps_what_is_there(tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not an empty folder"):
        table_of().save(tmp_path)


def test_open_says_that_nothing_is_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no complete feature table"):
        FeatureTable.open(tmp_path)


def test_a_manifest_of_another_format_is_refused(tmp_path):
    folder = table_of().save(tmp_path / "table")
    manifest = json.loads((folder / disk.MANIFEST).read_text())
    (folder / disk.MANIFEST).write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(disk.DamagedTableError, match="format 99"):
        FeatureTable.open(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_rows_that_are_not_finite_are_named(value):
    features = torch.ones(5, 4)
    features[1, 2] = value
    features[3, 0] = value
    with pytest.raises(ValueError, match=r"2 of 5 rows .* rows 1, 3\."):
        FeatureTable(features, [0] * 5, EMBEDS)


def test_large_but_finite_rows_are_welcome():
    FeatureTable(torch.full((2, 4), 3e38), [0, 1], EMBEDS)  # their sum overflows


@pytest.mark.parametrize(
    ("features", "labels", "embeds", "message"),
    [
        (torch.ones(0, 4), [], EMBEDS, "at least one row"),
        (torch.ones(4), [0], EMBEDS, r"must be \(rows, views, dim\)"),
        ([torch.ones(1, 4), torch.ones(1, 5)], [0, 0], EMBEDS, "one dim"),
        ([torch.ones(1, 4), torch.ones(1, 4).half()], [0, 0], EMBEDS, "one dtype"),
        (torch.ones(1, 4, dtype=torch.float64), [0], EMBEDS, "float64"),
        (torch.ones(2, 4), [0], EMBEDS, "one label a row"),
        (torch.ones(2, 4), [0.0, 1.0], EMBEDS, "give integers"),
        (torch.ones(3, 4), [0, 3, -1], EMBEDS, "2 labels lie outside 0 to 2.* 3 in row 1"),
        (torch.ones(1, 5), [0], EMBEDS, "the features are 5 wide"),
        (torch.ones(1, 4), [0], torch.zeros(2, 4), "zero or not finite"),
    ],
)
def test_bad_tables_are_refused(features, labels, embeds, message):
    with pytest.raises(ValueError, match=message):
        FeatureTable(features, labels, embeds)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"class_counts": [1, 2]}, "3 classes"),
        ({"class_counts": [1, 2, -3]}, "0 or more"),
        ({"logit_scale": 0}, "above 0"),
        ({"logit_scale": float("nan")}, "finite"),
        ({"class_names": ["a"]}, "1 class names for 3"),
    ],
)
def test_bad_details_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        table_of(**kwargs)
