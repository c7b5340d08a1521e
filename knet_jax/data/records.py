"""The one form in which every dataset is stored: panoptic records in ArrayRecord, written by TFDS.

A dataset says what it holds (`Examples`); `RecordBuilder` writes it, once, without TensorFlow. What
the loader must know without reading a picture (sizes, number of things) stands in the metadata, so
that pictures are grouped by orientation before the first one is decoded.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import tensorflow_datasets as tfds
import tqdm

from knet_jax.structs import Categories

RECORDS_PER_FILE = 1000
"""TFDS keeps the records of a file in memory while it writes the file."""


class RecordSegment(NamedTuple):
    """One segment of a stored picture."""

    id: int
    """What the panoptic PNG holds at its pixels: R + 256 G + 65536 B, never 0."""
    label: int
    """Class, things first."""
    iscrowd: bool
    area: int
    """Number of its pixels, always positive."""


class Record(NamedTuple):
    """A picture with its panoptic annotation, as stored."""

    image: bytes
    """The encoded picture."""
    image_id: int
    """The id that the dataset's own files use."""
    file_name: str
    panoptic: bytes
    """PNG whose pixels hold segment ids in COCO's way: R + 256 G + 65536 B, 0 = void."""
    size: tuple[int, int]
    """Height and width."""
    segments: Sequence[RecordSegment]


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
                    "panoptic": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
                    "segments": tfds.features.Sequence(
                        {"id": np.int64, "label": np.int64, "iscrowd": np.bool_, "area": np.int64}
                    ),
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
        sizes, segments = [], []
        progress = tqdm.tqdm(
            examples.records, f"Writing {self.builder_config.split}", examples.count, unit="img"
        )
        for i, record in enumerate(progress):
            sizes.append(record.size)
            segments.append(record.segments)
            features = record._asdict()
            del features["size"]
            features["segments"] = [segment._asdict() for segment in record.segments]
            yield i, features
        self.info.metadata.update(_metadata(examples, sizes, segments))


def _metadata(
    examples: Examples,
    sizes: Sequence[tuple[int, int]],
    segments: Sequence[Sequence[RecordSegment]],
) -> dict:
    """What is kept beside the records: small, and readable as JSON."""
    num_things = examples.categories.num_things
    counts = np.zeros((2, len(examples.categories.names)), int)
    for segment in itertools.chain.from_iterable(segments):
        counts[int(segment.iscrowd), segment.label] += 1
    return {
        "categories": examples.categories._asdict(),
        "sizes": [list(size) for size in sizes],
        "things": [
            sum(s.label < num_things and not s.iscrowd for s in listed) for listed in segments
        ],
        "segments_per_class": counts[0].tolist(),
        "crowds_per_class": counts[1].tolist(),
        "problems": list(examples.problems),
    }


def read_categories(metadata: dict) -> Categories:
    """The classes of a prepared split, from its metadata."""
    stored = metadata["categories"]
    return Categories(
        tuple(stored["names"]), tuple(stored["dataset_ids"]), int(stored["num_things"])
    )


def describe(metadata: dict, max_problems: int = 20) -> str:
    """What a prepared split holds, as a text for people: counts, classes, problems."""
    categories = read_categories(metadata)
    segments, crowds = metadata["segments_per_class"], metadata["crowds_per_class"]
    lines = [
        f"{len(metadata['sizes'])} images, {sum(segments)} segments, {sum(crowds)} crowds",
        f"{categories.num_things} thing and {categories.num_stuff} stuff classes",
    ]
    width = max(len(name) for name in categories.names)
    for label, name in enumerate(categories.names):
        kind = "thing" if label < categories.num_things else "stuff"
        crowd = f" + {crowds[label]} crowd" if crowds[label] else ""
        lines.append(f"  {name:<{width}}  {kind}  {segments[label]:>8}{crowd}")
    problems = metadata["problems"]
    lines.append(f"{len(problems)} problems" + (":" if problems else ""))
    lines += [f"  {problem}" for problem in problems[:max_problems]]
    if len(problems) > max_problems:
        lines.append(f"  … and {len(problems) - max_problems} more")
    return "\n".join(lines)
