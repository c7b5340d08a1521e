"""What the counts of all metrics share: means over classes."""

from __future__ import annotations

import numpy as np


def mean_of_defined(values: np.ndarray) -> float:
    """Averages the values that are not NaN; 0 where all are."""
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if defined.size else 0.0


def none_if_undefined(value: np.floating) -> float | None:
    """Converts a number for JSON, NaN to None."""
    return None if np.isnan(value) else value.item()
