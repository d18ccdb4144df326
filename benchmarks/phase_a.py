"""Seconds and memory of a step of phase A, against the same step done naively, side by side on the same hardware.

    python benchmarks/phase_a.py                      # narrow towers on a CPU, the real ones on a GPU
    python benchmarks/phase_a.py --size vit_b16 rn50 --classes 1000 --mixed_precision bf16

The naive step is written here, independently: prompts of all classes tokenised in each step, padded to 77 tokens and
encoded, the whole batch at once, no autocast, SGD. Ours is what `train_phase_a` runs. Each way has a process of its
own, so that its peak memory is its own. On a CPU steps are taken in turn and seconds are those of the CPU (of all
threads together), so that what else the machine does counts little; on a GPU, which nobody shares, one way runs after
the other and has the whole memory.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from towers import SIZES, Size, build_clip, training_flops


TEMPLATE = "a photo of a {}."
WARM_UP = 2  # steps that are not timed
WORDS = [f"{first}{last}{end}" for first in "bdfgklmnprst" for last in "aeiou" for end in ("lus", "nia", "rix", "tum")]


@dataclass(frozen=True)
class Way:
    """A way to do the step.

    Args:
        name: in the table.
        loss: of phase A, or `None` for the naive step.
        mixed_precision: autocast.
        micro_batch_size: images at once; `None` for all.
        torch_compile: compile the towers.
    """

    name: str
    loss: str | None = None
    mixed_precision: str = "no"
    micro_batch_size: int | None = None
    torch_compile: bool = False


@dataclass(frozen=True)
class Case:
    """What is measured.

    Args:
        size: of the towers.
        classes: of the data.
        batch_size: images a step.
        device: `"cpu"` or `"cuda"`.
        seed: of the weights, the images and the labels.
    """

    size: Size
    classes: int
    batch_size: int
    device: str
    seed: int = 0


def class_names(classes: int) -> list[str]:
    """Different names of two to four words, which are one token each: prompts of 9 to 11 tokens."""
    numbers = np.arange(classes)
    words = np.array(WORDS)
    parts = [numbers % len(WORDS), numbers // len(WORDS) % len(WORDS), numbers // len(WORDS) ** 2]
    lengths = 2 + numbers % 3
    extra = (numbers * 7) % len(WORDS)
    return [
        " ".join([*words[[part[row] for part in parts[:2]]], *words[[extra[row], parts[2][row]]][: lengths[row] - 2]])
        for row in range(classes)
    ]


def draw_labels(case: Case, step: int) -> torch.Tensor:
    """(batch,) labels of a step, 100 : 1 from the first class to the last."""
    from ballad_hf.data.long_tail import long_tailed_counts

    counts = long_tailed_counts(100, case.classes, 100)
    rng = np.random.default_rng([case.seed, step])
    return torch.from_numpy(rng.choice(case.classes, case.batch_size, p=counts / counts.sum()))


def draw_pixels(case: Case) -> torch.Tensor:
    generator = torch.Generator().manual_seed(case.seed)
    side = case.size.image_size
    return torch.randn((case.batch_size, 3, side, side), generator=generator).to(case.device)


def naive_step(case: Case) -> Callable[[torch.Tensor], float]:
    """The official step, plainly: a function of the labels that does one update and returns the loss."""
    from ballad_hf.conversion.tiny_clip import build_tiny_clip

    tokenizer = build_tiny_clip(words=[*WORDS, "photo", "of"]).tokenizer
    clip = build_clip(case.size, len(tokenizer), tokenizer.eos_token_id, seed=case.seed).to(case.device)
    towers = [parameter for name, parameter in clip.named_parameters() if name != "logit_scale"]
    optimizer = torch.optim.SGD(towers, lr=1e-5, momentum=0.9, weight_decay=5e-4)
    names, pixels = class_names(case.classes), draw_pixels(case)

    def step(labels: torch.Tensor) -> float:
        texts = [TEMPLATE.format(name) for name in names]
        tokens = tokenizer(texts, padding="max_length", max_length=77, return_tensors="pt").to(case.device)
        text = clip.get_text_features(**tokens).pooler_output
        image = clip.get_image_features(pixel_values=pixels).pooler_output
        text = text / text.norm(dim=-1, keepdim=True)  # (classes, dim)
        image = image / image.norm(dim=-1, keepdim=True)  # (batch, dim)
        loss = F.cross_entropy(100.0 * image @ text.t(), labels.to(case.device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    step.clip = clip  # type: ignore[attr-defined]
    return step


def our_step(case: Case, way: Way) -> Callable[[torch.Tensor], float]:
    """The step of `train_phase_a`, set up by the same function, without the reading of images."""
    from accelerate import Accelerator
    from transformers import CLIPProcessor

    from ballad_hf import BalladForImageClassification
    from ballad_hf.conversion.tiny_clip import build_tiny_clip
    from ballad_hf.data.image_dataset import ImageDataset
    from ballad_hf.data.long_tail import long_tailed_counts
    from ballad_hf.training.arguments import PhaseAArguments
    from ballad_hf.training.phase_a_setup import set_training_mode, set_up_phase_a

    _, tokenizer, image_processor = build_tiny_clip(words=[*WORDS, "photo", "of"])
    clip = build_clip(case.size, len(tokenizer), tokenizer.eos_token_id, seed=case.seed)
    names = class_names(case.classes)
    scale = 100.0 if way.loss == "class_prompt" else None
    model = BalladForImageClassification.from_dual_encoder(clip, names, tokenizer, logit_scale=scale)
    labels_of_all = np.repeat(np.arange(case.classes), long_tailed_counts(100, case.classes, 100))
    unread = np.broadcast_to(np.zeros((1, 1, 1), np.uint8), (len(labels_of_all), 1, 1))
    dataset = ImageDataset(unread, labels_of_all, names)
    arguments = PhaseAArguments(
        loss=way.loss or "contrastive",  # type: ignore[arg-type]
        batch_size=case.batch_size,
        micro_batch_size=way.micro_batch_size,
        torch_compile=way.torch_compile,
        decay_all=True,
    )
    accelerator = Accelerator(mixed_precision=way.mixed_precision, cpu=case.device == "cpu")
    processor = CLIPProcessor(image_processor, tokenizer)
    setup = set_up_phase_a(model, dataset, processor, arguments, accelerator, seed=case.seed)
    set_training_mode(setup, arguments)
    pixels = draw_pixels(case)

    def step(labels: torch.Tensor) -> float:
        loss = setup.gradients(pixels, labels)
        setup.optimizer.step()
        setup.optimizer.zero_grad()
        setup.keep_scale_in_range()
        return loss.item()

    step.clip = clip  # type: ignore[attr-defined]
    return step


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def work(connection: Any, case: Case, way: Way) -> None:
    """A process of one way: takes labels, answers with the loss, the seconds, and the peak memory so far."""
    cuda = case.device == "cuda"
    step = naive_step(case) if way.loss is None else our_step(case, way)
    # On a GPU weights count too. On a CPU what is there before the first step, mostly libraries, is left out.
    before = 0 if cuda else resident_bytes()
    connection.send("ready")
    while True:
        labels = connection.recv()
        if labels is None:
            return
        clock = time.perf_counter if cuda else time.process_time
        started = clock()
        try:
            loss = step(labels)
        except torch.OutOfMemoryError:
            connection.send({"out_of_memory": True})
            return
        if cuda:
            torch.cuda.synchronize()
        seconds = clock() - started
        peak = torch.cuda.max_memory_allocated() if cuda else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        connection.send({"loss": loss, "seconds": seconds, "bytes": peak - before})


def measure(case: Case, ways: list[Way], steps: int) -> dict[str, dict[str, Any]]:
    """Every way's first loss, median seconds and peak memory, or that the memory is too small."""
    groups = [ways] if case.device == "cpu" else [[way] for way in ways]
    found: dict[str, dict[str, Any]] = {}
    for group in groups:
        found |= measure_in_turn(case, group, steps)
    return found


