"""The feature table: what it refuses, what it hands out, and that it comes back from disk as it went."""

import json

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ballad_hf import FeatureTable
from ballad_hf.features import cache as disk
from ballad_hf.features.cache import ShardPlan, StoredTable
from ballad_hf.features.table import GroupAccuracies, adapted_logits, adapter_accuracies, fold, moved_ratio_accuracies


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


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_table(views: int = 1) -> FeatureTable:
    return FeatureTable(
        random(40, views, 8), torch.arange(40) % 4, random(4, 8, seed=1), class_counts=[200, 50, 50, 3]
    )


def predictions_one_by_one(table: FeatureTable, weight: torch.Tensor, ratio: float) -> torch.Tensor:
    """Image by image and view by view, as the equation says."""
    chosen = []
    for views in table.features:
        logits = torch.zeros(table.classes)
        for feature in views:
            adapted = ratio * weight @ feature + (1 - ratio) * feature
            logits += torch.stack([F.cosine_similarity(adapted, embed, dim=0) for embed in table.class_embeds])
        chosen.append(logits.argmax())
    return torch.stack(chosen)


def test_logits_are_those_of_the_model(tiny_ballad):
    pixel_values = random(3, 3, 32, 32)
    with torch.no_grad():
        features = tiny_ballad.clip.get_image_features(pixel_values=pixel_values).pooler_output
        expected = tiny_ballad(pixel_values=pixel_values).logits
        logits = adapted_logits(
            features,
            tiny_ballad.adapter.linear.weight,
            tiny_ballad.config.adapter_ratio,
            tiny_ballad.class_embeds,
            tiny_ballad.logit_scale,
        )
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_a_stack_gives_what_each_adapter_gives_alone():
    features, weights, embeds = random(5, 8), random(3, 8, 8, seed=2), F.normalize(random(4, 8, seed=1), dim=1)
    ratios, scales = torch.tensor([0.0, 0.3, 1.0]), torch.tensor([1.0, 10.0, 100.0])
    together = adapted_logits(features, weights, ratios, embeds, scales)
    for index in range(3):
        alone = adapted_logits(features, weights[index], float(ratios[index]), embeds, float(scales[index]))
        torch.testing.assert_close(together[index], alone, rtol=1e-5, atol=1e-4)  # cosines to 1e-6, times 100


def test_fold_is_the_identity_at_ratio_zero_and_the_matrix_at_one():
    weight = random(4, 4)
    torch.testing.assert_close(fold(weight, 0.0), torch.eye(4))
    torch.testing.assert_close(fold(weight, 1.0), weight)


@pytest.mark.parametrize("views", [1, 3])
def test_accuracies_are_those_of_counting(views):
    table, weights, ratios = random_table(views), random(2, 8, 8, seed=3), [0.4, 1.0]
    scored = adapter_accuracies(table, weights, torch.tensor(ratios))
    for index, ratio in enumerate(ratios):
        right = predictions_one_by_one(table, weights[index], ratio) == table.labels
        by_class = [right[table.labels == label].float().mean() for label in range(4)]
        expected = {
            "overall": right.float().mean(),
            "mean_class": torch.stack(by_class).mean(),
            "many": by_class[0],
            "medium": (by_class[1] + by_class[2]) / 2,
            "few": by_class[3],
        }
        assert scored.of(index) == pytest.approx({name: float(value) for name, value in expected.items()})


@pytest.mark.parametrize("views", [1, 3])
def test_a_ratio_that_is_moved_scores_as_the_adapter_at_that_ratio(views):
    table, weight = random_table(views), random(8, 8, seed=3)
    ratios = [0.0, 0.15, 0.5, 1.0]
    moved = moved_ratio_accuracies(table, weight, ratios)
    for index, ratio in enumerate(ratios):
        assert moved.of(index) == pytest.approx(adapter_accuracies(table, weight, ratio).of())


def test_a_group_without_a_class_is_absent_and_a_class_without_rows_does_not_count():
    scored = GroupAccuracies.from_correct(
        torch.tensor([[3, 0, 1]]), torch.tensor([4, 0, 2]), torch.tensor([500, 300, 30])
    ).of()
    assert scored == {"overall": 4 / 6, "mean_class": (3 / 4 + 1 / 2) / 2, "many": 3 / 4, "medium": 1 / 2, "few": None}
