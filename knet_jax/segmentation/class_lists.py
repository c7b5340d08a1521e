"""Lists of classes: read from files, and compared with each other and with a network."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from knet_jax.segmentation.segments import Categories
from knet_jax.system.errors import UserError


def check_class_counts(config: ConfigDict, categories: Categories) -> None:
    """Raises ValueError where the network has other class counts than the data.

    To semantic segmentation things are stuff like the rest.
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
    """Raises ValueError where a checkpoint was trained on other classes than the data lists."""
    old, new = list(saved["names"]), list(categories.names)
    if old != new:
        pairs = enumerate(zip_longest(old, new, fillvalue="absent"))
        first, (was, now) = next((i, pair) for i, pair in pairs if pair[0] != pair[1])
        raise UserError(
            f"config.data.root: class {first} of the data is {now!r}, "
            f"but the checkpoint was trained with {was!r} there"
        )


def check_same_classes(train: Categories, val: Categories) -> None:
    """Raises ValueError where two splits differ in their classes."""
    if train != val:
        pairs = itertools.zip_longest(zip(*train[:2]), zip(*val[:2]))
        first = next(((a, b) for a, b in pairs if a != b), (train.num_things, val.num_things))
        raise UserError(
            "config.data.root: the annotations of config.data.train_split and "
            f"config.data.val_split list different categories, first {first[0]} and {first[1]}"
        )


def flag(entry: Mapping, key: str, default: int = 0) -> bool:
    """What an entry of the file says to a question.

    Raises:
        ValueError: neither 0 nor 1; a text, such as "0", would count as yes.
    """
    value = entry.get(key, default)
    if value not in (0, 1):
        raise UserError(f"{key} is {value!r}; accepted: 0 and 1")
    return bool(value)


def read_coco_categories(listed: Sequence[Mapping]) -> Categories:
    """Orders a file's category list things first, else as it stands.

    A category that does not say whether it is a thing is one.

    Raises:
        ValueError: an id occurs twice, or there is none.
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
    """The categories of a file of instances, as they stand: all are things, whatever they say.

    Raises:
        ValueError: an id occurs twice, or there is none.
    """
    return read_coco_categories([{**category, "isthing": 1} for category in listed])


def read_class_list(
    path: Path, ignore_index: int, source: str = "config.data.classes"
) -> Categories:
    """The classes of a text file, a line each; the one at `ignore_index` is none.

    Errors call the file what the user has given it as, its `source`.

    Raises:
        ValueError: a class has no name, two have the same, there is none, or it is no text.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{source}: {path} must be text in UTF-8") from error
    return stuff_categories(parse_class_list(text, f"{source}: {path}", ignore_index))


def parse_class_list(text: str, called: str, ignore_index: int | None = None) -> dict[int, str]:
    """The names of classes, a line each, by the index of the line; one line may be ignored.

    Raises:
        ValueError: a class has no name, two have the same, or there is none; errors begin with
            what the text is `called`.
    """
    lines = [line.strip() for line in text.rstrip().splitlines()]
    names = {i: name for i, name in enumerate(lines) if i != ignore_index}
    if not names or not all(names.values()) or len(set(names.values())) != len(names):
        raise UserError(f"{called} must name a class on every line, each another one")
    return names


def stuff_categories(names: Mapping[int, str]) -> Categories:
    """Classes from their names by index; nothing is told apart within one, so all are stuff."""
    return Categories(tuple(names.values()), tuple(names), num_things=0)
