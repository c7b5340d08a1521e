"""How processes put the states of a metric together."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

State = TypeVar("State", bound=tuple)


def to_bytes(state: tuple) -> np.ndarray:
    """uint8 [n] from a NamedTuple of arrays, whose types and shapes are kept."""
    buffer = io.BytesIO()
    np.savez(buffer, **state._asdict())
    return np.frombuffer(buffer.getvalue(), np.uint8)


def from_bytes(data: np.ndarray, kind: type[State]) -> State:
    """The NamedTuple of type `kind` that `to_bytes` made uint8 [n] of."""
    with np.load(io.BytesIO(data.tobytes()), allow_pickle=False) as arrays:
        return kind(**arrays)


def gather(state: State, merge: Callable[..., State]) -> State:
    """The state of the pictures of all processes, each of which must call this.

    Args:
        state: a NamedTuple of arrays, whose lengths may differ between processes.
        merge: of the same metric.
    """
    if jax.process_count() == 1:
        return state
    # As bytes, because arrays of 64 bits would lose half of theirs on the way through jax.
    data = to_bytes(state)
    sizes = multihost_utils.process_allgather(np.array(data.size))
    rows = multihost_utils.process_allgather(np.pad(data, (0, sizes.max() - data.size)))
    return merge(*(from_bytes(row[:size], type(state)) for row, size in zip(rows, sizes)))
