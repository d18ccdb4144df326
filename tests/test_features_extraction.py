"""Extraction: the model's own features, whatever the workers, processes and kills, and never from a stale cache."""

import json
import os
import signal
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator, debug_launcher
from PIL import Image
from tqdm.auto import tqdm

from ballad_hf import BalladForImageClassification, evaluate, extract_features
from ballad_hf.conversion.tiny_clip import build_tiny_clip
from ballad_hf.data.transforms import evaluation_transform, five_crop_transform, train_transform
from ballad_hf.features import cache as disk
from ballad_hf.features import extraction
from ballad_hf.features.cache import HEAD, StoredTable

from .conftest import load_splits


pytestmark = pytest.mark.numeric


@pytest.fixture(scope="module")
def digits():
    return load_splits("digits")


@pytest.fixture
def model(tiny_ballad, tiny_clip, digits):
    tiny_ballad.set_class_names(digits.class_names, tiny_clip.tokenizer)
    return tiny_ballad


@pytest.fixture
def few(digits):
    return digits.train.select(range(0, 60, 3))


@pytest.fixture
def no_tower(model, monkeypatch):
    """Call it, and from then on a run of the image tower fails."""

    def forbid():
        def run(**kwargs):
            raise AssertionError("The image tower ran.")

        monkeypatch.setattr(model.clip, "get_image_features", run)

    return forbid


def small_shards(monkeypatch, vectors=8):
    monkeypatch.setattr(disk, "_MIN_VECTORS", vectors)


def entries_of(folder: Path, complete: bool = True) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_dir() and (path.suffix != ".partial") == complete]


def record_writes(monkeypatch) -> list[str]:
    """Names of the files that are written from now on."""
    written = []
    write = StoredTable._write
    monkeypatch.setattr(
        StoredTable, "_write", lambda self, name, tensors: (written.append(name), write(self, name, tensors))
    )
    return written


def test_rows_are_the_towers_features_before_the_adapter(model, tiny_clip, few):
    table = extract_features(model, few, processing_class=tiny_clip.image_processor, batch_size=7)
    transform = evaluation_transform(tiny_clip.image_processor)
    for row in (0, 6, 7, 19):
        pixel_values = transform(few.image(row))[None]
        with torch.no_grad():
            expected = model.clip.get_image_features(pixel_values=pixel_values).pooler_output
        torch.testing.assert_close(table.features[row], expected, rtol=1e-5, atol=1e-5)
    assert table.labels.tolist() == few.labels.tolist()
    torch.testing.assert_close(table.class_embeds, model.class_embeds)
    assert table.logit_scale == pytest.approx(model.logit_scale.item())
    assert table.class_names == model.config.class_names


def test_the_table_scores_as_the_model_does(model, tiny_clip, digits):
    part = digits.validation.select(range(0, 200, 4))
    table = extract_features(model, part, processing_class=tiny_clip.image_processor)
    weight, ratio = model.adapter.linear.weight.detach(), model.config.adapter_ratio
    from_table = evaluate(table, adapter=weight, adapter_ratio=ratio)
    from_model = evaluate(model, part, tiny_clip.image_processor, train_counts=table.class_counts)
    assert from_table.class_accuracy == from_model.class_accuracy
    assert from_table.negative_log_likelihood == pytest.approx(from_model.negative_log_likelihood, rel=1e-4)


def test_five_crops_from_the_table_score_as_through_the_model(model, tiny_clip, few):
    transform = five_crop_transform(tiny_clip.image_processor, expand=6)
    table = extract_features(model, few, transform=transform, views=5, batch_size=3)
    assert table.features.shape == (20, 5, 16)
    assert not torch.equal(table.features[:, 0], table.features[:, 1])
    weight, ratio = model.adapter.linear.weight.detach(), model.config.adapter_ratio
    from_table = evaluate(table, adapter=weight, adapter_ratio=ratio)
    from_model = evaluate(model, few, transform=transform, train_counts=table.class_counts)
    assert from_table.class_accuracy == from_model.class_accuracy
    assert from_table.negative_log_likelihood == pytest.approx(from_model.negative_log_likelihood, rel=1e-4)


