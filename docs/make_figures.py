"""Draw the figures of how_ballad_works.md into docs/figures.

    python docs/make_figures.py

Two are schemes, one is computed from the package's own functions, one shows the results that MODEL_CARD.md reports
for the built-in digits, and one the heads that benchmarks.md compares.
"""

import csv
import re
import sys
from pathlib import Path

import matplotlib
import numpy as np


matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from ballad_hf.data.long_tail import ShotGroups


HERE = Path(__file__).parent
IMAGE, TEXT, TRAINED, FROZEN, GREY = "#3949ab", "#00897b", "#fb8c00", "#90a4ae", "#455a64"
HEAD_TITLES = {
    "zero_shot": "phase A",
    "linear": "linear probe",
    "lws": "LWS",
    "crt": "cRT",
    "phase_b_official": "phase B as published",
    "balanced_softmax": "Balanced Softmax",
    "tau_norm": "tau-normalised",
    "logit_adjusted": "logit adjustment",
    "cosine": "cosine, as in LIFT",
    "phase_b": "phase B",
}
HEAD_OFFSETS = {"zero_shot": (9, 0), "linear": (9, -8), "lws": (9, -7), "logit_adjusted": (-9, 1), "cosine": (9, -9)}
GROUP_COLOURS = {"many": "#3949ab", "medium": "#7986cb", "few": "#fb8c00"}
# The same bytes on every run.
STYLE = {"svg.hashsalt": "ballad_hf", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False}


def main(folder: Path = HERE / "figures") -> None:
    folder.mkdir(exist_ok=True)
    with plt.rc_context(STYLE):
        for name, draw in FIGURES.items():
            figure = draw()
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None}, bbox_inches="tight")
            plt.close(figure)


