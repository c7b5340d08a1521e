"""Splits of datasets that have been converted to ArrayRecord, and their conversion."""

from __future__ import annotations

import contextlib
import hashlib
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from knet_jax.data import records
from knet_jax.data.annotations import by_task
from knet_jax.data.annotations.kind import Record
from knet_jax.segmentation import image_files
from knet_jax.segmentation.segments import Categories
from knet_jax.system.errors import UserError
from knet_jax.system.library_logs import silenced

SPEC = re.compile(r"(\w+)(\[[^\[\]]+\])?")
"""A split, or a slice of one in TFDS' notation."""


def split_name(spec: str) -> str:
    """The split that `train` or `train[:8]` takes pictures from. Raises UserError for other texts."""
    match = SPEC.fullmatch(spec)
    if not match:
        raise UserError(
            f"config.data: split '{spec}' must be a name or a slice of one, such as 'train[:8]'"
        )
    return match[1]


def prepare(source: records.Source, data_dir: Path) -> tuple[Path, bool]:
    """Converts a split to ArrayRecord, unless that has been done.

    A split that is interrupted half-way is never taken for whole: TFDS writes to a directory of
    another name (test_killed_preparation_starts_anew).

    Args:
        source: the split.
        data_dir: folder of all prepared datasets.

    Returns:
        the directory of the prepared split, and whether it is new.

    Raises:
        UserError: the dataset cannot be used, or its records cannot be written.
    """
    directory = data_dir / source.dataset / source.name / str(records.VERSION)
    if directory.exists():
        print(
            f"{source.split}: prepared already in {directory} (remove it to prepare anew)",
            flush=True,
        )
        return directory, False
    try:
        # TFDS speaks of downloads and configs; bars and what we log ourselves stay.
        with silenced("tensorflow_datasets"), contextlib.redirect_stdout(io.StringIO()):
            builder = records.RecordBuilder(source, data_dir)
            builder.download_and_prepare(file_format="array_record")
    except (OSError, RuntimeError) as error:  # array_record raises the latter on a full disk
        if directory.exists():
            # Another process has prepared the same split meanwhile.
            return directory, False
        raise UserError(
            f"config.data.data_dir: split '{source.split}' cannot be written to '{data_dir}': {error}"
        ) from error
    print(f"{source.split}: prepared in {directory}", flush=True)
    return directory, True


class Split:
    """Random access to the pictures of a prepared split, or of a slice of it.

    Nothing is decoded before it is asked for. Objects can be sent to other processes.

    Args:
        directory: where the split was prepared.
        spec: its name, or a slice of it in TFDS' notation.

    Raises:
        UserError: the spec is malformed or selects nothing, or files are missing or damaged.
    """

    def __init__(self, directory: Path, spec: str):
        self.name = split_name(spec)
        self.directory = directory
        with self._damage_named():
            builder = tfds.builder_from_directory(directory)
            splits, metadata = builder.info.splits, builder.info.metadata
            if metadata.get("digest", proof := records.digest(metadata)) != proof:
                raise ValueError("metadata.json is not as it was written")
            self.task = metadata["task"]
            self.categories = Categories.of(metadata["categories"])
            self.kind = by_task.KINDS[self.task](self.categories)
            self.columns = metadata["columns"]
            """The sums of the counts of `Kind.tally`, over the whole split."""
            self.description = records.describe(metadata)
            """What the whole split holds, as a text."""
            total = splits[self.name].num_examples
            self.total_sizes = np.array(metadata["sizes"], np.int32).reshape(total, 2)
            """int32 [N, 2]: height and width of all pictures of the split."""
            num_things = np.array(metadata["things"], np.int32).reshape(total)
            missing = [file for file in splits[self.name].filepaths if not Path(file).is_file()]
            if missing:
                raise FileNotFoundError(f"{missing[0]} is missing")
        try:
            [chosen] = tfds.core.ReadInstruction.from_spec(spec).to_absolute(splits)
        except (ValueError, AssertionError) as error:
            raise UserError(f"config.data: split '{spec}' cannot be read: {error}") from error
        with self._damage_named():
            # Pictures are left encoded: decoding is ours.
            decoders = {
                name: tfds.decode.SkipDecoding()
                for name, feature in builder.info.features.items()
                if isinstance(feature, tfds.features.Image)
            }
            self._source = builder.as_data_source(spec, decoders=decoders)
        self.sizes = self.total_sizes[chosen.from_ : chosen.to]
        """int32 [n, 2]: height and width of the pictures."""
        self.num_things = num_things[chosen.from_ : chosen.to]
        """int32 [n]: how many things each picture shows, crowds left out."""
        if not len(self):
            raise UserError(f"config.data: split '{spec}' holds no picture")

    @contextlib.contextmanager
    def _damage_named(self) -> Iterator[None]:
        """Says of any error what can be done: TFDS raises whatever its files lead it to."""
        try:
            yield
        except Exception as error:
            raise UserError(
                f"config.data.data_dir: the prepared split in {self.directory} is damaged; remove "
                f"that folder to prepare it anew ({error!r:.200})"
            ) from error

    def __len__(self) -> int:
        return len(self.sizes)

    def facts(self) -> str:
        """A text that tells splits of other pictures or classes apart."""
        digest = hashlib.sha256(repr((self.task, self.categories)).encode())
        for column in (self.sizes, self.num_things):
            digest.update(column.tobytes())
        return (
            f"{len(self)} pictures, {len(self.categories.names)} classes, {digest.hexdigest()[:10]}"
        )

    def record(self, index: int) -> Record:
        """The picture and the annotation at a position, encoded. Raises UserError where the files
        of the split are damaged."""
        with self._damage_named():
            stored = self._source[int(index)]
            return Record(
                image=stored["image"],
                image_id=int(stored["image_id"]),
                file_name=stored["file_name"].decode(),
                size=tuple(self.sizes[index].tolist()),
                annotation=self.kind.decode(stored),
            )

    def image_id(self, index: int) -> int:
        """The id that the dataset's own files give the picture."""
        return self.record(index).image_id

    def file_name(self, index: int) -> str:
        """The name of the picture's file."""
        return self.record(index).file_name

    def image(self, index: int) -> np.ndarray:
        """The picture, uint8 [H, W, 3], RGB. Raises UserError where it is broken."""
        record = self.record(index)
        return image_files.load_image(record.image, record.size)

    def truth(self, index: int) -> Any:
        """The annotation at original size. Raises UserError where it is broken.

        Returns:
            a `PanopticMap`, a tuple of `Instance`, or for semantic segmentation a map of labels
            [H, W] (0 ignored, 1 + k class k).
        """
        return self.kind.truth(self.kind.load(self.record(index)))