def test_views_are_the_same_for_any_batch_and_number_of_workers(model, tiny_clip, few):
    common = {"processing_class": tiny_clip.image_processor, "views": 3, "seed": 4}
    table = extract_features(model, few, batch_size=64, **common)
    other = extract_features(model, few, batch_size=7, num_workers=2, **common)
    torch.testing.assert_close(table.features, other.features, rtol=1e-5, atol=1e-5)
    assert not torch.equal(table.features[:, 0], table.features[:, 1])
    another_seed = extract_features(model, few, **{**common, "seed": 5})
    assert not torch.allclose(table.features, another_seed.features)


def test_a_view_is_the_transform_with_its_own_seed(model, tiny_clip, few):
    transform = train_transform(tiny_clip.image_processor)
    table = extract_features(model, few, transform=transform, views=2, seed=9)
    from ballad_hf.data.image_dataset import SampleIndex
    from ballad_hf.data.samplers import view_seed

    pixel_values = few.with_transform(transform)[SampleIndex(5, view_seed(9, 1, 5))]["pixel_values"][None]
    with torch.no_grad():
        expected = model.clip.get_image_features(pixel_values=pixel_values).pooler_output[0]
    torch.testing.assert_close(table.features[5, 1], expected, rtol=1e-5, atol=1e-5)


def test_images_may_get_numbers_of_views_of_their_own(model, tiny_clip, few, monkeypatch, tmp_path):
    common = {"processing_class": tiny_clip.image_processor, "seed": 9, "batch_size": 7}
    equal = extract_features(model, few, views=4, **common)
    views = np.array([4, 0, 1, 2] * 5)
    table = extract_features(model, few, views=views, **common)
    assert table.views_per_row.tolist() == views.tolist()
    for row, count in enumerate(views):  # view v of image i is the same, whatever the others get
        taken = table.take(torch.full((count,), row), torch.arange(count))
        torch.testing.assert_close(taken, equal.features[row, :count], rtol=1e-5, atol=1e-5)
    small_shards(monkeypatch)  # 35 vectors in five shards: views of an image lie in two of them
    mapped = extract_features(model, few, views=views, cache_dir=tmp_path, **common)
    assert len(mapped.shards) == 5
    torch.testing.assert_close(mapped.features, table.features, rtol=1e-5, atol=1e-5)
    extract_features(model, few, views=views[::-1].copy(), cache_dir=tmp_path, **common)
    assert len(entries_of(tmp_path)) == 2


@pytest.mark.parametrize("views", [0, -1, 1.5, True, [1] * 19, [0] * 20, [1.0] * 20])
def test_bad_numbers_of_views_are_refused(model, tiny_clip, few, views):
    with pytest.raises(ValueError, match="views is .*: give 1 .the plain image. or more"):
        extract_features(model, few, processing_class=tiny_clip.image_processor, views=views)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_halves_the_bytes(model, tiny_clip, few, dtype):
    full = extract_features(model, few, processing_class=tiny_clip.image_processor)
    half = extract_features(model, few, processing_class=tiny_clip.image_processor, dtype=dtype)
    assert half.dtype == dtype
    assert half.nbytes * 2 == full.nbytes
    torch.testing.assert_close(half.features.float(), full.features, rtol=1e-2, atol=1e-2)


def test_the_second_time_no_image_passes_the_tower(model, tiny_clip, few, tmp_path, no_tower):
    common = {"processing_class": tiny_clip.image_processor, "cache_dir": tmp_path}
    first = extract_features(model, few, **common)
    model.set_class_names([f"digit {name}" for name in model.config.class_names], tiny_clip.tokenizer)
    no_tower()
    second = extract_features(model, few, **common)  # other names, the same images and weights
    assert torch.equal(first.features, second.features)
    assert not torch.allclose(first.class_embeds, second.class_embeds)


def test_nothing_stale_is_served(model, tiny_clip, few, tmp_path):
    def entries(split=few, **kwargs):
        arguments = {"processing_class": tiny_clip.image_processor, "cache_dir": tmp_path, **kwargs}
        table = extract_features(model, split, **arguments)
        return table, len(entries_of(tmp_path))

    first, number = entries()
    assert number == 1
    assert entries(views=2)[1] == 2
    assert entries(views=2, seed=1)[1] == 3
    assert entries(dtype=torch.float16)[1] == 4
    assert entries(split=few.select(range(1, 20)))[1] == 5
    crop = train_transform(tiny_clip.image_processor, scale=(0.9, 1.0))
    assert entries(views=2, transform=crop)[1] == 6
    with torch.no_grad():
        model.clip.vision_model.embeddings.class_embedding[0] += 1
    changed, number = entries()
    assert number == 7
    assert not torch.allclose(first.features, changed.features)
    with torch.no_grad():
        model.clip.vision_model.embeddings.class_embedding[0] -= 1


