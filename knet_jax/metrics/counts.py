"""What the counts of all metrics share: means over classes, and those of several processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import numpy as np

from knet_jax.system import processes

State = TypeVar("State", bound=tuple)


def mean_of_defined(values: np.ndarray) -> float:
    """Averages the values that are not NaN; 0 where all are."""
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if defined.size else 0.0


def none_if_undefined(value: np.floating) -> float | None:
    """Converts a number for JSON, NaN to None."""
    return None if np.isnan(value) else value.item()


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
