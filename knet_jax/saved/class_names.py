"""The classes of a network whose dataset is not at hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from knet_jax.segmentation import class_lists, published_classes
from knet_jax.segmentation.class_lists import check_class_counts
from knet_jax.segmentation.segments import Categories
from knet_jax.system.errors import UserError

SAME = 0.9
"""The least share of names in which two lists of the same classes agree; some are spelled anew."""


def find_categories(
    config: ConfigDict, listed: Sequence[str], file: Path | None = None
) -> tuple[Categories, str]:
    """The classes of a network, and where their names come from.

    Args:
      config: of the network.
      listed: names that the file of weights has, in order, or none.
      file: a JSON in COCO's form, or a text with one name a line, things first.

    Raises:
      UserError: the file is something else, or lists another number of classes.
    """
    num_things = config.model.num_things
    num_classes = num_things + config.model.num_stuff
    if file:
        categories = read_given_categories(file, config.task, num_things, num_classes)
        try:
            check_class_counts(config, categories)
        except ValueError as error:
            raise UserError(f"--categories={file}: {error}") from error
        return categories, str(file)
    published = published_classes.find(config.data.dataset, config.task)
    if published and (len(published.names), published.num_things) != (num_classes, num_things):
        published = None
    if len(listed) == num_classes:
        numbers = tuple(range(1, 1 + num_classes))
        own = Categories(tuple(listed), numbers, num_things), "the checkpoint"
        if not published:
            return own
        same = sum(a == b for a, b in zip(listed, published.names)) / num_classes
        return (published, "the dataset") if same >= SAME else own
    if published:
        return published, "the dataset"
    names = tuple(f"class {i}" for i in range(1, 1 + num_classes))
    return Categories(names, tuple(range(1, 1 + num_classes)), num_things), "nowhere"


def read_given_categories(file: Path, task: str, num_things: int, num_classes: int) -> Categories:
    """Classes from a JSON in COCO's form, or from a text, which has so many names.

    Raises:
      UserError: there is no such file, or it is neither.
    """
    if not file.is_file():
        raise UserError(f"--categories={file}: there is no such file")
    try:
        text = file.read_text(encoding="utf-8-sig")
        if file.suffix == ".json":
            content = json.loads(text)["categories"]
            read = (
                class_lists.read_coco_things
                if task == "instance"
                else class_lists.read_coco_categories
            )
            categories = read(content)
            return categories._replace(num_things=0) if task == "semantic" else categories
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"--categories={file}: accepted are a JSON with COCO's categories, and a text with one "
            f"name a line: {error!r:.100}"
        ) from error
    try:
        names = tuple(class_lists.parse_class_list(text, f"--categories={file}").values())
    except ValueError as error:
        raise UserError(str(error)) from error
    if len(names) != num_classes:
        raise UserError(f"--categories={file} lists {len(names)} names; accepted: {num_classes}")
    return Categories(names, tuple(range(1, 1 + num_classes)), num_things)
