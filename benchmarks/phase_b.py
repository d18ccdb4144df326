"""Phase B from cached features against the official way, and the time of a sweep.

    python benchmarks/phase_b.py                                  # narrow towers, 100 and 1,000 classes
    python benchmarks/phase_b.py --size rn50 --classes 1000       # the real tower; minutes to hours on a CPU
    python benchmarks/phase_b.py --sweep_rows 100000 --sweep_dim 512

The official way is written here, independently: in every step both frozen towers run, over the batch's images and
over the prompts of all classes at 77 tokens, then the adapter learns. A few of its steps are timed and multiplied by
their number, since all of them take too long. Ours is `extract_features`, with the reading of the images, which the
official way is spared here, and `train_phase_b`, all of it. Each way has a process of its own, so that its peak memory
is its own. On a CPU seconds are those of the CPU (of all threads together), so that what else the machine does counts
little.
"""

from __future__ import annotations

import argparse
import multiprocessing
import platform
import resource
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from phase_a import TEMPLATE, WORDS, class_names
from towers import SIZES, Size, build_clip


@dataclass(frozen=True)
class Case:
    """What is measured.

    Args:
        size: of the towers.
        classes: of the data.
        images: of the training split, 100 : 1 from the first class to the last.
        batch_size: images a step.
        epochs: of phase B.
        device: `"cpu"` or `"cuda"`.
        seed: of everything.
    """

    size: Size
    classes: int
    images: int
    batch_size: int
    epochs: int
    device: str
    seed: int = 0


