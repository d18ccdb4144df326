"""The head/tail frontier: many-shot against few-shot accuracy of every adapter at every ratio."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import explain_full_disk, read_json, write_text
from .summary import align, percent


if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class FrontierPoint:
    """One adapter at one ratio.

    Args:
        ratio: the adapter's weight, from 0 (the model without it) to 1.
        accuracies: `overall`, `mean_class`, `many`, `medium` and `few` as fractions; `None` for a group without a
            class.
        settings: how the adapter was trained.
    """

    ratio: float
    accuracies: Mapping[str, float | None]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The settings and the ratio in a line."""
        parts = [f"{name}={value}" for name, value in self.settings.items() if value is not None]
        return ", ".join([f"ratio={self.ratio:g}", *parts])


@dataclass(frozen=True)
class Frontier:
    """Points of the trade-off between head and tail, measured on the validation split.

    Args:
        points: one for every adapter and ratio.
        chosen: index of the chosen point, or `None`.

    Example:

    >>> from ballad_hf.evaluation.frontier import Frontier, FrontierPoint
    >>> groups = [(0.8, 0.3), (0.7, 0.5), (0.6, 0.4)]
    >>> points = [FrontierPoint(0.1 * i, {"mean_class": 0.5, "many": m, "few": f}) for i, (m, f) in enumerate(groups)]
    >>> Frontier(points).best()  # the second is better than the third in both groups
    [0, 1]
    """

    points: Sequence[FrontierPoint]
    chosen: int | None = None

    def best(self) -> list[int]:
        """Indices of the points that no other beats in both groups, from the best head to the best tail.

        Raises:
            ValueError: the validation split has no many-shot or no few-shot class.
        """
        pairs = [self.pair(point) for point in self.points]
        order = sorted(range(len(pairs)), key=lambda index: (-pairs[index][0], -pairs[index][1], index))
        best, highest_few = [], float("-inf")
        for index in order:
            if pairs[index][1] > highest_few:
                best.append(index)
                highest_few = pairs[index][1]
        return best

    @property
    def has_both_groups(self) -> bool:
        """Whether there are both many-shot and few-shot classes to trade off."""
        return all(self.points[0].accuracies.get(group) is not None for group in ("many", "few"))

    def _highest(self, number: int) -> list[int]:
        order = sorted(range(len(self.points)), key=lambda index: -self._accuracy(index, "mean_class"))
        return order[:number]

    @staticmethod
    def pair(point: FrontierPoint) -> tuple[float, float]:
        """Many-shot and few-shot accuracy of a point."""
        many, few = point.accuracies.get("many"), point.accuracies.get("few")
        if many is None or few is None:
            absent = "many-shot" if many is None else "few-shot"
            raise ValueError(
                f"No {absent} class has a validation image, so there is no frontier between head and tail: choose by "
                "mean_class, or hold out a larger validation split."
            )
        return many, few

    def choose(self, by: str = "mean_class", at_least: Mapping[str, float] | None = None) -> Frontier:
        """The frontier with its best point chosen.

        Args:
            by: the accuracy to maximise: `overall`, `mean_class`, `many`, `medium` or `few`. Ties go to the higher
                mean-class accuracy, then to the lower ratio.
            at_least: lower bounds, such as `{"many": 0.7}`.

        Raises:
            ValueError: an accuracy that does not exist here, or a bound that no point reaches.
        """
        for name in (by, *(at_least or {})):
            if all(point.accuracies.get(name) is None for point in self.points):
                known = [key for key, value in self.points[0].accuracies.items() if value is not None]
                raise ValueError(f"There is no accuracy {name!r} to choose by: choose one of {', '.join(known)}.")
        allowed = list(range(len(self.points)))
        for name, lowest in (at_least or {}).items():
            highest = max(self._accuracy(index, name) for index in allowed)
            allowed = [index for index in allowed if self._accuracy(index, name) >= lowest]
            if not allowed:
                raise ValueError(
                    f"No point has {name} at {percent(lowest)} or more: the highest is {percent(highest)}."
                )

        def order(index: int) -> tuple[float, float, float]:
            return self._accuracy(index, by), self._accuracy(index, "mean_class"), -self.points[index].ratio

        return Frontier(self.points, max(allowed, key=order))

    def _accuracy(self, index: int, name: str) -> float:
        value = self.points[index].accuracies.get(name)
        return float("-inf") if value is None else value

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"chosen": self.chosen, "points": [asdict(point) for point in self.points]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Frontier:
        """The frontier that `to_dict` described."""
        return cls([FrontierPoint(**point) for point in values["points"]], values["chosen"])

    def save(self, path: str | Path) -> Path:
        """Write it as a JSON file."""
        path = Path(path)
        write_text(path, json.dumps(self.to_dict(), indent=1) + "\n")
        return path

    @classmethod
    def load(cls, path: str | Path) -> Frontier:
        """Read a JSON file of `save`.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged, or no frontier.
        """
        try:
            frontier = cls.from_dict(read_json(path))
            _check_types(frontier)
            return frontier
        except (LookupError, TypeError) as error:
            raise ValueError(f"{path} is no frontier of a sweep ({error!r}): run the sweep again.") from error

    def table(self) -> str:
        """The points of the frontier in percent, one aligned line each; a star marks the chosen one.

        Where a group is missing, the ten points of the best mean-class accuracy.
        """
        groups = ("many", "medium", "few", "mean_class", "overall")
        indices = self.best() if self.has_both_groups else self._highest(10)
        if self.chosen is not None and self.chosen not in indices:
            indices = [*indices, self.chosen]
        lines = [["", *groups, "point"]]
        for index in indices:
            point = self.points[index]
            metrics = [percent(point.accuracies.get(group)) for group in groups]
            lines.append(["*" if index == self.chosen else " ", *metrics, point.label])
        return align(lines)


