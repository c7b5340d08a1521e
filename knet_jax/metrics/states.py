"""The state of a metric as bytes, in which processes can hand it to each other exactly."""

from __future__ import annotations

import io
from typing import TypeVar

import numpy as np

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
