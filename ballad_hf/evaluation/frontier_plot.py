"""The head/tail frontier as a picture."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from .frontier import Frontier
from .plot_style import BLUE, GREY, INK, VERMILION, draw, save_figure


_PERCENT = FuncFormatter(lambda value, _: f"{100 * value:.3g} %" if -1e-9 <= value <= 1 + 1e-9 else "")


def plot_frontier(frontier: Frontier) -> Figure:
    """Few-shot over many-shot accuracy: every point in grey, the best joined by a line, the chosen one as a star.

    Raises:
        ValueError: the validation part has no many-shot or no few-shot class.
    """
    pairs = [frontier.pair(point) for point in frontier.points]  # (many, few) of each
    best = frontier.best()

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        many, few = zip(*pairs, strict=True)
        best_many, best_few = zip(*(pairs[index] for index in best), strict=True)
        axes.scatter(many, few, s=14, color=GREY, alpha=0.5, linewidths=0, label="adapters and ratios")
        # Steps, because a point between two neighbours is not known to be reachable.
        axes.step(best_many, best_few, where="pre", color=BLUE, linewidth=1.2)
        axes.scatter(best_many, best_few, s=26, color=BLUE, label="frontier")
        plain = [index for index, point in enumerate(frontier.points) if point.ratio == 0]
        if plain:
            axes.scatter(*pairs[plain[0]], s=60, marker="s", facecolors="none", edgecolors=INK, label="no adapter")
        if frontier.chosen is not None:
            point = frontier.points[frontier.chosen]
            axes.scatter(
                *pairs[frontier.chosen],
                s=170,
                marker="*",
                color=VERMILION,
                zorder=3,
                label=f"chosen, ratio {point.ratio:g}",
            )
        axes.set(title="Head against tail", xlabel="accuracy, many-shot classes", ylabel="accuracy, few-shot classes")
        axes.xaxis.set_major_formatter(_PERCENT)
        axes.yaxis.set_major_formatter(_PERCENT)
        axes.margins(0.08)
        axes.legend(loc="best", fontsize=9)

    return draw((6.4, 4.8), paint)


def save_frontier(frontier: Frontier, folder: str | Path) -> list[Path]:
    """Write `frontier.json`, and `frontier.png` and `frontier.svg` where there are both groups to trade off.

    Args:
        frontier: what a sweep found.
        folder: made where it does not exist; files of the same names are replaced.

    Returns:
        The files.

    Example:

    >>> import tempfile
    >>> from ballad_hf.evaluation.frontier import Frontier, FrontierPoint
    >>> from ballad_hf.evaluation.frontier_plot import save_frontier
    >>> points = [FrontierPoint(0.0, {"many": 0.8, "few": 0.3}), FrontierPoint(0.5, {"many": 0.7, "few": 0.5})]
    >>> [file.name for file in save_frontier(Frontier(points, chosen=1), tempfile.mkdtemp())]
    ['frontier.json', 'frontier.png', 'frontier.svg']
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = [frontier.save(folder / "frontier.json")]
    if frontier.has_both_groups:
        files += save_figure(plot_frontier(frontier), folder / "frontier")
    return files
