"""The classes of a network whose dataset is not at hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from knet_jax.segmentation import class_lists, coco_files, published_classes
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
    ids = range(1, 1 + len(names))
    return Categories.of({"names": names, "dataset_ids": [*ids], "num_things": num_things})


def _read_categories(config: ConfigDict, file: Path) -> Categories:
    called = f"--categories={file}"
    if not file.is_file():
        raise UserError(f"{called}: there is no such file")
    with naming_file(called):
        if file.suffix == ".json":
            is_instance = config.task == "instance"
            read = class_lists.read_coco_things if is_instance else class_lists.read_coco_categories
            categories = read(coco_files.parse(file.read_bytes())["categories"])
        else:
            names = class_lists.parse_class_list(file.read_text(encoding="utf-8-sig"), "it")
            categories = _number([*names.values()], config.model.num_things)
        if config.task == "semantic":
            categories = categories._replace(num_things=0)
        class_lists.check_class_counts(config, categories)
    return categories
