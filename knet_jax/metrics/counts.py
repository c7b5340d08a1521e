"""What the counts of all metrics share: means over classes, and those of several processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np

from knet_jax.segmentation.segments import Categories
from knet_jax.system import processes

State = TypeVar("State", bound=tuple)


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

    Args:
        categories: the classes.
        columns: arrays [number of classes] by name.
    """
    return [
        {"name": name, "id": id} | {key: none_if_undefined(x[i]) for key, x in columns.items()}
        for i, (name, id) in enumerate(zip(categories.names, categories.dataset_ids, strict=True))
    ]


def collect(counts: Mapping[int, State]) -> list[State]:
    """The counts of all pictures in their order, so that sums are the same whoever saw which picture.

    Args:
        counts: of every picture that this process saw, by the picture's position in the split. Each
            process must call this.
    """
    everything = {}
    for part in processes.exchange(dict(counts)):
        everything |= part
    return [everything[index] for index in sorted(everything)]
