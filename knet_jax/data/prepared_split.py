"""Splits of datasets that have been converted to ArrayRecord, and their conversion."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
import tqdm

from knet_jax.data import records, shards
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


def prepare(
    source: records.Source, data_dir: Path, write: shards.Write | None = None
) -> tuple[Path, bool]:
    """Converts a split to ArrayRecord, unless that has been done, showing progress.

    What is not finished stays in a folder `incomplete`, and the next call goes on there. It moves to
    its place when it is whole, and goes where the dataset is to be mended.

    Args:
        source: the split.
        data_dir: folder of all prepared datasets.
        write: writes the shards; None takes a process for each core.

    Returns:
        the directory of the prepared split, and whether it is new.

    Raises:
        UserError: the dataset cannot be used, or its records cannot be written.
    """
    directory = data_dir / source.dataset / source.name / str(records.VERSION)
    unfinished = directory.with_name("incomplete")
    is_new = not directory.exists()
    try:
        if is_new:
            _prepare(source, unfinished, write or partial(shards.write_locally, 0), directory)
    except UserError:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    except (OSError, RuntimeError) as error:  # array_record raises the latter on a full disk
        is_new = False
        # Another process may have prepared the same split meanwhile.
        if not directory.exists():
            raise UserError(
                f"config.data.data_dir: split '{source.split}' cannot be written to '{data_dir}': "
                f"{error}"
            ) from error
    shutil.rmtree(unfinished, ignore_errors=True)
    done = "prepared in" if is_new else "prepared already in"
    hint = "" if is_new else " (remove it to prepare anew)"
    print(f"{source.split}: {done} {directory}{hint}", flush=True)
    return directory, is_new


def _prepare(
    source: records.Source, unfinished: Path, write: shards.Write, directory: Path
) -> None:
    plan = shards.plan(source, unfinished)
    with tqdm.tqdm(None, f"Writing {source.split}", plan.count, unit="img") as progress:
        for count in write(plan.parts):
            progress.update(count)
    with silenced("tensorflow_datasets"), contextlib.redirect_stdout(io.StringIO()):
        prepared = shards.finish(source, plan, unfinished)
    prepared.rename(directory)


class Split:
    """Random access to the pictures of a prepared split, or of a slice of it.

    Nothing is decoded before it is asked for, and what is known of all pictures stays on disk. Other
    processes, to which objects can be sent, open the files anew.

    Args:
        directory: where the split was prepared.
        spec: its name, or a slice of it in TFDS' notation.

    Raises:
        UserError: the spec is malformed or selects nothing, or files are missing or damaged.
    """

    def __init__(self, directory: Path, spec: str):
        self.name, self._spec = split_name(spec), spec
        self.directory = directory
        with self._damage_named():
            builder = tfds.builder_from_directory(directory)
            splits = builder.info.splits
            metadata = json.loads((directory / "metadata.json").read_bytes())
            # Older ones hold the columns themselves.
            names = () if "sizes" in metadata else records.COLUMNS
            columns = [directory / name for name in names]
            if metadata.get("digest", proof := records.digest(metadata, columns)) != proof:
                raise ValueError("metadata.json and what it tells of are not as they were written")
            self.task = metadata["task"]
            self.categories = Categories.of(metadata["categories"])
            self.kind = by_task.KINDS[self.task](self.categories)
            self.columns = metadata["columns"]
            """The sums of the counts of `Kind.tally`, over the whole split."""
            total = splits[self.name].num_examples
            loaded = [np.load(path, mmap_mode="r") for path in columns]
            sizes, things = loaded or (
                np.array(metadata[name], np.int32) for name in ("sizes", "things")
            )
            sizes, things = sizes.reshape(total, 2), things.reshape(total)
            self.num_pixels = int(np.einsum("i,i->", *sizes.T, dtype=np.int64))
            """Of all pictures of the whole split together."""
            self.description = records.describe(metadata, total, self.num_pixels)
            """What the whole split holds, as a text."""
            missing = [file for file in splits[self.name].filepaths if not Path(file).is_file()]
            if missing:
                raise FileNotFoundError(f"{missing[0]} is missing")
        try:
            [chosen] = tfds.core.ReadInstruction.from_spec(spec).to_absolute(splits)
        except (ValueError, AssertionError) as error:
            raise UserError(f"config.data: split '{spec}' cannot be read: {error}") from error
        self.sizes = sizes[chosen.from_ : chosen.to]
        """int32 [n, 2]: height and width of the pictures."""
        self.num_things = things[chosen.from_ : chosen.to]
        """int32 [n]: how many things each picture shows, crowds left out."""
        if not len(self):
            raise UserError(f"config.data: split '{spec}' holds no picture")
        with self._damage_named():
            # Pictures are left encoded: decoding is ours.
            decoders = {
                name: tfds.decode.SkipDecoding()
                for name, feature in builder.info.features.items()
                if isinstance(feature, tfds.features.Image)
            }
            self._source = builder.as_data_source(spec, decoders=decoders)

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

    def __reduce__(self) -> tuple[type[Split], tuple[Path, str]]:
        return Split, (self.directory, self._spec)

    def facts(self) -> str:
        """A text that tells splits of other pictures or classes apart."""
        digest = hashlib.sha256(repr((self.task, self.categories)).encode())
        for column in (self.sizes, self.num_things):
            digest.update(column)
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