def seconds(device: str) -> float:
    """CPU seconds of this process, or wall time where a GPU works."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def peak_memory(device: str) -> float:
    """MiB at the most so far."""
    if device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return torch.cuda.max_memory_allocated() / 2**20


def build(case: Case) -> tuple[Any, Any]:
    """The dual encoder and its tokenizer."""
    from ballad_hf.conversion.tiny_clip import build_tiny_clip

    tokenizer = build_tiny_clip(words=[*WORDS, "photo", "of"]).tokenizer
    clip = build_clip(case.size, len(tokenizer), tokenizer.eos_token_id, seed=case.seed).to(case.device)
    return clip, tokenizer


def draw_labels(case: Case) -> np.ndarray:
    """(images,) labels; every class occurs."""
    rng = np.random.default_rng(case.seed)
    weights = 0.01 ** (np.arange(case.classes) / max(1, case.classes - 1))
    drawn = rng.choice(case.classes, max(0, case.images - case.classes), p=weights / weights.sum())
    return np.concatenate([np.arange(case.classes), drawn])[: max(case.images, case.classes)]


def official_way(case: Case, steps: int) -> dict[str, float]:
    """Seconds of one step, after one that is not timed, and the peak memory."""
    clip, tokenizer = build(case)
    weight = torch.nn.Linear(case.size.projection_dim, case.size.projection_dim, bias=False).to(case.device).weight
    optimizer = torch.optim.SGD([weight], lr=0.2, momentum=0.9, weight_decay=5e-4)
    side = case.size.image_size
    pixels = torch.randn((case.batch_size, 3, side, side)).to(case.device)  # (batch, 3, side, side)
    labels = torch.from_numpy(draw_labels(case))[: case.batch_size].to(case.device)  # (batch,)
    texts = [TEMPLATE.format(name) for name in class_names(case.classes)]
    started = 0.0
    for step in range(steps + 1):
        if step == 1:
            started = seconds(case.device)
        tokens = tokenizer(texts, padding="max_length", max_length=77, return_tensors="pt").to(case.device)
        with torch.no_grad():
            text = F.normalize(clip.get_text_features(**tokens).pooler_output, dim=-1)  # (classes, dim)
            image = clip.get_image_features(pixel_values=pixels).pooler_output  # (batch, dim)
        adapted = F.normalize(0.2 * image @ weight.T + 0.8 * image, dim=-1)
        loss = F.cross_entropy(100.0 * adapted @ text.T, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {"step": (seconds(case.device) - started) / steps, "memory": peak_memory(case.device)}


def our_way(case: Case) -> dict[str, float]:
    """Seconds of the extraction and of the training, steps of the training, and the peak memory."""
    from ballad_hf import BalladForImageClassification, extract_features, train_phase_b
    from ballad_hf.conversion.dual_encoders import clip_image_processor
    from ballad_hf.data.image_dataset import ImageDataset
    from ballad_hf.training.arguments import PhaseBArguments

    clip, tokenizer = build(case)
    names, labels = class_names(case.classes), draw_labels(case)
    side = case.size.image_size
    pixels = np.random.default_rng(case.seed).integers(0, 256, (len(labels), side, side, 3), dtype=np.uint8)
    split = ImageDataset(pixels, labels, names)
    arguments = PhaseBArguments(epochs=case.epochs, batch_size=case.batch_size)
    started = seconds(case.device)
    model = BalladForImageClassification.from_dual_encoder(clip, names, tokenizer, logit_scale=100.0)
    table = extract_features(model, split, processing_class=clip_image_processor(side), batch_size=64)
    extracted = seconds(case.device)
    result = train_phase_b(model, table, arguments, progress=False)
    return {
        "extraction": extracted - started,
        "training": seconds(case.device) - extracted,
        "steps": result.steps,
        "memory": peak_memory(case.device),
    }


def time_sweep(rows: int, dim: int, classes: int, settings: int, epochs: int, device: str) -> dict[str, float]:
    """Seconds of a sweep, and of one that drops its weaker half."""
    from ballad_hf import BalladForImageClassification, FeatureTable
    from ballad_hf.conversion.tiny_clip import build_tiny_clip
    from ballad_hf.training.arguments import PhaseBArguments
    from ballad_hf.training.sweep import SweepSpace, sweep_phase_b

    clip, tokenizer, _ = build_tiny_clip(width=32, layers=1, projection_dim=dim, patch_size=16, words=WORDS)
    model = BalladForImageClassification.from_dual_encoder(clip, class_names(classes), tokenizer, logit_scale=50.0)
    generator = torch.Generator().manual_seed(0)
    weights = 0.01 ** (torch.arange(classes) / max(1, classes - 1))
    labels = torch.multinomial(weights, rows, replacement=True, generator=generator)  # (rows,)
    labels[:classes] = torch.arange(classes)
    features = model.class_embeds[labels] + 0.2 * torch.randn(rows, dim, generator=generator)  # (rows, dim)
    table = FeatureTable(features, labels, model.class_embeds, logit_scale=50.0)
    validation = table.select(torch.randperm(rows, generator=generator)[: max(classes, rows // 10)])
    arguments = PhaseBArguments(epochs=epochs)
    rates = np.geomspace(0.01, 1.0, settings // 10).tolist()
    space = SweepSpace(ratios=np.linspace(0.1, 1.0, 10).tolist(), learning_rates=rates, losses=[], sampler_powers=[])
    started = seconds(device)
    result = sweep_phase_b(model, table, validation, space, arguments, device=device, progress=False)
    whole = seconds(device) - started
    started = seconds(device)
    sweep_phase_b(model, table, validation, space, arguments, halving=True, device=device, progress=False)
    return {"settings": len(result.trials), "sweep": whole, "halving": seconds(device) - started}


def in_a_process_of_its_own(function, *arguments) -> Any:
    """Its peak memory is then its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def rows_of(case: Case, official: dict[str, float], ours: dict[str, float]) -> list[str]:
    """A case's line of the table."""
    whole = official["step"] * ours["steps"]
    with_extraction = ours["extraction"] + ours["training"]
    return [
        f"{case.classes:,}",
        f"{official['step']:.2f}",
        f"{whole:,.0f}",
        f"{ours['extraction']:.1f}",
        f"{ours['training']:.2f}",
        f"{whole / with_extraction:,.0f}",
        f"{official['step'] / (ours['training'] / ours['steps']):,.0f}",
        f"{official['memory']:,.0f}",
        f"{ours['memory']:,.0f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="narrow_resnet", help="towers; rn50 and vit_b16 are CLIP's")
    parser.add_argument("--classes", type=int, nargs="*", default=[100, 1000], help="none: the sweep alone")
    parser.add_argument("--images", type=int, default=4096, help="of the training split")
    parser.add_argument("--batch_size", type=int, default=512)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--official_steps", type=int, default=2, help="steps of the official way that are timed")
    parser.add_argument("--sweep_rows", type=int, default=10_000, help="0: no sweep")
    parser.add_argument("--sweep_dim", type=int, default=256)
    parser.add_argument("--sweep_classes", type=int, default=100)
    parser.add_argument("--sweep_settings", type=int, default=100)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    print(
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    print(f"{options.size}, {options.images:,} images, batch {options.batch_size}, {options.epochs} epochs\n")
    if options.classes:
        header = ["classes", "official step s", "official all s", "extraction s", "training s"]
        header += ["times faster", "a step", "official MiB", "ours MiB"]
        print(" | ".join(header))
    for classes in options.classes:
        case = Case(SIZES[options.size], classes, options.images, options.batch_size, options.epochs, options.device)
        official = in_a_process_of_its_own(official_way, case, options.official_steps)
        ours = in_a_process_of_its_own(our_way, case)
        print(" | ".join(rows_of(case, official, ours)), flush=True)
    if options.sweep_rows:
        found = in_a_process_of_its_own(
            time_sweep,
            options.sweep_rows,
            options.sweep_dim,
            options.sweep_classes,
            options.sweep_settings,
            options.epochs,
            options.device,
        )
        print(
            f"\n{found['settings']} settings on {options.sweep_rows:,} rows of {options.sweep_dim}: "
            f"{found['sweep']:.1f} s, with halving {found['halving']:.1f} s"
        )


if __name__ == "__main__":
    main()