def _check_types(frontier: Frontier) -> None:
    for point in frontier.points:
        if not isinstance(point.accuracies, Mapping):
            raise TypeError(f"accuracies are {point.accuracies!r}")
        values = [point.ratio, *(value for value in point.accuracies.values() if value is not None)]
        if not all(isinstance(value, int | float) for value in values) or not isinstance(point.settings, Mapping):
            raise TypeError(f"a point is {point}")
    if frontier.chosen is not None and frontier.chosen not in range(len(frontier.points)):
        raise LookupError(f"chosen is {frontier.chosen!r}")


def plot_frontier(frontier: Frontier) -> Figure:
    """Few-shot over many-shot accuracy: every point in grey, the best joined by a line, the chosen one as a star.

    Raises:
        ValueError: the validation split has no many-shot or no few-shot class.
    """
    from matplotlib.ticker import FuncFormatter  # slow to import, and a sweep itself draws nothing

    from .plots import BLUE, GREY, INK, VERMILION, draw

    as_percent = FuncFormatter(lambda value, _: f"{100 * value:.3g}%" if -1e-9 <= value <= 1 + 1e-9 else "")
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
        axes.set(
            title="Head against tail on validation images",
            xlabel="accuracy, many-shot classes",
            ylabel="accuracy, few-shot classes",
        )
        axes.xaxis.set_major_formatter(as_percent)
        axes.yaxis.set_major_formatter(as_percent)
        axes.margins(0.08)
        axes.legend(loc="best", fontsize=9)

    return draw((6.4, 4.8), paint)


def save_frontier(frontier: Frontier, folder: str | Path) -> list[Path]:
    """Write `frontier.json`, and `frontier.png` and `frontier.svg` where there are both groups to trade off.

    Args:
        frontier: of a sweep.
        folder: created if missing; files of the same names are replaced.

    Returns:
        The paths of the files.

    Example:

    >>> import tempfile
    >>> from ballad_hf.evaluation.frontier import Frontier, FrontierPoint, save_frontier
    >>> points = [FrontierPoint(0.0, {"many": 0.8, "few": 0.3}), FrontierPoint(0.5, {"many": 0.7, "few": 0.5})]
    >>> [file.name for file in save_frontier(Frontier(points, chosen=1), tempfile.mkdtemp())]
    ['frontier.json', 'frontier.png', 'frontier.svg']
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = [frontier.save(folder / "frontier.json")]
    if frontier.has_both_groups:
        from .plots import save_figure

        with explain_full_disk(folder):
            files += save_figure(plot_frontier(frontier), folder / "frontier")
    return files
