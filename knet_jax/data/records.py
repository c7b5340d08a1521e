"""The one form in which every dataset is stored: pictures with annotations in ArrayRecord, by TFDS.

A dataset says what it holds (`Examples`); `shards` writes it, once, without TensorFlow. What the loader
must know without reading a picture (sizes, number of things) stands in arrays beside the records, so that
pictures are grouped by orientation before the first one is decoded.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from knet_jax.data.annotations import by_task
from knet_jax.data.annotations.kind import Record
from knet_jax.segmentation.segments import Categories
from knet_jax.system.errors import UserError

VERSION = tfds.core.Version("1.0.0")
"""To be raised when the form of the records changes, so that older ones are prepared anew."""
COLUMNS = ("sizes.npy", "things.npy")
"""Files beside the records, a row for each: height and width, int32 [N, 2]; number of things, int32 [N]."""
MAX_PROBLEMS = 20
"""How many problems of a dataset are shown."""


class Unfit(UserError):
    """Something of one picture that makes the whole dataset unfit for use."""


class Examples(NamedTuple):
    """A split of a dataset, ready to be read picture by picture, by several processes."""

    categories: Categories
    count: int
    """How many entries there are."""
    entries: Iterable[tuple[str, Any]]
    """For each picture its name, for messages, and what `read` takes."""
    read: Callable[[Any], tuple[Record, Sequence[str]]]
    """Reads and decodes a picture: its record, and what is wrong with parts of it. Any error means that
    the picture is left out, but `Unfit` ends the preparation. Like its argument it can be pickled."""
    problems: Sequence[str]
    """What else is wrong with the dataset, a line each."""
    place: str
    """Begins the message where no picture shows anything; "" where that is no mistake."""


class Source(NamedTuple):
    """A split of a dataset, found but not read yet."""

    dataset: str
    """Name of the folder of prepared splits."""
    name: str
    """Name of the folder of this split: task, split, and a digest of facts about the files (paths, sizes,
    times), so that changed data is prepared anew."""
    split: str
    task: str
    examine: Callable[[], Examples]
    """Lists the pictures. Raises UserError where the dataset cannot be used."""


def config_name(task: str, split: str, *facts: object) -> str:
    """The name of a prepared split: task, split, and a digest of facts such as those of its files."""
    digest = hashlib.sha256(repr(facts).encode()).hexdigest()[:10]
    return f"{task}-{split}-{digest}"


def data_dir(config_data) -> Path:
    """The folder of all prepared datasets: `config.data.data_dir`, or TFDS' default."""
    given = config_data.data_dir or os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    return Path(os.path.expanduser(given))


def features(task: str) -> tfds.features.FeaturesDict:
    """What a record of a task holds."""
    return tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "image_id": np.int64,
            "file_name": tfds.features.Text(),
            **by_task.KINDS[task].features(),
        }
    )


def digest(metadata: Mapping[str, Any], columns: Sequence[Path]) -> str:
    """A digest of what metadata.json holds, but for the digest itself, and of the files of `COLUMNS`."""
    content = {key: value for key, value in metadata.items() if key != "digest"}
    found = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
    for path in columns:
        with path.open("rb") as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()


def describe(metadata: Mapping[str, Any], count: int, num_pixels: int) -> str:
    """What a prepared split of so many pictures and pixels holds, as a text for people."""
    categories = Categories.of(metadata["categories"])
    kind = by_task.KINDS[metadata["task"]](categories)
    summary, texts = kind.describe(metadata["columns"], num_pixels)
    lines = [
        f"{count} images, {summary}",
        f"{categories.num_things} thing and {categories.num_stuff} stuff classes",
    ]
    width = max(len(name) for name in categories.names)
    for label, (name, text) in enumerate(zip(categories.names, texts)):
        what = "thing" if label < categories.num_things else "stuff"
        lines.append(f"  {name:<{width}}  {what}  {text}")
    problems = metadata["problems"]
    lines.append(f"{len(problems)} problems" + (":" if problems else ""))
    lines += [f"  {problem}" for problem in problems[:MAX_PROBLEMS]]
    if len(problems) > MAX_PROBLEMS:
        lines.append(f"  … and {len(problems) - MAX_PROBLEMS} more")
    return "\n".join(lines)
