"""What the counts of all metrics share: means over classes, and those of several processes."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from knet_jax.segmentation.segments import Categories
from knet_jax.system import processes


class Prediction(NamedTuple):
    """One picture of a split: its position, its truth and the result of the network.

    Results are a `PanopticMap`, a tuple of `Instance`, or a map of labels, as the task has it.
    """

    index: int
    truth: Any
    prediction: Any
    earlier: Sequence[Any] = ()
    """The results after 0, 1 … updates, all but the last, where they were asked for."""
    activity: Any = None
    """What the kernels did, an `Activity` of one picture, where it was asked for."""


def mean_of_defined(values: np.ndarray) -> float:
    """Averages the values that are not NaN; 0 where all are."""
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if defined.size else 0.0


def none_if_undefined(value: np.floating) -> float | None:
    """Converts a number for JSON, NaN to None."""
    return None if np.isnan(value) else value.item()


def rows_of_classes(
    categories: Categories, columns: Mapping[str, np.ndarray]
) -> list[dict[str, Any]]:
    """Makes a row of every class: name, the dataset's id, and its number of each column, NaN as None.

    Columns are arrays [number of classes].
    """
    return [
        {"name": name, "id": id} | {key: none_if_undefined(x[i]) for key, x in columns.items()}
        for i, (name, id) in enumerate(zip(categories.names, categories.dataset_ids, strict=True))
    ]


def without_nan(scores: Mapping[str, float]) -> dict[str, float | None]:
    """Converts numbers for JSON, NaN to None."""
    return {name: none_if_undefined(np.float64(score)) for name, score in scores.items()}


class Tally:
    """Counts of the pictures that this process sees, by their position in the split."""

    def __init__(self, metric: ModuleType, categories: Categories):
        self._metric = metric
        self._num_classes = len(categories.names)
        self._counts: dict[int, Any] = {}

    def add(self, index: int, truth: Any, result: Any, image_id: int, *how: Any) -> None:
        """Counts a picture, `how` as of the metric's `count`."""
        count = self._metric.count(truth, result, self._num_classes, image_id, *how)
        self._counts[index] = count

    def total(self, only: Container[int] | None = None) -> Any:
        """The merged counts of the pictures of all processes, each of which must call this.

        Args:
            only: positions; pictures that this process has seen at others are left out.
        """
        own = {i: count for i, count in self._counts.items() if only is None or i in only}
        counts = {}
        for part in processes.exchange(own):
            counts |= part
        # In the order of the split, so that sums are the same whoever saw which picture; and all at
        # once, which is much faster than one by one.
        in_order = (counts[i] for i in sorted(counts))
        return self._metric.merge(self._metric.no_counts(self._num_classes), *in_order)


class Rounds:
    """Scores of the same pictures after every number of updates."""

    def __init__(self, metric: ModuleType, categories: Categories, num_updates: int):
        self._metric, self._categories = metric, categories
        self._tallies = [Tally(metric, categories) for _ in range(num_updates + 1)]

    def add(self, one: Prediction, image_id: int) -> None:
        """Counts the results of a picture, its `earlier` ones and the last."""
        for tally, result in zip(self._tallies, (*one.earlier, one.prediction), strict=True):
            tally.add(one.index, one.truth, result, image_id)

    def scores(self, only: Container[int]) -> dict[str, float | None]:
        """What the metric says after the last update, `only` as of `Tally.total`."""
        return self._summarize(self._tallies[-1], only)

    def rows(self) -> list[dict[str, Any]]:
        """The number of `updates`, and what the metric says; each process must call it."""
        return [{"updates": i} | self._summarize(t, None) for i, t in enumerate(self._tallies)]

    def _summarize(self, tally: Tally, only: Container[int] | None) -> dict[str, float | None]:
        return without_nan(self._metric.summarize(tally.total(only), self._categories))
