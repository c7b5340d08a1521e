"""Lists of classes: read from files, and compared with each other and with a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from knet_jax.segmentation.segments import Categories
from knet_jax.system.errors import UserError


def check_class_counts(config: ConfigDict, categories: Categories) -> None:
    """Checks that a network has as many classes as the data.

    In semantic segmentation things count as stuff.

    Raises:
        UserError: the counts differ.
    """
    num_things = categories.num_things if config.model.num_proposals else 0
    counts = {"num_things": num_things, "num_stuff": len(categories.names) - num_things}
    for name, wanted in counts.items():
        have = config.model[name]
        if have != wanted:
            raise UserError(
                f"config.model.{name} is {have}, but the data lists {wanted}; "
                f"use --config.model.{name}={wanted}"
            )


def check_trained_classes(saved: dict[str, Any], categories: Categories) -> None:
    """Checks that a checkpoint was trained on the classes of the data.

    Args:
        saved: `Categories._asdict()`, as the checkpoint keeps it.
        categories: of the data.

    Raises:
        UserError: the names differ.
    """
    old, new = list(saved["names"]), list(categories.names)
    if old != new:
        pairs = enumerate(zip_longest(old, new, fillvalue="absent"))
        first, (was, now) = next((i, pair) for i, pair in pairs if pair[0] != pair[1])
        raise UserError(
            f"config.data.root: class {first} of the data is {now!r}, "
            f"but the checkpoint was trained with {was!r} there"
        )


def check_same_classes(train: Categories, val: Categories) -> None:
    """Checks that two splits have the same classes. Raises UserError where they differ."""
    if train != val:
        pairs = zip_longest(zip(*train[:2]), zip(*val[:2]))
        first = next(((a, b) for a, b in pairs if a != b), (train.num_things, val.num_things))
        raise UserError(
            "config.data.root: the annotations of config.data.train_split and "
            f"config.data.val_split list different categories, first {first[0]} and {first[1]}"
        )


def flag(entry: Mapping, key: str, default: int = 0) -> bool:
    """A yes or no of a JSON file, such as `isthing` or `iscrowd`.

    Args:
        entry: of the file.
        key: of the answer.
        default: the answer where the entry has none.

    Raises:
        UserError: the value is neither 0 nor 1. (Python would take the text "0" for yes.)
    """
    value = entry.get(key, default)
    if value not in (0, 1):
        raise UserError(f"{key} is {value!r}; accepted: 0 and 1")
    return bool(value)


def read_coco_categories(listed: Sequence[Mapping]) -> Categories:
    """The classes of COCO's list of categories: things first, else in the order of the list.

    A category that does not say whether it is a thing is one.

    Raises:
        UserError: an id occurs twice, or the list is empty.
    """
    if not listed:
        raise UserError("its list of categories is empty")
    ordered = sorted(listed, key=lambda category: not flag(category, "isthing", 1))
    ids = [int(category["id"]) for category in ordered]
    if len(set(ids)) != len(ids):
        raise UserError(f"category ids must differ from each other, got {ids}")
    names = tuple(str(category["name"]) for category in ordered)
    num_things = sum(flag(category, "isthing", 1) for category in ordered)
    return Categories(names, tuple(ids), num_things)


def read_coco_things(listed: Sequence[Mapping]) -> Categories:
    """The classes of the categories of an instance file: all are things, whatever they say.

    Raises:
        UserError: an id occurs twice, or the list is empty.
    """
    return read_coco_categories([{**category, "isthing": 1} for category in listed])


def read_class_list(
    path: Path, ignore_index: int, source: str = "config.data.classes"
) -> Categories:
    """The classes of a text file that names one on every line.

    Args:
        path: of the file.
        ignore_index: the line, counted from 0, that is no class.
        source: the option that the user gave the file with, for messages.

    Raises:
        UserError: a class has no name, two have the same, there is none, or it is no text.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{source}: {path} must be text in UTF-8") from error
    return stuff_categories(parse_class_list(text, f"{source}: {path}", ignore_index))


def parse_class_list(text: str, called: str, ignore_index: int | None = None) -> dict[int, str]:
    """The names of classes, by the number of their line.

    Args:
        text: names a class on every line.
        called: how messages call the text.
        ignore_index: a line, counted from 0, that is no class.

    Raises:
        UserError: a class has no name, two have the same, or there is none.
    """
    lines = [line.strip() for line in text.rstrip().splitlines()]
    names = {i: name for i, name in enumerate(lines) if i != ignore_index}
    if not names or not all(names.values()) or len(set(names.values())) != len(names):
        raise UserError(f"{called} must name a class on every line, each another one")
    return names


def stuff_categories(names: Mapping[int, str]) -> Categories:
    """Classes from {dataset id: name}; all are stuff, as in semantic segmentation."""
    return Categories(tuple(names.values()), tuple(names), num_things=0)
