"""The head/tail frontier: what each adapter, at each ratio, gives the many-shot and the few-shot classes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .table import align, percent


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
    """Points of the trade-off between head and tail, measured on the validation part.

    Args:
        points: every adapter and ratio that was measured.
        chosen: index of the point that was chosen, or `None`.

    Example:

    >>> from ballad_hf.evaluation.frontier import Frontier, FrontierPoint
    >>> groups = [(0.8, 0.3), (0.7, 0.5), (0.6, 0.4)]
    >>> points = [FrontierPoint(0.1 * i, {"mean_class": 0.5, "many": m, "few": f}) for i, (m, f) in enumerate(groups)]
    >>> Frontier(points).best()  # the third is beaten by the second in both
    [0, 1]
    """

    points: Sequence[FrontierPoint]
    chosen: int | None = None

    def best(self) -> list[int]:
        """Indices of the points that no other beats in both groups, from the best head to the best tail.

        Raises:
            ValueError: the validation part has no many-shot or no few-shot class.
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
                f"There is no {absent} class with a validation picture, so there is no frontier between head and "
                "tail; look at mean_class instead, or hold out a larger part for validation."
            )
        return many, few

    def choose(self, by: str = "mean_class", at_least: Mapping[str, float] | None = None) -> Frontier:
        """The frontier with its best point chosen.

        Args:
            by: the accuracy that is to be highest: `overall`, `mean_class`, `many`, `medium` or `few`. Where it is
                the same, the higher mean-class accuracy and then the lower ratio win.
            at_least: lowest accuracies that are put up with, such as `{"many": 0.7}`.

        Raises:
            ValueError: an accuracy that does not exist here, or one that no point reaches.
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
        path.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: str | Path) -> Frontier:
        """Read a JSON file of `save`."""
        return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))

    def table(self) -> str:
        """The best points in percent, an aligned line each; the chosen one carries a star.

        Without a frontier, because a group is missing, the ten points of the best mean-class accuracy.
        """
        groups = ("many", "medium", "few", "mean_class", "overall")
        indices = self.best() if self.has_both_groups else self._highest(10)
        if self.chosen is not None and self.chosen not in indices:
            indices = [*indices, self.chosen]
        lines = [["", *groups, "point"]]
        for index in indices:
            point = self.points[index]
            figures = [percent(point.accuracies.get(group)) for group in groups]
            lines.append(["*" if index == self.chosen else " ", *figures, point.label])
        return align(lines)