def test_a_changed_file_is_not_served_stale(model, tiny_clip, tmp_path):
    model.set_class_names(sorted(model.config.class_names), tiny_clip.tokenizer)  # the order of folders
    images = tmp_path / "images"
    generator = np.random.default_rng(0)
    for name in model.config.class_names:
        (images / name).mkdir(parents=True)
        for index in range(3):
            pixels = generator.integers(0, 255, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(images / name / f"{index}.png")

    def table():
        train = load_splits(str(images)).train
        return extract_features(model, train, processing_class=tiny_clip.image_processor, cache_dir=tmp_path / "cache")

    before = table()
    for file in images.rglob("*.png"):
        Image.new("RGB", (32, 32), "red").save(file)
    after = table()
    assert len(entries_of(tmp_path / "cache")) == 2
    assert not torch.allclose(before.features, after.features)
    assert torch.allclose(after.features, after.features[:1], atol=1e-4)


@pytest.mark.parametrize("progress", [True, False])
def test_the_bar_can_be_switched_off(model, tiny_clip, few, monkeypatch, capsys, progress):
    # Without the delay of two seconds, which would hide every bar here.
    monkeypatch.setattr(extraction, "tqdm", lambda **asked: tqdm(**{**asked, "delay": 0}))
    extract_features(model, few, processing_class=tiny_clip.image_processor, batch_size=7, progress=progress)
    shown = capsys.readouterr().err
    assert ("Image features" in shown and "3/3" in shown) == progress  # 20 images in batches of 7


def test_a_damaged_shard_alone_is_computed_again(model, tiny_clip, few, tmp_path, monkeypatch):
    small_shards(monkeypatch)
    common = {"processing_class": tiny_clip.image_processor, "cache_dir": tmp_path}
    first = extract_features(model, few, **common).features.clone()
    victim = next(tmp_path.glob("*/shard-00001.safetensors"))
    content = bytearray(victim.read_bytes())
    content[-3] ^= 255
    victim.write_bytes(content)
    written = record_writes(monkeypatch)
    again = extract_features(model, few, **common)
    assert written == ["shard-00001.safetensors", HEAD]
    torch.testing.assert_close(again.features, first, rtol=1e-5, atol=1e-5)


def killed_while_extracting(model, split, image_processor, folder, files: int) -> int:
    """A process of its own that dies by SIGKILL in the middle of writing a file; its exit status."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    write = disk.replacing_file
    left = iter(range(files, -1, -1))

    @contextmanager
    def write_then_die(path):
        with write(path) as temporary:
            if next(left) == 0:
                temporary.write_bytes(b"half")
                os.kill(os.getpid(), signal.SIGKILL)
            yield temporary

    try:
        disk.replacing_file = write_then_die
        extract_features(model, split, processing_class=image_processor, cache_dir=folder)
    finally:
        os._exit(1)


@pytest.mark.parametrize("files", [2, 3])  # in the last of three shards; in the head
def test_a_killed_run_is_taken_up_where_it_stopped(model, tiny_clip, few, tmp_path, monkeypatch, files):
    small_shards(monkeypatch)
    processor = tiny_clip.image_processor
    assert killed_while_extracting(model, few, processor, tmp_path, files) == -signal.SIGKILL
    assert len(entries_of(tmp_path, complete=False)) == 1
    assert list(tmp_path.rglob(".*.writing"))

    written = record_writes(monkeypatch)
    resumed = extract_features(model, few, processing_class=processor, cache_dir=tmp_path)
    assert written == ([HEAD] if files == 3 else ["shard-00002.safetensors", HEAD])
    assert len(entries_of(tmp_path)) == 1
    assert not entries_of(tmp_path, complete=False)
    assert not list(tmp_path.rglob(".*.writing"))
    plain = extract_features(model, few, processing_class=processor)
    torch.testing.assert_close(resumed.features, plain.features, rtol=1e-5, atol=1e-5)


def _in_two_processes(folder: str) -> None:
    torch.set_num_threads(1)
    disk._MIN_VECTORS = 16
    accelerator = Accelerator(cpu=True)
    clip, tokenizer, image_processor = build_tiny_clip(layers=1)
    splits = load_splits("digits")
    model = BalladForImageClassification.from_dual_encoder(clip, splits.class_names, tokenizer)
    part = splits.train.select(range(29))
    common = {"processing_class": image_processor, "accelerator": accelerator, "views": 2}
    whole = extract_features(model, part, **common)
    written = []
    write = StoredTable._write
    StoredTable._write = lambda self, name, tensors: (written.append(name), write(self, name, tensors))
    cached = extract_features(model, part, cache_dir=Path(folder, "cache"), **common)
    again = extract_features(model, part, cache_dir=Path(folder, "cache"), **common)
    rank = accelerator.process_index
    torch.save([whole.features, cached.features.clone(), again.features.clone()], Path(folder, f"{rank}.pt"))
    Path(folder, f"{rank}.json").write_text(json.dumps(written))


def test_two_processes_share_the_work_and_get_the_same_table(tmp_path):
    debug_launcher(_in_two_processes, (str(tmp_path),), num_processes=2)
    clip, tokenizer, image_processor = build_tiny_clip(layers=1)
    splits = load_splits("digits")
    model = BalladForImageClassification.from_dual_encoder(clip, splits.class_names, tokenizer)
    alone = extract_features(model, splits.train.select(range(29)), processing_class=image_processor, views=2)
    for rank in range(2):
        for features in torch.load(tmp_path / f"{rank}.pt", weights_only=True):
            torch.testing.assert_close(features, alone.features, rtol=1e-5, atol=1e-5)
    written = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert written == [
        ["shard-00000.safetensors", "shard-00002.safetensors", HEAD],
        ["shard-00001.safetensors", "shard-00003.safetensors"],
    ]


def test_no_space_leaves_what_was_there(model, tiny_clip, few, tmp_path, monkeypatch):
    common = {"processing_class": tiny_clip.image_processor, "cache_dir": tmp_path}
    first = extract_features(model, few, **common)

    def full(self, name, tensors):
        raise OSError(28, os.strerror(28))

    write = StoredTable._write
    monkeypatch.setattr(StoredTable, "_write", full)
    with pytest.raises(OSError, match=r"No space for features .* are intact"):
        extract_features(model, few, views=2, **common)
    monkeypatch.setattr(StoredTable, "_write", write)
    assert torch.equal(extract_features(model, few, **common).features, first.features)


def test_features_that_are_not_finite_name_their_images(model, tiny_clip, few):
    with torch.no_grad():
        model.clip.visual_projection.weight[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"NaN or infinity for images \[0, 1, 2"):
        extract_features(model, few, processing_class=tiny_clip.image_processor)


def test_bad_requests_are_refused(model, tiny_clip, few, tmp_path):
    processor = tiny_clip.image_processor
    with pytest.raises(ValueError, match="has no images"):
        extract_features(model, few.select([]), processing_class=processor)
    with pytest.raises(ValueError, match="float64: choose one of float32"):
        extract_features(model, few, processing_class=processor, dtype=torch.float64)
    with pytest.raises(ValueError, match="makes 5 views of an image: give views=5"):
        extract_features(model, few, transform=five_crop_transform(processor), views=2)
    with pytest.raises(ValueError, match="has no fingerprint"):
        extract_features(model, few, transform=lambda picture, rng: torch.zeros(3, 32, 32), cache_dir=tmp_path)
    with pytest.raises(ValueError, match="num_workers is -1"):
        extract_features(model, few, processing_class=processor, num_workers=-1)
    model.config.class_embeds_digest = None
    with pytest.raises(ValueError, match="no class embeddings yet"):
        extract_features(model, few, processing_class=processor)


def test_classes_in_another_order_are_refused(model, tiny_clip, few):
    few.class_names = few.class_names[::-1]
    with pytest.raises(ValueError, match="numbers 10 classes differently from the model, such as 'nine'"):
        extract_features(model, few, processing_class=tiny_clip.image_processor)


def test_modes_and_the_global_random_state_are_left_alone(model, tiny_clip, few):
    model.train()
    model.clip.text_model.eval()
    before = torch.get_rng_state()
    extract_features(model, few, processing_class=tiny_clip.image_processor, num_workers=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert model.clip.vision_model.training
    assert not any(module.training for module in model.clip.text_model.modules())


def test_small_towers_get_crops_that_still_show_the_image(tiny_clip):
    assert five_crop_transform(tiny_clip.image_processor).expand == 3  # 24 of 224, for 32 pixels