def measure_in_turn(case: Case, ways: list[Way], steps: int) -> dict[str, dict[str, Any]]:
    context = multiprocessing.get_context("spawn")
    workers = {}
    for way in ways:
        here, there = context.Pipe()
        process = context.Process(target=work, args=(there, case, way), daemon=True)
        process.start()
        there.close()
        workers[way.name] = (here, process)
    for here, _ in workers.values():
        here.recv()
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in workers}
    for number in range(WARM_UP + steps):
        labels = draw_labels(case, number)
        for name, (here, _) in workers.items():
            if answers[name] and "out_of_memory" in answers[name][-1]:
                continue
            here.send(labels)
            answers[name].append(here.recv())
    results = {}
    for name, (here, process) in workers.items():
        said = answers[name]
        if "out_of_memory" in said[-1]:
            results[name] = {"out_of_memory": True}
        else:
            here.send(None)
            results[name] = {
                "first_loss": said[0]["loss"],
                "seconds": statistics.median(answer["seconds"] for answer in said[WARM_UP:]),
                "bytes": said[-1]["bytes"],
            }
        process.join()
    return results


def arithmetic(case: Case, way: Way) -> float:
    """`training_flops` of a way; the contrastive loss encodes the classes of its batch."""
    if way.loss is None:
        return training_flops(case.size, case.batch_size, case.classes, 77)
    prompts = len(draw_labels(case, 1).unique()) if way.loss == "contrastive" else case.classes
    return training_flops(case.size, case.batch_size, prompts, 11)


