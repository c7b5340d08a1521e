"""Rules for the values of a config: a test, and in words what passes it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

Rule = tuple[Callable[[Any], bool], str]
"""The test of a value, and what is accepted in words."""

STRIDE = 32
"""Sides of a canvas are multiples of the greatest stride of a backbone."""


def number(value: Any) -> bool:
    """Whether a value is a finite number."""
    kind = isinstance(value, int | float) and not isinstance(value, bool)
    return kind and math.isfinite(value)


def positive(value: Any) -> bool:
    """Whether a value is a number above 0."""
    return number(value) and value > 0


def non_negative(value: Any) -> bool:
    """Whether a value is a number of at least 0."""
    return number(value) and value >= 0


def count(value: Any) -> bool:
    """Whether a value is a whole number of at least 0."""
    return isinstance(value, int) and non_negative(value)


def at_least_one(value: Any) -> bool:
    """Whether a value is a whole number of at least 1."""
    return isinstance(value, int) and positive(value)


def share(value: Any) -> bool:
    """Whether a value is a number from 0 to 1."""
    return non_negative(value) and value <= 1


def several(test: Callable[[Any], bool], length: int | None = None) -> Callable[[Any], bool]:
    """The test of a tuple whose values all pass a test, of some length or of any."""
    return lambda value: (
        isinstance(value, tuple) and length in (None, len(value)) and all(map(test, value))
    )


def pair(test: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """The test of a tuple of two values that pass a test."""
    return several(test, 2)


def one_of(*choices: Any) -> Rule:
    """The rule of a value that is one of some."""
    return lambda value: value in choices, ", ".join(map(str, choices))


def _is_canvas(value: Any) -> bool:
    return pair(at_least_one)(value) and not any(side % STRIDE for side in value)


def _is_group(row: Any) -> bool:
    """Whether a value is (name, regular expression, factor, factor)."""
    if not (isinstance(row, tuple) and len(row) == 4 and all(map(non_negative, row[2:]))):
        return False
    try:
        re.compile(row[1])
    except (re.error, TypeError):
        return False
    return True


def _are_groups(rows: Any) -> bool:
    return several(_is_group)(rows) and len({row[0] for row in rows}) == len(rows) > 0


TEXT = (lambda value: isinstance(value, str), "a text")
PATH = (TEXT[0], "a path, or '' for none")
YES_NO = (lambda value: isinstance(value, bool), "True or False")
NONE = (lambda value: count(value) and value == 0, "0")
ZERO = (count, "a whole number of at least 0")
ONE = (at_least_one, "a whole number of at least 1")
EVEN = (lambda value: at_least_one(value) and value % 2 == 0, "an even number of at least 2")
STAGES = (lambda value: count(value) and value <= 4, "0 to 4 stages")
SEED = (lambda value: count(value) and value < 2**32, "a whole number from 0, less than 2 ** 32")
WEIGHT = (non_negative, "a weight of at least 0")
POSITIVE = (positive, "a number above 0")
NON_NEGATIVE = (non_negative, "a number of at least 0")
DIVISOR = (lambda value: positive(value) and value >= 1, "a divisor of at least 1")
SHARE = (share, "a number between 0 and 1")
ABOVE_0 = (lambda value: share(value) and value > 0, "a share above 0, at most 1")
BELOW_1 = (lambda value: share(value) and value < 1, "a number from 0, below 1")
RANGE = (
    lambda value: pair(positive)(value) and value[0] <= value[1],
    "(smallest, largest) above 0",
)
FOUR = (several(at_least_one, 4), "four numbers, such as (3, 4, 6, 3)")
SOME = (
    lambda value: value != () and several(at_least_one)(value),
    "whole numbers of at least 1, such as (1, 2, 3)",
)
SCALES = (
    lambda value: value != () and several(positive)(value),
    "numbers above 0, such as (1.0,) or (0.5, 1.0, 1.5)",
)
ASCENDING = (
    lambda value: several(positive)(value) and sorted(value) == [*value],
    "numbers above 0 in ascending order, such as (8, 11) or ()",
)
SIZE = (
    lambda value: pair(at_least_one)(value) and value[0] >= value[1],
    "(long side, short side) in pixels",
)
CANVAS = (_is_canvas, f"(height, width), multiples of {STRIDE}")
LANDSCAPE = (
    lambda value: _is_canvas(value) and value[0] <= value[1],
    f"(height, width) of a landscape, multiples of {STRIDE}",
)
WINDOW = (
    lambda value: value == () or _is_canvas(value),
    f"() for none, or (height, width), multiples of {STRIDE}",
)
MULTIPLE = (
    lambda value: count(value) and value % STRIDE == 0,
    f"a multiple of {STRIDE}, or 0 for the canvas of training",
)
GROUPS = (
    _are_groups,
    "rows of (name, regular expression, factor of lr, factor of weight decay), each name once",
)
