"""The pictures of a batch prediction: in a folder, named in a text file, or in Parquet."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from knet_jax.app.predictions import find_sources
from knet_jax.segmentation.image_files import check_megapixels, decode_image
from knet_jax.system.errors import UserError, naming_file
from knet_jax.system.output_files import Stems

ACCEPTED = "a folder of pictures or of .parquet files, one .parquet, or a .txt with a path a line"


class Picture(NamedTuple):
    """A picture that was asked for."""

    id: str
    path: str
    """The file of the picture, or the Parquet file that holds its bytes."""
    stem: str
    """What its drawing is named after; no two pictures share one."""
    place: tuple[int, int] | None = None
    """Row group and row within that, where a Parquet file holds the bytes."""


def find_pictures(images: Path, output: Path) -> list[Picture]:
    """Lists the pictures that a path stands for, in the same order every time.

    Args:
        images: a folder of pictures, whose ids are their names below it; a `.txt` with a path a
            line, which is the id; a `.parquet` or a folder of such, with a column `bytes` or `path`
            and, unless a path is the id, `id`.
        output: the folder of the predictions, whose pictures are left out.

    Raises:
        UserError: there is nothing of this kind, or two pictures share an id.
    """
    parquets = sorted(images.glob("*.parquet")) if images.is_dir() else [images]
    if images.is_dir() and not parquets:
        sources, videos = find_sources([str(images)], output)
        if videos:
            print(f"left out of {images}: {len(videos)} videos", file=sys.stderr)
        found = [Picture(one.name, str(one.path), one.stem) for one in sources]
    elif not parquets[0].exists():
        raise UserError(f"there is no {images}; accepted: {ACCEPTED}")
    elif parquets[0].suffix == ".parquet":
        found = list(_named(row for file in parquets for row in _parquet_rows(file)))
    elif images.suffix == ".txt":
        with naming_file(images):
            lines = dict.fromkeys(images.read_text().splitlines())
        found = list(_named((line, line, None) for line in lines if line.strip()))
    else:
        raise UserError(f"{images} is none of: {ACCEPTED}")
    if not found:
        raise UserError(f"{images} names no picture; accepted: {ACCEPTED}")
    return found


def _named(rows: Iterable[tuple[str, str, tuple[int, int] | None]]) -> Iterator[Picture]:
    stems, ids = Stems(), set()
    for id, path, place in rows:
        if id in ids:
            raise UserError(f"two pictures have the id {id!r:.200}; accepted: each once")
        ids.add(id)
        yield Picture(id, os.path.abspath(path), stems.of(id), place)


def _parquet_rows(path: Path) -> Iterator[tuple[str, str, tuple[int, int] | None]]:
    """Yields id, path and place of every row."""
    with naming_file(path):
        file = _parquet_file(str(path))
        columns = {"id", "path", "bytes"} & set(file.schema_arrow.names)
        if not {"path", "bytes"} & columns or columns == {"bytes"}:
            raise UserError(
                f"it has the columns {', '.join(file.schema_arrow.names):.200}; accepted: path, "
                "or id and bytes, or all three"
            )
        for group in range(file.num_row_groups):
            listed = file.read_row_group(group, sorted(columns - {"bytes"})).to_pydict()
            ids, paths = (listed.get(name) for name in ("id", "path"))
            for row, id in enumerate(ids or paths):
                if id is None or (paths and paths[row] is None and "bytes" not in columns):
                    raise UserError(f"row {row} of row group {group} has no id or no path")
                inside = "bytes" in columns
                yield (
                    str(id),
                    str(path) if inside else str(paths[row]),
                    ((group, row) if inside else None),
                )


@lru_cache(maxsize=1)
def _parquet_file(path: str) -> Any:
    from pyarrow.parquet import ParquetFile

    return ParquetFile(path)


@lru_cache(maxsize=1)
def _bytes_of_group(path: str, group: int) -> Any:
    return _parquet_file(path).read_row_group(group, ["bytes"])["bytes"]


def read_picture(picture: Picture, max_megapixels: float) -> np.ndarray:
    """Reads a picture, uint8 [H, W, 3]. Raises UserError with the reason, which names no file."""
    try:
        if picture.place is None:
            data = Path(picture.path).read_bytes()
        else:
            group, row = picture.place
            data = _bytes_of_group(picture.path, group)[row].as_py()
    except OSError as error:
        raise UserError(error.strerror or str(error)) from error
    if not isinstance(data, bytes):
        raise UserError("its bytes are missing")
    check_megapixels(io.BytesIO(data), max_megapixels)
    return decode_image(data)