def matmul_rate(device: str, side: int = 8192, repeats: int = 20) -> float:
    """Operations a second of a square bf16 matrix product: what the chip can do."""
    left, right = (torch.randn((side, side), device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = timed(lambda: left @ right, device, repeats)
    return 2 * side**3 / seconds


def timed(function: Callable[[], Any], device: str, repeats: int) -> float:
    """Median seconds of a call, after three that don't count."""
    found = []
    for number in range(3 + repeats):
        started = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        if number >= 3:
            found.append(time.perf_counter() - started)
    return statistics.median(found)


def utilisation(case: Case, rate: float, compiled: bool, repeats: int = 10) -> float:
    """Share of `rate` that forward and backward passes of the image tower reach in bf16."""
    clip = build_clip(case.size, 1000, 999, seed=case.seed).to(case.device)
    if compiled:
        clip.vision_model.compile()
    pixels = draw_pixels(case)

    def step() -> None:
        with torch.autocast(case.device, dtype=torch.bfloat16):
            features = clip.get_image_features(pixel_values=pixels).pooler_output
        features.float().square().mean().backward()

    return training_flops(case.size, case.batch_size, 0, 0) / timed(step, case.device, repeats) / rate


def rows_of(case: Case, name: str, ways: list[Way], found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The table's rows of one case; `times_...` say how many times less than the naive way."""
    naive = found["naive"]
    flops = arithmetic(case, ways[0])
    rows = []
    for way in ways:
        row = {"towers": name, "classes": case.classes, "way": way.name, **found[way.name]}
        row["times_less_arithmetic"] = flops / arithmetic(case, way)
        if "seconds" in row and "seconds" in naive:
            row["times_faster"] = naive["seconds"] / row["seconds"]
            row["times_less_memory"] = naive["bytes"] / row["bytes"]
        rows.append(row)
    return rows


def show_arithmetic(names: list[str], cases: list[Case], ways: list[Way]) -> str:
    """The work of each way as a Markdown table, by the shapes alone."""
    lines = ["| towers | classes | way | TFLOP a step | times less |", "|---|---:|---|---:|---:|"]
    for name, case in zip(names, cases, strict=True):
        naive = arithmetic(case, ways[0])
        for way in ways:
            work = arithmetic(case, way)
            lines.append(f"| {name} | {case.classes:,} | {way.name} | {work / 1e12:,.2f} | {naive / work:.1f} |")
    return "\n".join(lines)


def show(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| towers | classes | way | s a step | times faster | peak MB | times less | arithmetic, times less | loss |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        start = f"| {row['towers']} | {row['classes']:,} | {row['way']} |"
        less = f"{row['times_less_arithmetic']:.1f}"
        if "out_of_memory" in row:
            lines.append(f"{start} out of memory | | | | {less} | |")
            continue
        ratios = [f"{row[key]:.1f}" if key in row else "" for key in ("times_faster", "times_less_memory")]
        lines.append(
            f"{start} {row['seconds']:.3f} | {ratios[0]} | {row['bytes'] / 1e6:,.0f} | {ratios[1]} | {less} | "
            f"{row['first_loss']:.4f} |"
        )
    return "\n".join(lines)


def parse(command_line: list[str] | None = None) -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if cuda else "cpu")
    sizes = ["vit_b16", "rn50"] if cuda else ["narrow_vit", "narrow_resnet"]
    parser.add_argument("--size", nargs="+", choices=list(SIZES), default=sizes, help="towers")
    parser.add_argument("--classes", nargs="+", type=int, default=[100, 1000, 8142])
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the widths of the towers")
    parser.add_argument("--layers", type=int, help="of the transformers, in the place of the size's own")
    parser.add_argument("--micro_batch_size", type=int, help="images at once in our step")
    parser.add_argument("--mixed_precision", choices=["no", "bf16", "fp16"], default="bf16" if cuda else "no")
    parser.add_argument("--torch_compile", action="store_true", help="compile the towers of our step")
    parser.add_argument("--steps", type=int, default=10 if cuda else 3, help="timed steps of each way")
    parser.add_argument("--no_utilisation", action="store_true", help="on a GPU, leave the image tower's share out")
    parser.add_argument("--count", action="store_true", help="only count the arithmetic of a step; run nothing")
    parser.add_argument("--output", type=Path, help="JSON file of the figures")
    return parser.parse_args(command_line)


def processor() -> str:
    """What the CPU calls itself, where the system says so."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def main(command_line: list[str] | None = None) -> None:
    options = parse(command_line)
    hardware = torch.cuda.get_device_name() if options.device == "cuda" else processor()
    print(f"{hardware}, {torch.get_num_threads()} thread(s), torch {torch.__version__}, batch {options.batch_size}\n")
    common = {
        "mixed_precision": options.mixed_precision,
        "micro_batch_size": options.micro_batch_size,
        "torch_compile": options.torch_compile,
    }
    ways = [Way("naive"), Way("class_prompt", "class_prompt", **common), Way("contrastive", "contrastive", **common)]
    chosen = [(name, classes) for name in options.size for classes in options.classes]
    cases = [
        Case(SIZES[name].smaller(options.scale, options.layers), classes, options.batch_size, options.device)
        for name, classes in chosen
    ]
    if options.count:
        print(show_arithmetic([name for name, _ in chosen], cases, ways))
        return
    rows: list[dict[str, Any]] = []
    for (name, _), case in zip(chosen, cases, strict=True):
        added = rows_of(case, name, ways, measure(case, ways, options.steps))
        print(show(added) if not rows else show(added).split("\n", 2)[2], flush=True)
        rows += added
    shares = []
    if options.device == "cuda" and not options.no_utilisation:
        rate = matmul_rate(options.device)
        print(f"\nbf16 matrix product: {rate / 1e12:.0f} TFLOP/s")
        for name in options.size:
            for compiled in (False, True):
                size = SIZES[name].smaller(options.scale, options.layers)
                share = utilisation(Case(size, 1, options.batch_size, options.device), rate, compiled)
                shares.append({"towers": name, "torch_compile": compiled, "share": share})
                print(f"{name}, image tower in bf16, torch.compile {'on' if compiled else 'off'}: {share:.0%} of it")
    if options.output is not None:
        options.output.write_text(json.dumps({"hardware": hardware, "rows": rows, "utilisation": shares}, indent=1))


if __name__ == "__main__":
    main()
