"""Images a second through the training transform, beside a plain pipeline and the tower that waits for them.

    python benchmarks/data_loading.py

Photograph-like JPEGs are made in a temporary folder: 500 x 375 pixels, as ImageNet has on average, and 4000 x 3000, as
phones take them. The plain pipeline is what is commonly written per image: open, convert, crop, resize, flip,
jitter, to floats, normalise; with the same random numbers. The tower is CLIP's ViT-B/32, random weights, float32.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch.utils.data import DataLoader, Dataset
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from ballad_hf.data.image_dataset import ImageDataset, SampleIndex
from ballad_hf.data.loaders import train_loader
from ballad_hf.data.samplers import InstanceSampler
from ballad_hf.data.transforms import TrainTransform, _random_box, evaluation_transform, train_transform


BATCH_SIZE = 16


class PlainPipeline(Dataset):
    """Step by step, each over the whole image before it."""

    def __init__(self, paths: list[Path], transform: TrainTransform):
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, sample: SampleIndex):
        kind, rng = self.transform.pixel_format, np.random.default_rng(sample.seed)
        with Image.open(self.paths[sample.index]) as file:
            image = file.convert("RGB")
        image = image.crop(_random_box(*image.size, self.transform.scale, rng))
        image = image.resize((kind.width, kind.height), Image.Resampling.BICUBIC)
        if rng.random() < self.transform.horizontal_flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        factors = rng.uniform(0.6, 1.4, 3)
        enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
        for which in rng.permutation(3):
            image = enhancers[which](image).enhance(factors[which])
        pixel_values = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)
        pixel_values = (pixel_values - torch.tensor(kind.mean)[:, None, None]) / torch.tensor(kind.std)[:, None, None]
        return {"pixel_values": pixel_values, "labels": 0, "index": sample.index}


def make_images(folder: Path, count: int, size: tuple[int, int]) -> list[Path]:
    """Smooth shapes with grain, JPEG quality 90."""
    rng = np.random.default_rng(0)
    for index in range(count):
        smooth = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(
            size, Image.Resampling.BICUBIC
        )
        grain = rng.normal(0, 8, (size[1], size[0], 1)).astype(np.float32)
        Image.fromarray(np.clip(np.asarray(smooth) + grain, 0, 255).astype(np.uint8)).save(
            folder / f"{index}.jpg", quality=90
        )
    return [folder / f"{index}.jpg" for index in range(count)]


def rate(loader: DataLoader, repeats: int = 3) -> float:
    """Images a second, the best of several passes; the workers are there before the clock starts."""
    list(loader)
    best = 0.0
    for _ in range(repeats):
        start = time.perf_counter()
        images = sum(len(batch["index"]) for batch in loader)
        best = max(best, images / (time.perf_counter() - start))
    return best


def tower_rate(repeats: int = 5) -> float:
    tower = CLIPVisionModelWithProjection(CLIPVisionConfig()).eval()
    pixel_values = torch.zeros(BATCH_SIZE, 3, 224, 224)
    best = 0.0
    with torch.no_grad():
        for _ in range(repeats):
            start = time.perf_counter()
            tower(pixel_values=pixel_values)
            best = max(best, BATCH_SIZE / (time.perf_counter() - start))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=320, help="of 500 x 375; a tenth of that of 4000 x 3000")
    arguments = parser.parse_args()
    image_processor = CLIPImageProcessorPil()
    transform = train_transform(image_processor)
    print(f"tower (ViT-B/32, forward only, {torch.get_num_threads()} threads): {tower_rate():.0f} images a second")
    for size, count in (((500, 375), arguments.images), ((4000, 3000), arguments.images // 10)):
        with tempfile.TemporaryDirectory() as folder:
            paths = make_images(Path(folder), count, size)
            images = ImageDataset(paths, np.zeros(count, dtype=np.int64), ["image"])
            for workers in (1, 2):
                sampler = InstanceSampler(images.labels)
                ours = train_loader(images.with_transform(transform), sampler, BATCH_SIZE, num_workers=workers)
                plain = DataLoader(
                    PlainPipeline(paths, transform),
                    BATCH_SIZE,
                    sampler=ours.sampler,
                    num_workers=workers,
                    persistent_workers=True,
                )
                quick, slow = rate(ours), rate(plain)
                print(
                    f"{size[0]} x {size[1]}, {workers} workers: {quick:.0f} images a second, plain pipeline "
                    f"{slow:.0f}: {quick / slow:.2f} times as many"
                )
            image = images.image(0)
            ours_takes = seconds(evaluation_transform(image_processor), image) * 1e3
            processor_takes = seconds(image_processor, image, return_tensors="pt") * 1e3
            print(
                f"{size[0]} x {size[1]}, evaluation of a decoded image: {ours_takes:.1f} ms, image processor "
                f"{processor_takes:.1f} ms: {processor_takes / ours_takes:.2f} times as long"
            )


def seconds(call: Callable, *arguments: Any, repeats: int = 20, **options: Any) -> float:
    """The quickest of several calls."""
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        call(*arguments, **options)
        taken.append(time.perf_counter() - start)
    return min(taken)


if __name__ == "__main__":
    main()