def two_phases() -> plt.Figure:
    """Which parts train in which phase, and on what."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 2.7), gridspec_kw={"wspace": 0.06})
    for axis, title in zip(axes, ["Phase A: continued pretraining", "Phase B: balanced adapting"], strict=True):
        axis.set(xlim=(0, 11.2), ylim=(0.5, 6.4))
        axis.set_title(title, weight="bold")
        axis.axis("off")
    left, right = axes
    _box(left, 0, 4.4, "images,\nlong-tailed", GREY)
    _box(left, 0, 1, "prompts of\ntheir classes", GREY)
    _box(left, 4, 4.4, "image\nencoder", TRAINED)
    _box(left, 4, 1, "text\nencoder", TRAINED)
    _box(left, 8, 2.7, "contrastive\nloss", GREY)
    for y, end in ((5.3, 4.0), (1.9, 3.2)):
        _arrow(left, (3.2, y), (4, y))
        _arrow(left, (7.2, y), (8, end))
    _box(right, 0, 4.4, "balanced\nfeatures", FROZEN)
    _box(right, 4, 4.4, "linear\nadapter", TRAINED)
    _box(right, 8, 2.7, "cross-\nentropy", GREY)
    _box(right, 4, 1, "class\nembeddings", FROZEN)
    _arrow(right, (3.2, 5.3), (4, 5.3))
    _arrow(right, (7.2, 5.3), (8, 4.0))
    _arrow(right, (7.2, 1.9), (8, 3.2))
    for colour, text, x in ((TRAINED, "trained", 0.33), (FROZEN, "computed once with the frozen encoders", 0.45)):
        figure.text(x, 0, f"■ {text}", color=colour, weight="bold")
    return figure


def adapter() -> plt.Figure:
    """The path of one image at inference."""
    figure, axis = plt.subplots(figsize=(9, 2.4))
    axis.set(xlim=(0, 18.2), ylim=(0.4, 5.4))
    axis.axis("off")
    _box(axis, 0, 1.6, "image", GREY, width=1.8)
    _box(axis, 2.5, 1.6, "image\nencoder", IMAGE, width=2.4)
    _box(axis, 6.5, 3.5, "W f", TRAINED, width=1.6)
    _box(axis, 9.6, 1.6, "f' = r W f\n+ (1 − r) f", TRAINED, width=2.8)
    _box(axis, 13, 1.6, "cosine to\nclasses", TEXT, width=2.7)
    _box(axis, 16.4, 1.6, "scores", GREY, width=1.8)
    for start, end in ((1.8, 2.5), (12.4, 13), (15.7, 16.4)):
        _arrow(axis, (start, 2.5), (end, 2.5))
    _arrow(axis, (4.9, 2.3), (9.6, 2.3))
    _arrow(axis, (4.9, 2.9), (6.5, 4.4))
    _arrow(axis, (8.1, 4.4), (9.6, 2.9))
    axis.text(5.5, 4.0, "f", style="italic", ha="center")
    axis.text(9.2, 3.95, "r", style="italic", ha="center")
    axis.text(7.3, 1.65, "1 − r", style="italic", ha="center")
    axis.text(14.35, 0.85, "embeddings of the class prompts,\nstored in the checkpoint", ha="center", va="center")
    return figure


def sampling() -> plt.Figure:
    """What a class contributes to an epoch, as drawn and class-balanced, on CIFAR-100-LT at imbalance 100."""
    counts = np.array([int(500 * 0.01 ** (rank / 99)) for rank in range(100)])  # (classes,)
    groups = ShotGroups.from_counts(counts.tolist())
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3))
    for name, colour in GROUP_COLOURS.items():
        members = np.array(getattr(groups, name))
        left.bar(members, counts[members], width=1.0, color=colour, label=f"{name}-shot: {len(members)} classes")
        right.bar(members, 100 * counts[members] / counts.sum(), width=1.0, color=colour)
    right.axhline(1, color="black", linewidth=1.2, label="class-balanced (phase B)")
    left.set(xlabel="class", ylabel="training images")
    right.set(xlabel="class", ylabel="share of the draws (%)")
    right.bar([0], [0], color=GROUP_COLOURS["medium"], label="as the images occur (phase A)")
    left.legend(frameon=False)
    right.legend(frameon=False)
    figure.tight_layout()
    return figure


def stages() -> plt.Figure:
    """Accuracy by shot group and stage of the run that MODEL_CARD.md reports."""
    rows = digits_results()
    columns = ["many", "medium", "few", "worst class"]
    figure, axis = plt.subplots(figsize=(9, 3))
    width = 0.25
    for offset, (stage, colour) in enumerate(zip(rows, (FROZEN, GROUP_COLOURS["medium"], TRAINED), strict=True)):
        places = np.arange(len(columns)) + (offset - 1) * width
        bars = axis.bar(places, rows[stage], width=width, color=colour, label=stage)
        axis.bar_label(bars, fmt="%.0f", fontsize=8)
    axis.set(ylabel="accuracy (%)", ylim=(0, 118))
    axis.set_xticks(range(len(columns)), [name if " " in name else f"{name}-shot" for name in columns])
    axis.legend(frameon=False, loc="upper right", ncols=3)
    return figure


def heads() -> plt.Figure:
    """Few-shot against overall accuracy of every head on one phase A, from the table of the benchmark."""
    with (HERE / "tables" / "cifar100_lt_lite_100.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["phase_a"] == "class_prompt"]
    figure, axis = plt.subplots(figsize=(7.2, 4.2))
    for name, title in HEAD_TITLES.items():
        runs = [row for row in rows if row["head"] == name]
        overall, few = ([100 * float(row[metric]) for row in runs] for metric in ("overall", "few"))
        ours = name == "phase_b"
        axis.errorbar(
            np.mean(overall),
            np.mean(few),
            xerr=np.std(overall),
            yerr=np.std(few),
            fmt="*" if ours else "o",
            markersize=15 if ours else 7,
            color=TRAINED if ours else IMAGE,
        )
        axis.annotate(
            title,
            (np.mean(overall), np.mean(few)),
            textcoords="offset points",
            xytext=HEAD_OFFSETS.get(name, (-9, -3)),
            ha="left" if HEAD_OFFSETS.get(name, (-9, -3))[0] > 0 else "right",
            weight="bold" if ours else "normal",
        )
    axis.set(xlabel="overall accuracy in percent", ylabel="few-shot accuracy in percent")
    axis.set_title("CIFAR-100-LT, imbalance 100: heads on the same features")
    axis.grid(alpha=0.25)
    return figure


def digits_results() -> dict[str, list[float]]:
    """Stage -> accuracy of many-, medium-, few-shot and of the worst class, from the table of MODEL_CARD.md."""
    card = (HERE.parent / "MODEL_CARD.md").read_text(encoding="utf-8")
    labels = {
        "before training": "before training",
        "phase A with `--phase_a_loss class_prompt`": "phase A (class_prompt loss)",
        "phase B after it": "phase B",
    }
    rows = {}
    for row, label in labels.items():
        cells = re.search(rf"^\| {re.escape(row)} \|(.*)\|$", card, flags=re.MULTILINE)
        if cells is None:
            raise SystemExit(f"MODEL_CARD.md has no row {row!r} with the results of the digits.")
        rows[label] = [float(cell) for cell in cells[1].split("|")][1:]
    return rows


FIGURES = {"two_phases": two_phases, "adapter": adapter, "sampling": sampling, "stages": stages, "heads": heads}


def _box(axis: plt.Axes, x: float, y: float, text: str, colour: str, width: float = 3.2, height: float = 1.8) -> None:
    axis.add_patch(FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=0.2", color=colour))
    axis.text(x + width / 2, y + height / 2, text, ha="center", va="center", color="white", weight="bold", fontsize=9)


def _arrow(axis: plt.Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axis.add_patch(
        FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=12, color="black", shrinkA=0, shrinkB=0)
    )


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
