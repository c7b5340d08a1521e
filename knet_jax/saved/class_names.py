"""The classes of a network whose dataset is not at hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from knet_jax.segmentation import class_lists, published_classes
from knet_jax.segmentation.segments import Categories
from knet_jax.system.errors import UserError, naming_file

MIN_AGREEMENT = 0.9
"""The least share of equal names in two lists of the same classes; some are spelled differently."""


def find_categories(
    config: ConfigDict, listed: Sequence[str], file: Path | None = None
) -> tuple[Categories, str]:
    """Finds the classes of a network.

    Args:
        config: that of the network.
        listed: names that the file of weights has, in order, or none.
        file: a JSON in COCO's form, or a text with one name a line, things first.

    Returns:
        The classes, and where their names come from.

    Raises:
        UserError: the file is something else, or lists another number of classes.
    """
    if file:
        return _read_categories(config, file), str(file)
    num_things = config.model.num_things
    num_classes = num_things + config.model.num_stuff
    published = published_classes.find(config.data.dataset, config.task)
    if published and (len(published.names), published.num_things) != (num_classes, num_things):
        published = None
    if len(listed) == num_classes:
        names = published.names if published else ()
        if sum(map(str.__eq__, listed, names)) < MIN_AGREEMENT * num_classes:
            return _number(listed, num_things), "the checkpoint"
    if published:
        return published, "the dataset"
    return _number([f"class {i}" for i in range(1, 1 + num_classes)], num_things), "nowhere"


def _number(names: Sequence[str], num_things: int) -> Categories:
    ids = list(range(1, 1 + len(names)))
    return Categories.of({"names": names, "dataset_ids": ids, "num_things": num_things})


def _read_categories(config: ConfigDict, file: Path) -> Categories:
    called = f"--categories={file}"
    if not file.is_file():
        raise UserError(f"{called}: there is no such file")
    try:
        text = file.read_text(encoding="utf-8-sig")
        listed = json.loads(text)["categories"] if file.suffix == ".json" else None
        if config.task == "instance" and listed:
            categories = class_lists.read_coco_things(listed)
        elif listed is not None:
            categories = class_lists.read_coco_categories(listed)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{called}: accepted are a JSON with COCO's categories, and a text with one name a "
            f"line: {error!r:.100}"
        ) from error
    if listed is None:
        names = list(class_lists.parse_class_list(text, called).values())
        num_classes = config.model.num_things + config.model.num_stuff
        if len(names) != num_classes:
            raise UserError(f"{called} lists {len(names)} names; accepted: {num_classes}")
        return _number(names, config.model.num_things)
    if config.task == "semantic":
        categories = categories._replace(num_things=0)
    with naming_file(called):
        class_lists.check_class_counts(config, categories)
    return categories
