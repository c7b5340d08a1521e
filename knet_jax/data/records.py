"""The one form in which every dataset is stored: pictures with annotations in ArrayRecord, by TFDS.

A dataset says what it holds (`Examples`); `RecordBuilder` writes it, once, without TensorFlow. What
the loader must know without reading a picture (sizes, number of things) stands in the metadata, so
that pictures are grouped by orientation before the first one is decoded.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
import tqdm

from knet_jax.data.annotations import by_task
from knet_jax.segmentation.segments import Categories

RECORDS_PER_FILE = 1000
"""TFDS keeps the records of a file in memory while it writes the file."""


class Record(NamedTuple):
    """A picture with its annotation, as stored."""

    image: bytes
    """The encoded picture."""
    image_id: int
    """The id that the dataset's own files use, or a position."""
    file_name: str
    """As the dataset's own files call it, which may be with subfolders."""
    size: tuple[int, int]
    """Height and width."""
    annotation: Any
    """Of the kind that the task needs, see `kinds`."""


class Examples(NamedTuple):
    """A split of a dataset, found to be sound and ready to be written."""

    categories: Categories
    count: int
    records: Iterable[Record]
    """Read or drawn as they are asked for, `count` of them."""
    problems: Sequence[str]
    """What is wrong with the dataset, a line each."""


@dataclasses.dataclass
class SplitConfig(tfds.core.BuilderConfig):
    """Which split a builder writes; `name` tells apart splits that differ in anything."""

    split: str = ""
    task: str = ""
    """What the annotations are for, a key of `kinds.KINDS`."""


def config_name(task: str, split: str, *facts: object) -> str:
    """A name for a split that changes with the task and with any of some facts."""
    digest = hashlib.sha256(repr(facts).encode()).hexdigest()[:10]
    return f"{task}-{split}-{digest}"


class RecordBuilder(tfds.core.ShardBasedBuilder, abc.ABC, skip_registration=True):
    """Writes one split of a dataset; a subclass has a `name` and knows its `examples`.

    A split is prepared on its own: evaluation needs no training pictures. Records are written as
    they come. TFDS' builders that sort do so on disk beyond a gigabyte, and need TensorFlow for it
    (test_records_are_written_in_order_to_several_files).
    """

    VERSION = tfds.core.Version("1.0.0")

    @abc.abstractmethod
    def examples(self) -> Examples:
        """Examines the split. Raises ValueError when it cannot be used."""

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 3)),
                    "image_id": np.int64,
                    "file_name": tfds.features.Text(),
                    **by_task.find(self.builder_config.task).features(),
                }
            ),
            disable_shuffling=True,
            metadata=tfds.core.MetadataDict(),
        )

    def _shard_iterators_per_split(self, dl_manager):
        del dl_manager
        examples = self.examples()
        # One pass over the records, of which every file takes its part in turn.
        encoded = self._encode(examples)
        files = [functools.partial(itertools.islice, encoded, RECORDS_PER_FILE)]
        files *= (examples.count - 1) // RECORDS_PER_FILE
        return {self.builder_config.split: [*files, functools.partial(iter, encoded)]}

    def _encode(self, examples: Examples) -> Iterator[tuple[int, dict]]:
        kind = by_task.find(self.builder_config.task)
        sizes, things = [], []
        columns: dict[str, np.ndarray] = {}
        progress = tqdm.tqdm(
            examples.records, f"Writing {self.builder_config.split}", examples.count, unit="img"
        )
        for i, record in enumerate(progress):
            num_things, tallied = kind.tally(record.annotation, record.size, examples.categories)
            columns = {name: columns.get(name, 0) + values for name, values in tallied.items()}
            sizes.append(list(record.size))
            things.append(num_things)
            yield (
                i,
                {
                    "image": record.image,
                    "image_id": record.image_id,
                    "file_name": record.file_name,
                    **kind.encode(record.annotation),
                },
            )
        # Small, and readable as JSON.
        self.info.metadata.update(
            {
                "task": self.builder_config.task,
                "categories": examples.categories._asdict(),
                "sizes": sizes,
                "things": things,
                "columns": {name: values.tolist() for name, values in columns.items()},
                "problems": list(examples.problems),
            }
        )


def describe(metadata: dict, max_problems: int = 20) -> str:
    """What a prepared split holds, as a text for people: counts, classes, problems."""
    categories = Categories.of(metadata["categories"])
    num_pixels = sum(height * width for height, width in metadata["sizes"])
    describe_ = by_task.find(metadata["task"]).describe
    headline, texts = describe_(metadata["columns"], num_pixels)
    lines = [
        f"{len(metadata['sizes'])} images, {headline}",
        f"{categories.num_things} thing and {categories.num_stuff} stuff classes",
    ]
    width = max(len(name) for name in categories.names)
    for label, (name, text) in enumerate(zip(categories.names, texts)):
        kind = "thing" if label < categories.num_things else "stuff"
        lines.append(f"  {name:<{width}}  {kind}  {text}")
    problems = metadata["problems"]
    lines.append(f"{len(problems)} problems" + (":" if problems else ""))
    lines += [f"  {problem}" for problem in problems[:max_problems]]
    if len(problems) > max_problems:
        lines.append(f"  … and {len(problems) - max_problems} more")
    return "\n".join(lines)
