"""The one form in which every dataset is stored: pictures with annotations in ArrayRecord, by TFDS.

A dataset says what it holds (`Examples`); `RecordBuilder` writes it, once, without TensorFlow. What
the loader must know without reading a picture (sizes, number of things) stands in the metadata, so
that pictures are grouped by orientation before the first one is decoded.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
import tqdm

from knet_jax.data.annotations import by_task
from knet_jax.data.annotations.kind import Record
from knet_jax.segmentation.segments import Categories

VERSION = tfds.core.Version("1.0.0")
"""To be raised when the form of the records changes, so that older ones are prepared anew."""
RECORDS_PER_FILE = 1000
"""TFDS keeps the records of a file in memory while it writes the file."""
MAX_PROBLEMS = 20
"""How many problems of a dataset are shown."""


class Examples(NamedTuple):
    """A split of a dataset, examined and ready to be written."""

    categories: Categories
    count: int
    records: Iterable[Record]
    """`count` of them, each read or drawn when it is asked for."""
    problems: Sequence[str]
    """What is wrong with the dataset, a line each."""


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
    """Reads the files. Raises UserError where they cannot be used."""


def config_name(task: str, split: str, *facts: object) -> str:
    """The name of a prepared split: task, split, and a digest of facts such as those of its files."""
    digest = hashlib.sha256(repr(facts).encode()).hexdigest()[:10]
    return f"{task}-{split}-{digest}"


def data_dir(config_data) -> Path:
    """The folder of all prepared datasets: `config.data.data_dir`, or TFDS' default."""
    given = config_data.data_dir or os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    return Path(os.path.expanduser(given))


class RecordBuilder(tfds.core.ShardBasedBuilder, skip_registration=True):
    """Writes one split of a dataset.

    A split is prepared on its own: evaluation needs no training pictures. Records are written as
    they come. TFDS' builders that sort do so on disk beyond a gigabyte, and need TensorFlow for it
    (test_records_are_written_in_order_to_several_files).

    Args:
        source: what to write.
        data_dir: folder of all prepared datasets.
    """

    VERSION = VERSION

    def __init__(self, source: Source, data_dir: Path):
        self.name = source.dataset
        self._source = source
        super().__init__(config=tfds.core.BuilderConfig(name=source.name), data_dir=data_dir)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 3)),
                    "image_id": np.int64,
                    "file_name": tfds.features.Text(),
                    **by_task.KINDS[self._source.task].features(),
                }
            ),
            disable_shuffling=True,
            metadata=tfds.core.MetadataDict(),
        )

    def _shard_iterators_per_split(self, _):
        examples = self._source.examine()
        # One pass over the records, of which every file takes its part in turn.
        encoded = self._encode(examples)
        files = [functools.partial(itertools.islice, encoded, RECORDS_PER_FILE)]
        files *= (examples.count - 1) // RECORDS_PER_FILE
        return {self._source.split: [*files, functools.partial(iter, encoded)]}

    def _encode(self, examples: Examples) -> Iterator[tuple[int, dict]]:
        kind = by_task.KINDS[self._source.task](examples.categories)
        sizes, things = [], []
        columns: dict[str, np.ndarray] = {}
        title = f"Writing {self._source.split}"
        progress = tqdm.tqdm(examples.records, title, examples.count, unit="img")
        for i, record in enumerate(progress):
            num_things, counts = kind.tally(record)
            columns = {name: columns.get(name, 0) + values for name, values in counts.items()}
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
        metadata = {
            "task": self._source.task,
            "categories": examples.categories._asdict(),
            "sizes": sizes,
            "things": things,
            "columns": {name: values.tolist() for name, values in columns.items()},
            "problems": list(examples.problems),
        }
        self.info.metadata.update(metadata | {"digest": digest(metadata)})


def digest(metadata: Mapping[str, Any]) -> str:
    """A digest of the metadata of a prepared split, but for the one that they hold themselves."""
    content = {key: value for key, value in metadata.items() if key != "digest"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def describe(metadata: Mapping[str, Any]) -> str:
    """What a prepared split holds, as a text for people: counts, classes, problems."""
    categories = Categories.of(metadata["categories"])
    summary, texts = by_task.KINDS[metadata["task"]](categories).describe(metadata)
    lines = [
        f"{len(metadata['sizes'])} images, {summary}",
        f"{categories.num_things} thing and {categories.num_stuff} stuff classes",
    ]
    width = max(len(name) for name in categories.names)
    for label, (name, text) in enumerate(zip(categories.names, texts)):
        kind = "thing" if label < categories.num_things else "stuff"
        lines.append(f"  {name:<{width}}  {kind}  {text}")
    problems = metadata["problems"]
    lines.append(f"{len(problems)} problems" + (":" if problems else ""))
    lines += [f"  {problem}" for problem in problems[:MAX_PROBLEMS]]
    if len(problems) > MAX_PROBLEMS:
        lines.append(f"  … and {len(problems) - MAX_PROBLEMS} more")
    return "\n".join(lines)
