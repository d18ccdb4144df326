import pytest
import torch

from ballad_hf.data.image_dataset import ImageDataset
from ballad_hf.data.images import UnreadableImageError
from ballad_hf.data.loaders import epoch_batches, evaluation_loader, train_loader
from ballad_hf.data.samplers import ClassAwareSampler, InstanceSampler
from ballad_hf.data.transforms import CropSchedule, evaluation_transform, train_transform

from .conftest import load_splits


@pytest.fixture(scope="module")
def digits():
    return load_splits("digits")


@pytest.fixture
def train(digits, tiny_clip):
    return digits.train.with_transform(train_transform(tiny_clip.image_processor))


def test_batches_for_training(train):
    loader = train_loader(train, ClassAwareSampler(train.labels, 2, seed=1), batch_size=10, seed=1)
    batches = list(epoch_batches(loader, 0))
    assert len(batches) == len(loader) == len(train) // 10
    for batch in batches:
        assert batch["pixel_values"].shape == (10, 3, 32, 32)
        assert batch["pixel_values"].dtype == torch.float32
        assert batch["labels"].tolist() == train.labels[batch["index"]].tolist()


def test_workers_prepare_the_same_images(train):
    plain, with_workers = (
        train_loader(train, InstanceSampler(train.labels, seed=1), 50, num_workers=workers) for workers in (0, 2)
    )
    for epoch in (0, 1):
        for one, other in zip(epoch_batches(plain, epoch), epoch_batches(with_workers, epoch), strict=True):
            assert torch.equal(one["pixel_values"], other["pixel_values"])
            assert torch.equal(one["index"], other["index"])


def test_an_image_looks_different_every_epoch(train):
    loader = train_loader(train, InstanceSampler(train.labels), 50)
    first, second = (
        {
            int(row): pixels
            for batch in epoch_batches(loader, epoch)
            for row, pixels in zip(batch["index"], batch["pixel_values"], strict=True)
        }
        for epoch in (0, 1)
    )
    common = sorted(set(first) & set(second))
    assert len(common) > 250
    assert sum(torch.equal(first[row], second[row]) for row in common) == 0


def test_the_epoch_reaches_a_crop_schedule(digits, tiny_clip):
    # In the last of two epochs crops are whole images, so they are what evaluation sees.
    transform = train_transform(tiny_clip.image_processor, (0.1, 1.0), 0, 0, CropSchedule(2))
    split = digits.train.with_transform(transform)
    loader = train_loader(split, InstanceSampler(split.labels), 20)
    plain = split.with_transform(evaluation_transform(tiny_clip.image_processor))
    differences = []
    for epoch in (0, 1):
        batch = next(epoch_batches(loader, epoch))
        expected = torch.stack([plain[row]["pixel_values"] for row in batch["index"].tolist()])
        differences.append((batch["pixel_values"] - expected).abs().mean().item())
    assert differences[0] > 0.1
    assert differences[1] < 1e-5


def test_the_global_random_state_has_no_say(train):
    loader = train_loader(train, InstanceSampler(train.labels), 50)
    torch.manual_seed(1)
    first = next(epoch_batches(loader, 0))["pixel_values"]
    torch.manual_seed(2)
    assert torch.equal(next(epoch_batches(loader, 0))["pixel_values"], first)


def test_evaluation_sees_every_row_once_in_order(digits, tiny_clip):
    split = digits.validation.with_transform(evaluation_transform(tiny_clip.image_processor))
    rows = torch.cat([batch["index"] for batch in evaluation_loader(split, 64)])
    assert rows.tolist() == list(range(200))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_can_not_be_read_is_named_by_any_worker(workers, tmp_path, tiny_clip):
    (tmp_path / "half.jpg").write_bytes(b"\xff\xd8\xff")
    split = ImageDataset([tmp_path / "half.jpg"], [0], ["a"])
    split = split.with_transform(evaluation_transform(tiny_clip.image_processor))
    with pytest.raises(UnreadableImageError, match=r"half.jpg can't be read"):
        list(evaluation_loader(split, 1, num_workers=workers))


def test_what_can_not_work_is_refused(digits, train):
    sampler = InstanceSampler(train.labels)
    with pytest.raises(ValueError, match="batch_size is 1000, but an epoch has 307 images"):
        train_loader(train, sampler, 1000)
    with pytest.raises(ValueError, match="batch_size is 0"):
        train_loader(train, sampler, 0)
    with pytest.raises(ValueError, match="batch_size is 0"):
        evaluation_loader(train, 0)
    with pytest.raises(ValueError, match="num_workers is -1"):
        train_loader(train, sampler, 10, num_workers=-1)
    with pytest.raises(ValueError, match="no transform"):
        train_loader(digits.train, sampler, 10)
    loader = train_loader(train, sampler, 100)
    with pytest.raises(ValueError, match="batches_done is 4, but an epoch has 3"):
        epoch_batches(loader, 0, 4)
    assert list(epoch_batches(loader, 0, 3)) == []
