"""Balanced sampling on real processes (gloo), prepared by accelerate, with and without loader workers."""

import json

import numpy as np
import pytest
import torch
from accelerate import Accelerator, debug_launcher
from accelerate.state import AcceleratorState

from ballad_hf.data.image_dataset import ImageDataset
from ballad_hf.data.loaders import epoch_batches, train_loader
from ballad_hf.data.samplers import ClassAwareSampler, PowerSampler


BATCH_SIZE, EPOCHS = 3, 2
LABELS = np.repeat([4, 0, 9, 2, 7], [100, 60, 30, 12, 5])


def random_pixel(image, rng):
    return torch.tensor([float(rng.random())])


IMAGES = ImageDataset(np.zeros((len(LABELS), 1, 1), np.uint8), LABELS, list("abcdefghij"), random_pixel)


def sampler_of(kind, processes):
    options = {"multiple_of": BATCH_SIZE * processes, "seed": 5}
    return ClassAwareSampler(LABELS, 2, **options) if kind == "class_aware" else PowerSampler(LABELS, 0.5, **options)


def seen(batches):
    return [[batch["index"].tolist(), batch["pixel_values"].flatten().tolist()] for batch in batches]


def record(folder, kind, num_workers, stops):
    """Each process writes what it is given in every epoch, and what is left of the last after each stop."""
    # A forked process would inherit what an earlier test left in this one.
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True)

    def prepared():
        sampler = sampler_of(kind, accelerator.num_processes)
        return accelerator.prepare(train_loader(IMAGES, sampler, BATCH_SIZE, num_workers=num_workers, seed=1))

    loader = prepared()
    whole = [seen(epoch_batches(loader, epoch)) for epoch in range(EPOCHS)]
    rest = {stop: seen(epoch_batches(prepared(), EPOCHS - 1, stop)) for stop in stops if stop <= len(loader)}
    path = folder / f"{accelerator.process_index}.json"
    path.write_text(json.dumps({"whole": whole, "rest": rest, "processes": accelerator.num_processes}))


def run(folder, processes, *arguments):
    if processes == 1:
        record(folder, *arguments)
        AcceleratorState._reset_state(reset_partial_state=True)
    else:
        debug_launcher(record, args=(folder, *arguments), num_processes=processes)
    results = [json.loads((folder / f"{process}.json").read_text()) for process in range(processes)]
    assert [result["processes"] for result in results] == [processes] * processes
    return results


@pytest.mark.parametrize(
    ("kind", "processes", "num_workers"),
    [("class_aware", 1, 0), ("class_aware", 1, 2), ("class_aware", 2, 2), ("class_aware", 4, 0), ("power", 2, 0)],
)
def test_batches_put_together_are_the_one_order_and_resume_exactly(kind, processes, num_workers, tmp_path):
    stops = range(70) if num_workers == 0 else (0, 1, 7, 12)
    results = run(tmp_path, processes, kind, num_workers, stops)
    sampler = sampler_of(kind, processes)
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        dealt = [[index for index, _ in result["whole"][epoch]] for result in results]
        together = [row for batches in zip(*dealt, strict=True) for batch in batches for row in batch]
        # Nothing is repeated to fill a batch, and set_epoch reached the sampler on every process.
        assert together == sampler.rows().tolist()
        for result in results:
            rows = [row for index, _ in result["whole"][epoch] for row in index]
            assert set(LABELS[rows]) == set(LABELS)
    for result in results:
        last = result["whole"][EPOCHS - 1]
        assert len(result["rest"]) == sum(stop <= len(last) for stop in stops)
        for stop, rest in result["rest"].items():
            # The same rows and the same augmentation as without the interruption.
            assert rest == last[int(stop) :]


def test_augmentation_does_not_depend_on_processes_or_workers(tmp_path):
    pixels = []
    for place, (processes, num_workers) in enumerate([(1, 0), (1, 2), (2, 0)]):
        folder = tmp_path / str(place)
        folder.mkdir()
        results = run(folder, processes, "power", num_workers, ())
        dealt = [result["whole"][1] for result in results]
        pixels.append([pixel for batches in zip(*dealt, strict=True) for _, batch in batches for pixel in batch])
    length = min(map(len, pixels))
    assert length == 204
    # Another multiple of the batch is another length, and with it another order; the seed of a place stays the same.
    assert pixels[0][:length] == pixels[1][:length] == pixels[2][:length]
