"""Rules for the values of a config: a test, and in words what passes it.

Every rule has an upper bound: configs come with models of others, and a network or a picture beyond
all measure would take all time and memory before anything else could refuse it.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable
from typing import Any

Rule = tuple[Callable[[Any], bool], str]
"""The test of a value, and what is accepted in words. A test may raise whatever a value leads it to."""

STRIDE = 32
"""Sides of a canvas are multiples of the greatest stride of a backbone."""

MOST_STEPS = 2**31 - 1
"""Most steps: the counter is an int32."""
MOST_SIDE = 2**14
"""The longest side of a picture or a canvas, in pixels."""


def is_number(value: Any, least: float = -math.inf, most: float = math.inf) -> bool:
    """Whether a value is a finite number within bounds."""
    kind = isinstance(value, int | float) and not isinstance(value, bool)
    return kind and least <= value <= most and abs(value) <= sys.float_info.max


def is_whole(value: Any, least: int, most: int) -> bool:
    """Whether a value is a whole number within bounds."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def whole(least: int, most: int, what: str = "whole number") -> Rule:
    """The rule of a whole number within bounds."""
    return lambda value: is_whole(value, least, most), f"a {what} from {least} to {most}"


def several(test: Callable[[Any], bool], least: int, most: int) -> Callable[[Any], bool]:
    """The test of a tuple of `least` to `most` values that all pass a test."""
    return lambda value: (
        isinstance(value, tuple) and least <= len(value) <= most and all(map(test, value))
    )


def or_none(rule: Rule) -> Rule:
    """The rule of a value that None leaves to the data of the training, see `data/completion.py`."""
    return lambda value: value is None or rule[0](value), f"{rule[1]}, or None"


def one_of(*choices: Any) -> Rule:
    """The rule of a value that is one of some."""
    return lambda value: value in choices, ", ".join(map(str, choices))


def _is_positive(value: Any) -> bool:
    return is_number(value) and value > 0


def _is_side(value: Any) -> bool:
    return is_whole(value, 1, MOST_SIDE)


def _is_canvas(value: Any) -> bool:
    return several(_is_side, 2, 2)(value) and not any(side % STRIDE for side in value)


def _is_group(row: Any) -> bool:
    """Whether a value is (name, regular expression, factor, factor)."""
    name, pattern, *factors = row
    re.compile(pattern)
    return isinstance(name, str) and several(lambda x: is_number(x, 0), 2, 2)(tuple(factors))


def _are_groups(rows: Any) -> bool:
    trains = several(_is_group, 1, 100)(rows) and any(row[2] for row in rows)
    return trains and len({row[0] for row in rows}) == len(rows)


TEXT = (lambda value: isinstance(value, str), "a text")
PATH = (
    lambda value: isinstance(value, str) and "://" not in value,
    "a path of this machine (a bucket is mounted first), or '' for none",
)
YES_NO = (lambda value: isinstance(value, bool), "True or False")
NONE = (lambda value: is_whole(value, 0, 0), "0")
ZERO_STEPS = whole(0, MOST_STEPS)
STEPS = whole(1, MOST_STEPS)
ZERO = whole(0, 2**16)
ONE = whole(1, 2**16)
EVEN = (lambda value: ONE[0](value) and value % 2 == 0, f"an even number from 2 to {2**16}")
STAGES = whole(0, 4, "number of stages")
UPDATES = whole(0, 32)
SEED = whole(0, 2**32 - 1)
SIDE = whole(1, MOST_SIDE)
WEIGHT = (lambda value: is_number(value, 0), "a weight of at least 0")
POSITIVE = (_is_positive, "a number above 0")
NON_NEGATIVE = (lambda value: is_number(value, 0), "a number of at least 0")
EPOCHS = (lambda value: is_number(value, 0, 10**6), "a number from 0 to 1000000")
DIVISOR = (lambda value: is_number(value, 1), "a divisor of at least 1")
SHARE = (lambda value: is_number(value, 0, 1), "a number between 0 and 1")
ABOVE_0 = (lambda value: is_number(value, 0, 1) and value > 0, "a share above 0, at most 1")
BELOW_1 = (lambda value: is_number(value, 0, 1) and value < 1, "a number from 0, below 1")
RANGE = (
    lambda value: several(_is_positive, 2, 2)(value) and value[0] <= value[1] <= MOST_SIDE,
    f"(smallest, largest) above 0, at most {MOST_SIDE}",
)
FOUR = (
    several(lambda value: is_whole(value, 1, 100), 4, 4),
    "four numbers from 1 to 100, such as (3, 4, 6, 3)",
)
SOME = (
    several(_is_side, 1, 16),
    f"whole numbers from 1 to {MOST_SIDE}, such as (1, 2, 3)",
)
SCALES = (
    several(lambda value: _is_positive(value) and value <= 16, 1, 16),
    "numbers above 0, at most 16, such as (1.0,) or (0.5, 1.0, 1.5)",
)
ASCENDING = (
    lambda value: several(_is_positive, 0, 100)(value) and sorted(value) == [*value],
    "numbers above 0 in ascending order, such as (8, 11) or ()",
)
SIZE = (
    lambda value: several(_is_side, 2, 2)(value) and value[0] >= value[1],
    f"(long side, short side) in pixels, at most {MOST_SIDE}",
)
CANVAS = (_is_canvas, f"(height, width), multiples of {STRIDE} of at most {MOST_SIDE}")
LANDSCAPE = (
    lambda value: _is_canvas(value) and value[0] <= value[1],
    f"(height, width) of a landscape, multiples of {STRIDE} of at most {MOST_SIDE}",
)
WINDOW = (
    lambda value: value == () or _is_canvas(value),
    f"() for none, or (height, width), multiples of {STRIDE} of at most {MOST_SIDE}",
)
MULTIPLE = (
    lambda value: is_whole(value, 0, MOST_SIDE) and value % STRIDE == 0,
    f"a multiple of {STRIDE} of at most {MOST_SIDE}, or 0 for the canvas of training",
)
PARAMETER_GROUPS = (
    _are_groups,
    "rows of (unique name, regular expression, factor of lr (not all 0), factor of weight decay)",
)
