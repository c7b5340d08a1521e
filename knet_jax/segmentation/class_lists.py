"""Lists of classes: read from files, and compared with each other and with a network."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from knet_jax.segmentation.segments import Categories, printable
from knet_jax.system.errors import UserError, naming_file


def check_class_counts(config: ConfigDict, categories: Categories) -> None:
    """Checks that a network has as many classes as the data.

    In semantic segmentation things count as stuff.

    Raises:
        UserError: the counts differ.
    """
    for name, wanted in class_counts(config, categories).items():
        have = config.model[name]
        if have != wanted:
            raise UserError(
                f"config.model.{name} is {have}, but the data lists {wanted}; "
                f"use --config.model.{name}={wanted}"
            )


def class_counts(config: ConfigDict, categories: Categories) -> dict[str, int]:
    """`num_things` and `num_stuff` of a network for the classes of the data."""
    num_things = categories.num_things if config.model.num_proposals else 0
    return {"num_things": num_things, "num_stuff": len(categories.names) - num_things}


def check_trained_classes(saved: dict[str, Any], categories: Categories) -> None:
    """Checks that a checkpoint, which keeps `Categories._asdict()`, has the classes of the data.

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
    """A yes or no of an entry of a JSON file, such as `isthing` or `iscrowd`.

    Raises:
        UserError: the value is neither 0 nor 1. (Python would take the text "0" for yes.)
    """
    value = entry.get(key, default)
    if value not in (0, 1):
        raise UserError(f"{key} is {value!r:.40}; accepted: 0 and 1")
    return bool(value)


def read_coco_categories(listed: Sequence[Mapping]) -> Categories:
    """The classes of COCO's list of categories: things first, else in the order of the list.

    A category that does not say whether it is a thing is one; a name may be a number.

    Raises:
        UserError: the list is empty, or a name, an id or `isthing` makes no sense.
    """
    ordered = sorted(listed, key=lambda category: not flag(category, "isthing", 1))
    names = [category.get("name") for category in ordered]
    return Categories.of(
        {
            "names": [str(name) if isinstance(name, int) else name for name in names],
            "dataset_ids": [category.get("id") for category in ordered],
            "num_things": sum(flag(category, "isthing", 1) for category in ordered),
        }
    )


def read_coco_things(listed: Sequence[Mapping]) -> Categories:
    """The classes of the categories of an instance file: all are things, whatever they say.

    Raises:
        UserError: the list is empty, or a name or an id makes no sense.
    """
    return read_coco_categories([{**category, "isthing": 1} for category in listed])


def read_class_list(
    path: Path, ignore_index: int, source: str = "config.data.classes"
) -> tuple[Categories, dict[int, int]]:
    """The classes of a text file that names one on every line, perhaps with its color.

    Args:
        ignore_index: the line, counted from 0, that is no class.
        source: the option that the user gave the file with, for messages.

    Returns:
        the classes, all of them stuff; and {R + 256 G + 65536 B: line}, empty unless every line
        has a color.

    Raises:
        UserError: a class has no name, two have the same name or color, there is none, or the file
            is no text.
    """
    called = f"{source}: {path}"
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{called} must be text in UTF-8") from error
    rows = [_colored(line.strip()) for line in text.splitlines() if line[:1] != "#"]
    rows = rows[1:] if rows and not rows[0] else rows  # a table may have a head
    colors = {}
    if rows and all(rows):
        text = "\n".join(row["name"] for row in rows)
        colors = {
            sum(int(row[part]) << shift for part, shift in (("r", 0), ("g", 8), ("b", 16))): line
            for line, row in enumerate(rows)
        }
        if len(colors) < len(rows):
            raise UserError(f"{called} must give every class another color")
    names = parse_class_list(text, called, ignore_index)
    with naming_file(called):
        return stuff_categories(names), colors


def _colored(line: str) -> re.Match | None:
    """The name and the color in a line such as `cell 250 50 83`, `cell:250,50,83::`, `0 0 9 cell`."""
    color = r"(?P<r>\d{1,3})[\s,]+(?P<g>\d{1,3})[\s,]+(?P<b>\d{1,3})"
    last = re.fullmatch(rf"(?P<name>.+?)[\s,:]+\(?{color}\)?(:.*)?", line)
    return last or re.fullmatch(rf"{color}[\s,:]+(?P<name>.+)", line)


def parse_class_list(text: str, called: str, ignore_index: int | None = None) -> dict[int, str]:
    """The names of classes, by the number of their line.

    Args:
        called: how messages call the text.
        ignore_index: a line, counted from 0, that is no class.

    Raises:
        UserError: a class has no name, two have the same, or there is none.
    """
    lines = [printable(line) for line in text.rstrip().split("\n")]
    names = {i: name for i, name in enumerate(lines) if i != ignore_index}
    if not names or not all(names.values()) or len(set(names.values())) != len(names):
        raise UserError(f"{called} must name a class on every line, each another one")
    return names


def stuff_categories(names: Mapping[int, str]) -> Categories:
    """Classes from {dataset id: name}; all are stuff, as in semantic segmentation."""
    return Categories.of({"names": [*names.values()], "dataset_ids": [*names], "num_things": 0})
