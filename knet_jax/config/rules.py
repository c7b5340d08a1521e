"""Rules for the values of a config: a test, and in words what passes it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from knet_jax.system.errors import UserError, suggest

Rule = tuple[Callable[[Any], bool], str]
"""The test of a value, and what is accepted in words."""


def number(value: Any) -> bool:
    """A finite number."""
    kind = isinstance(value, int | float) and not isinstance(value, bool)
    return kind and math.isfinite(value)


def positive(value: Any) -> bool:
    """A number above 0."""
    return number(value) and value > 0


def non_negative(value: Any) -> bool:
    """A number of at least 0."""
    return number(value) and value >= 0


def count(value: Any) -> bool:
    """A whole number of at least 0."""
    return isinstance(value, int) and non_negative(value)


def at_least_one(value: Any) -> bool:
    """A whole number of at least 1."""
    return isinstance(value, int) and positive(value)


def share(value: Any) -> bool:
    """A number from 0 to 1."""
    return non_negative(value) and value <= 1


def several(test: Callable[[Any], bool], number_of: int) -> Callable[[Any], bool]:
    """So many values that pass a test."""
    return lambda value: (
        isinstance(value, tuple) and len(value) == number_of and all(map(test, value))
    )


def pair(test: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Two values that pass a test."""
    return several(test, 2)


def one_of(*choices: Any) -> Rule:
    """One of some values."""
    return lambda value: value in choices, ", ".join(map(str, choices))


NONE = (lambda value: count(value) and value == 0, "0")
ZERO = (count, "a whole number of at least 0")
SEED = (
    lambda value: count(value) and value < 2**32,
    "a whole number of at least 0, less than 2 ** 32",
)
ONE = (at_least_one, "a whole number of at least 1")
YES_NO = (lambda value: isinstance(value, bool), "True or False")
SOME = (
    lambda value: isinstance(value, tuple) and len(value) > 0 and all(map(at_least_one, value)),
    "whole numbers of at least 1, such as (1, 2, 3)",
)


def check(values: Mapping[str, Any], rules: Mapping[str, Rule], where: str = "") -> None:
    """Compares values with rules, both by their paths below `config`.

    Raises:
      UserError: a value is missing or breaks its rule.
    """
    for key, (test, accepted) in rules.items():
        if key not in values:
            raise UserError(f"config.{key} is missing; accepted: {accepted}{where}")
        if not test(values[key]):
            raise UserError(f"config.{key} is {values[key]!r}; accepted: {accepted}{where}")


def check_names(path: str, given: Iterable[str], accepted: Iterable[str]) -> None:
    """Raises UserError with the nearest accepted key where a section has one that is not."""
    for name in given:
        if name not in accepted:
            raise UserError(f"there is no key config.{path}.{name}; {suggest(name, accepted)}")
