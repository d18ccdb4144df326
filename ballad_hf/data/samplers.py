"""Samplers for long-tailed data: class-aware, power and progressive sampling.

The order of an epoch is a pure function of (labels, seed, epoch), made of numpy's seeded permutations. Every process
computes the same global order and takes its own batches from it, and an interrupted epoch resumes exactly where it
stopped, since no state is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler
from transformers.utils import logging

from .image_dataset import SampleIndex
from .long_tail import ClassIndex, checked_labels


logger = logging.get_logger(__name__)

_BLOCK = 1 << 16

# Names for the separate uses of a seed, so that no two choices share their random numbers.
_CLASS_ORDER, _WITHIN_CLASS, _ROW_ORDER, _AUGMENTATION, _VIEW = range(5)


def view_seed(seed: int, view: int, row: int) -> tuple[int, ...]:
    """Seed of the augmentation of one view of a row, apart from every seed of training."""
    return (seed, _VIEW, view, row)


class EpochSampler(Sampler[int]):
    """Base of the samplers: length, epoch, and the rows at any positions of the order.

    Args:
        length: rows per epoch.
        multiple_of: the length is rounded down to a multiple of this. With the global batch (batch size times
            processes), every process has the same number of full batches and no row is repeated to fill one.
        seed: of every choice.
    """

    def __init__(self, length: int, multiple_of: int = 1, seed: int = 0):
        if multiple_of < 1:
            raise ValueError(f"multiple_of is {multiple_of}: give the global batch size, 1 or more.")
        if length < 1:
            raise ValueError(f"length is {length}: an epoch needs at least one row.")
        if length < multiple_of:
            raise ValueError(
                f"An epoch of {length} rows is shorter than one global batch of {multiple_of}: lower the batch size, "
                f"or set the length to {multiple_of} or more."
            )
        self.seed = int(seed)
        self.epoch = 0
        self._length = length - length % multiple_of
        self._order: tuple[int, np.ndarray] | None = None  # the epoch and its rows, made when first asked for

    def __len__(self) -> int:
        return self._length

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration gives the order of."""
        if epoch < 0:
            raise ValueError(f"epoch is {epoch}: epochs count from 0.")
        self.epoch = int(epoch)

    def rows(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows at positions `start` to `stop` of the epoch, those before left out: (stop - start,) int64."""
        stop = len(self) if stop is None else stop
        if not 0 <= start <= stop <= len(self):
            raise ValueError(f"Positions {start} to {stop} are outside the epoch, which has {len(self)}.")
        if self._order is None or self._order[0] != self.epoch:
            self._order = None  # so that two epochs never are in memory at once
            self._order = (self.epoch, self._epoch_rows())
        return self._order[1][start:stop].astype(np.int64)

    def __iter__(self) -> Iterator[int]:
        for begin in range(0, len(self), _BLOCK):
            yield from self.rows(begin, min(begin + _BLOCK, len(self))).tolist()

    def class_distribution(self, classes: int) -> np.ndarray:
        """Expected share of each class among the rows of the epoch: (classes,) float64 that sum to 1.

        Losses for long-tailed data take it, so that they correct what is left to correct after the sampler.

        Args:
            classes: number of classes; all labels are from 0 to `classes - 1`.

        Raises:
            ValueError: a label outside that range.

        Example:

        >>> from ballad_hf.data.samplers import PowerSampler
        >>> PowerSampler([0, 0, 0, 0, 2], power=0.5).class_distribution(3).round(2).tolist()
        [0.67, 0.0, 0.33]
        """
        present, shares = self._class_shares()
        if present.min() < 0 or present.max() >= classes:
            raise ValueError(
                f"labels go from {present.min()} to {present.max()}, but classes is {classes}: give the number of "
                "classes of the data, whose labels count from 0."
            )
        distribution = np.zeros(classes)
        distribution[present] = shares / shares.sum()
        return distribution

    def _class_shares(self) -> tuple[np.ndarray, np.ndarray]:
        """The labels that occur, and the share of each in the epoch, in any scale."""
        raise NotImplementedError

    def _epoch_rows(self) -> np.ndarray:
        """The rows of the epoch in order: (length,)."""
        raise NotImplementedError

    def _generator(self, *use: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, *use))


class InstanceSampler(EpochSampler):
    """Every row once per epoch, shuffled: the natural, long-tailed distribution.

    Args:
        labels: (n,) integer labels; only their number matters, but bad ones are refused here as elsewhere.
        multiple_of: the length is rounded down to a multiple of this; which rows are left out changes every epoch.
        seed: of the order.

    Example:

    >>> from ballad_hf.data.samplers import InstanceSampler
    >>> sorted(InstanceSampler([0, 0, 0, 1])) == [0, 1, 2, 3]
    True
    """

    def __init__(self, labels: Sequence[int] | np.ndarray, *, multiple_of: int = 1, seed: int = 0):
        self._labels = checked_labels(labels)
        self._size = len(self._labels)
        super().__init__(self._size, multiple_of, seed)

    def _class_shares(self) -> tuple[np.ndarray, np.ndarray]:
        return np.unique(self._labels, return_counts=True)

    def _epoch_rows(self) -> np.ndarray:
        rows = np.arange(self._size, dtype=np.int32 if self._size < 2**31 else np.int64)
        self._generator(_ROW_ORDER, self.epoch).shuffle(rows)
        return rows[: len(self)]


class ClassAwareSampler(EpochSampler):
    """Every class equally often: a class is drawn, then `samples_per_class` of its images (Shen et al., 2016).

    All classes are drawn once per cycle, in an order that is new in each cycle. The images of a class are drawn in a
    random order without repetition until all were used, then in a new order. This continues across epochs, so that a
    class with more images than an epoch has room for shows its other images in the next.

    Args:
        labels: (n,) integer labels, of any range, with gaps or not.
        samples_per_class: images of a class that follow each other; the paper uses 4.
        length: rows per epoch; default: as many as there are labels.
        multiple_of: the length is rounded down to a multiple of this, such as the global batch.
        seed: of every choice.

    Raises:
        ValueError: labels that are empty or fractional; more images a class than any class has; an epoch shorter than
            a batch.

    Example:

    >>> import numpy as np
    >>> from ballad_hf import ClassAwareSampler
    >>> labels = np.array([0] * 90 + [1] * 8 + [2] * 2)
    >>> rows = ClassAwareSampler(labels, samples_per_class=2, length=60).rows()
    >>> np.bincount(labels[rows]).tolist()
    [20, 20, 20]
    """

    def __init__(
        self,
        labels: Sequence[int] | np.ndarray,
        samples_per_class: int = 4,
        *,
        length: int | None = None,
        multiple_of: int = 1,
        seed: int = 0,
    ):
        self._index = ClassIndex(labels)
        super().__init__(len(self._index.members) if length is None else length, multiple_of, seed)
        self.samples_per_class = samples_per_class
        self._check_samples_per_class()

    def _class_shares(self) -> tuple[np.ndarray, np.ndarray]:
        return self._index.classes, np.ones(len(self._index))

    def _check_samples_per_class(self) -> None:
        k, largest = self.samples_per_class, int(self._index.counts.max())
        if not 1 <= k <= largest:
            raise ValueError(
                f"samples_per_class is {k}, but the largest class has {largest} images: choose 1 to {largest}."
            )
        short = self._index.classes[self._index.counts < k]
        if len(short):
            logger.warning(
                f"{len(short)} classes have fewer than samples_per_class={k} images, such as class {short[0]}: a "
                f"draw repeats some of them. With samples_per_class={int(self._index.counts.min())} none would."
            )

    def _epoch_rows(self) -> np.ndarray:
        index, k = self._index, self.samples_per_class
        in_cycle = len(index) * k
        start = self.epoch * len(self)
        first, last = start // in_cycle, -(-(start + len(self)) // in_cycle)  # cycles that the epoch has a part of
        orders = self._permutations(np.arange(len(index)), first, last, _BLOCK, _CLASS_ORDER)
        orders = orders.reshape(-1, len(index))  # (cycles, classes)
        # Each class is drawn k times a cycle: (classes, cycles, k) rows.
        drawn = np.empty((len(index), last - first, k), dtype=index.members.dtype)
        for place, count in enumerate(index.counts.tolist()):
            begin, end = first * k, last * k
            laps = self._permutations(
                index.rows_of(place), begin // count, -(-end // count), len(self) // len(index), _WITHIN_CLASS, place
            )
            begin -= begin // count * count
            drawn[place] = laps[begin : begin + (last - first) * k].reshape(-1, k)
        rows = drawn[orders, np.arange(last - first)[:, None]].reshape(-1)  # (cycles * classes * k,)
        return rows[start - first * in_cycle :][: len(self)]

    def _permutations(self, values: np.ndarray, start: int, stop: int, block: int, *use: int) -> np.ndarray:
        """The random permutations of the values with the numbers `start` to `stop`, one after the other.

        They are drawn in blocks of about so many values, each with a generator of its own: the numbers before `start`
        need not be drawn.
        """
        each = max(1, -(-block // len(values)))  # permutations in a block
        first, last = start // each, -(-stop // each)
        tiled = np.tile(values, ((last - first) * each, 1))
        for number in range(first, last):
            permutations = tiled[(number - first) * each :][:each]
            self._generator(*use, number).permuted(permutations, axis=1, out=permutations)
        return tiled[start - first * each : stop - first * each].reshape(-1)


class ClassWeightSampler(EpochSampler):
    """Classes in given shares, by systematic sampling (Madow, 1949): each class has its share of the epoch, rounded.

    Independent draws would give a tail class zero images in one epoch and twice its share in the next; here it has
    its share up or down to the next whole number, at positions that are shuffled over the whole epoch. Within an
    epoch, the images of a class are used equally often, up to one.

    Args:
        labels: (n,) integer labels, of any range, with gaps or not.
        class_weights: (classes,) share of each class that occurs, in the order of the labels, in any scale; or a
            function that makes them of the classes' counts.
        length: rows per epoch; default: as many as there are labels.
        multiple_of: the length is rounded down to a multiple of this, such as the global batch.
        seed: of every choice.

    Example:

    >>> import numpy as np
    >>> from ballad_hf.data.samplers import ClassWeightSampler
    >>> labels = np.array([0] * 6 + [1] * 2)
    >>> rows = ClassWeightSampler(labels, [1, 3], length=80).rows()
    >>> np.bincount(labels[rows]).tolist()
    [20, 60]
    """

    def __init__(
        self,
        labels: Sequence[int] | np.ndarray,
        class_weights: Sequence[float] | np.ndarray | Callable[[np.ndarray], np.ndarray],
        *,
        length: int | None = None,
        multiple_of: int = 1,
        seed: int = 0,
    ):
        self._index = ClassIndex(labels)
        super().__init__(len(self._index.members) if length is None else length, multiple_of, seed)
        if callable(class_weights):
            class_weights = class_weights(self._index.counts)
        self.class_weights = self._checked_weights(class_weights)

    def _checked_weights(self, class_weights: Sequence[float] | np.ndarray) -> np.ndarray:
        weights = np.asarray(class_weights, dtype=np.float64)
        if weights.shape != (len(self._index),):
            raise ValueError(
                f"class_weights has shape {weights.shape}, but {len(self._index)} classes occur in labels: give one "
                "weight for each of them."
            )
        if not (np.isfinite(weights).all() and weights.min() >= 0 and weights.sum() > 0):
            raise ValueError(
                "class_weights holds a negative, infinite or NaN weight, or only zeros: give finite weights of 0 or "
                "more, and at least one above 0."
            )
        return weights

    def _epoch_weights(self) -> np.ndarray:
        return self.class_weights

    def _class_shares(self) -> tuple[np.ndarray, np.ndarray]:
        return self._index.classes, self._epoch_weights()

    def _epoch_rows(self) -> np.ndarray:
        index, length = self._index, len(self)
        rng = self._generator(_ROW_ORDER, self.epoch)
        ends = np.cumsum(self._epoch_weights())
        ends *= length / ends[-1]  # (classes,) the epoch cut into one piece per class
        # Whole shares stay whole: rounding errors of the sum must not move a row to the next class.
        ends = np.where(np.abs(ends - np.rint(ends)) < 1e-6, np.rint(ends), ends)
        drawn = np.diff(np.ceil(ends - rng.random()).clip(0, length).astype(np.int64), prepend=0)  # (classes,)
        rows = np.empty(length, dtype=index.members.dtype)
        filled = 0
        for place, number in enumerate(drawn.tolist()):
            of_class = index.rows_of(place)
            times, rest = divmod(number, len(of_class))
            whole = filled + times * len(of_class)
            rows[filled:whole].reshape(times, len(of_class))[:] = of_class
            rows[whole : filled + number] = rng.choice(of_class, rest, replace=False, shuffle=False)
            filled += number
        rng.shuffle(rows)
        return rows


class PowerSampler(ClassWeightSampler):
    """Classes in proportion to `count ** power` (Kang et al., 2020, "Decoupling Representation and Classifier").

    Their equation 1. `power = 1` is instance sampling (at the default length each row occurs exactly once an epoch),
    `power = 0.5` square-root sampling (Mahajan et al., 2018), `power = 0` balanced.

    Args:
        labels: (n,) integer labels, of any range, with gaps or not.
        power: 0 or more; above 1 the head is drawn more often than it occurs.
        length, multiple_of, seed: see [`ClassWeightSampler`].

    Example:

    >>> import numpy as np
    >>> from ballad_hf.data.samplers import PowerSampler
    >>> labels = np.array([0] * 64 + [1] * 16)
    >>> [np.bincount(labels[PowerSampler(labels, power, length=60).rows()]).tolist() for power in (1, 0.5, 0)]
    [[48, 12], [40, 20], [30, 30]]
    """

    def __init__(
        self,
        labels: Sequence[int] | np.ndarray,
        power: float,
        *,
        length: int | None = None,
        multiple_of: int = 1,
        seed: int = 0,
    ):
        if not 0 <= power < np.inf:
            raise ValueError(f"power is {power}: choose 0 (balanced) to 1 (as they occur), or a finite number above.")
        super().__init__(
            labels,
            lambda counts: counts.astype(np.float64) ** power,
            length=length,
            multiple_of=multiple_of,
            seed=seed,
        )
        self.power = power


class ProgressiveSampler(ClassWeightSampler):
    """From instance sampling in the first epoch to balanced sampling in the last (Kang et al., 2020, eq. 2).

    Class shares are `(1 - t) * count / n + t / classes` with `t` rising from 0 to 1 over the epochs; a single epoch
    has `t = 0`, and epochs after the last stay balanced.

    Args:
        labels: (n,) integer labels, of any range, with gaps or not.
        epochs: number of epochs, 1 or more.
        length, multiple_of, seed: see [`ClassWeightSampler`].

    Example:

    >>> import numpy as np
    >>> from ballad_hf.data.samplers import ProgressiveSampler
    >>> labels = np.array([0] * 60 + [1] * 20)
    >>> sampler = ProgressiveSampler(labels, epochs=3)
    >>> for epoch in range(3):
    ...     sampler.set_epoch(epoch)
    ...     print(np.bincount(labels[sampler.rows()]).tolist())
    [60, 20]
    [50, 30]
    [40, 40]
    """

    def __init__(
        self,
        labels: Sequence[int] | np.ndarray,
        epochs: int,
        *,
        length: int | None = None,
        multiple_of: int = 1,
        seed: int = 0,
    ):
        if epochs < 1:
            raise ValueError(f"epochs is {epochs}: give 1 or more.")
        super().__init__(labels, lambda counts: counts, length=length, multiple_of=multiple_of, seed=seed)
        self.epochs = epochs

    def _epoch_weights(self) -> np.ndarray:
        progress = min(self.epoch / max(self.epochs - 1, 1), 1.0)
        counts = self.class_weights
        return (1 - progress) * counts / counts.sum() + progress / len(counts)


def build_sampler(
    name: str,
    labels: Sequence[int] | np.ndarray,
    *,
    samples_per_class: int = 4,
    power: float = 0.5,
    epochs: int = 1,
    multiple_of: int = 1,
    seed: int = 0,
) -> EpochSampler:
    """Build a sampler by its name.

    Args:
        name: `"instance"`, `"class_aware"`, `"power"` or `"progressive"`.
        labels: (n,) integer labels.
        samples_per_class: of `"class_aware"`; lowered to the size of the largest class.
        power: of `"power"`.
        epochs: of `"progressive"`.
        multiple_of: the length is rounded down to a multiple of this, such as the global batch.
        seed: of every choice.

    Raises:
        ValueError: an unknown name, or what the sampler refuses.

    Example:

    >>> from ballad_hf.data.samplers import build_sampler
    >>> build_sampler("power", [0, 0, 1], power=0.0).class_distribution(2).tolist()
    [0.5, 0.5]
    """
    if name == "instance":
        return InstanceSampler(labels, multiple_of=multiple_of, seed=seed)
    if name == "class_aware":
        largest = int(np.unique(checked_labels(labels), return_counts=True)[1].max())
        return ClassAwareSampler(labels, min(samples_per_class, largest), multiple_of=multiple_of, seed=seed)
    if name == "power":
        return PowerSampler(labels, power, multiple_of=multiple_of, seed=seed)
    if name == "progressive":
        return ProgressiveSampler(labels, max(1, epochs), multiple_of=multiple_of, seed=seed)
    raise ValueError(f"There is no sampler {name!r}: choose 'instance', 'class_aware', 'power' or 'progressive'.")


class SeededSampler(Sampler[SampleIndex]):
    """A sampler's rows, each with the seed of its augmentation: a pure function of (seed, epoch, position).

    So an image looks the same whichever worker or process prepares it, before and after a resume.

    Args:
        sampler: gives row numbers; `set_epoch` and the length are its own.
        seed: of the augmentation.

    Example:

    >>> from ballad_hf.data.samplers import InstanceSampler, SeededSampler
    >>> samples = SeededSampler(InstanceSampler([0, 1]), seed=1)
    >>> sorted(sample.index for sample in samples), list(samples) == list(samples)
    ([0, 1], True)
    """

    def __init__(self, sampler: Sampler[int] | Iterable[int], seed: int = 0):
        self.sampler = sampler
        self.seed = int(seed)
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.sampler)  # type: ignore[arg-type]

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, here and in the sampler."""
        self.epoch = int(epoch)
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    def __iter__(self) -> Iterator[SampleIndex]:
        epoch = self.epoch
        for position, row in enumerate(self.sampler):
            yield SampleIndex(int(row), (self.seed, _AUGMENTATION, epoch, position), epoch)
