"""A prepared split, read by position."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from knet_jax.data import records
from knet_jax.data.annotations import by_task
from knet_jax.segmentation import image_files
from knet_jax.segmentation.segments import Categories
from knet_jax.system.errors import UserError

SPEC = re.compile(r"(\w+)(\[[^\[\]]+\])?")


def split_name(spec: str) -> str:
    """The split that a spec such as `train` or `train[:8]` takes pictures from.

    Raises:
        ValueError: the spec is something else.
    """
    match = SPEC.fullmatch(spec)
    if not match:
        raise UserError(
            f"config.data: split '{spec}' must be a name or a slice of one, such as 'train[:8]'"
        )
    return match[1]


class Split:
    """Random access to the pictures of a prepared split, or of a slice of it.

    Nothing is decoded before it is asked for. Objects can be sent to other processes.
    """

    def __init__(self, directory: Path, spec: str):
        """Opens a split.

        Args:
            directory: where the split was prepared.
            spec: its name, or a slice of it in TFDS' notation.

        Raises:
            ValueError: the spec is malformed or selects nothing, or files are missing.
        """
        try:
            builder = tfds.builder_from_directory(directory)
        except Exception as error:
            # TFDS raises whatever its files lead it to.
            raise UserError(
                f"the prepared split in {directory} is damaged; remove it to prepare anew"
            ) from error
        metadata = builder.info.metadata
        self.kind = by_task.find(metadata["task"])
        try:
            [chosen] = tfds.core.ReadInstruction.from_spec(spec).to_absolute(builder.info.splits)
            positions = slice(chosen.from_, chosen.to)
            # Encoded bytes are kept: decoding is ours.
            skip = tfds.decode.SkipDecoding()
            decoders = dict.fromkeys(("image", *self.kind.encoded), skip)
            self._source = builder.as_data_source(spec, decoders=decoders)
            files = builder.info.splits[split_name(spec)].filepaths
        except (ValueError, AssertionError) as error:
            raise UserError(f"config.data: split '{spec}' cannot be read: {error}") from error
        missing = [str(file) for file in files if not Path(file).is_file()]
        if missing:
            raise UserError(
                f"config.data.data_dir: {missing[0]} is missing, remove {directory} to prepare anew"
            )
        self.name = split_name(spec)
        self.categories = Categories.of(metadata["categories"])
        self.sizes = np.array(metadata["sizes"], np.int32)[positions]
        """int32 [n, 2]: height and width of the pictures."""
        self.num_things = np.array(metadata["things"], np.int32)[positions]
        """int32 [n]: how many things, crowds not counted, each picture shows."""
        self.description = records.describe(metadata)
        """What was found when the split was prepared, of all of it, as a text."""
        if not len(self):
            raise UserError(f"config.data: split '{spec}' holds no picture")

    def __len__(self) -> int:
        return len(self.sizes)

    def record(self, index: int) -> records.Record:
        """The encoded record at a position."""
        stored = self._source[int(index)]
        return records.Record(
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
        """uint8 [H, W, 3], RGB, at original size. Raises ValueError where it is broken."""
        record = self.record(index)
        return image_files.load_image(record.image, record.size)

    def truth(self, index: int) -> Any:
        """The annotation at original size, of the type that the task is evaluated with: a
        `PanopticMap`, a tuple of `Instance`, or a map of labels [H, W] (0 ignored, 1 + k class k).

        Raises ValueError where it is broken.
        """
        record = self.record(index)
        loaded = self.kind.load(record.annotation, record.size, self.categories)
        return self.kind.truth(loaded, self.categories)
