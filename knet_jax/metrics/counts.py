"""What the counts of all metrics share: means over classes, and gathering from several processes."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

State = TypeVar("State", bound=tuple)


def mean_of_defined(values: np.ndarray) -> float:
    """Averages the values that are not NaN; 0 where all are."""
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if defined.size else 0.0


def none_if_undefined(value: np.floating) -> float | None:
    """Converts a number for JSON, NaN to None."""
    return None if np.isnan(value) else value.item()


def to_bytes(state: tuple) -> np.ndarray:
    """Packs a NamedTuple of arrays into uint8 [n], types and shapes included."""
    buffer = io.BytesIO()
    np.savez(buffer, **state._asdict())
    return np.frombuffer(buffer.getvalue(), np.uint8)


def from_bytes(data: np.ndarray, kind: type[State]) -> State:
    """Unpacks what `to_bytes` made of a NamedTuple of type `kind`."""
    with np.load(io.BytesIO(data.tobytes()), allow_pickle=False) as arrays:
        return kind(**arrays)


def gather(state: State, merge: Callable[..., State]) -> State:
    """Merges the counts of all processes, each of which must call this.

    Args:
        state: the counts of this process's pictures; lengths of arrays may differ between processes.
        merge: the function of that name of the metric.
    """
    if jax.process_count() == 1:
        return state
    # As bytes, because arrays of 64 bits would lose half of theirs on the way through jax.
    data = to_bytes(state)
    sizes = multihost_utils.process_allgather(np.array(data.size))
    rows = multihost_utils.process_allgather(np.pad(data, (0, sizes.max() - data.size)))
    return merge(*(from_bytes(row[:size], type(state)) for row, size in zip(rows, sizes)))
