"""COCO's formats, and results written in them (https://cocodataset.org/#format-data).

Panoptic: a JSON, and beside it a folder of the same name with a PNG for each picture, whose pixels
hold the id R + 256 G + 65536 B of their segment, 0 for void. The JSON says which category each id is.

Instance: one JSON, a list of annotations with scores.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import cv2
import numpy as np

from knet_jax.segmentation import rle
from knet_jax.segmentation.image_files import NUM_IDS, segment_colors
from knet_jax.segmentation.segments import Categories, Instance, PanopticMap, segment_index
from knet_jax.system.errors import UserError
from knet_jax.system.output_files import JsonList, PngFolder, write_json

IDS = ("id", "image_id", "category_id")
PART = 1 << 22
"""Letters of a file that are read at once."""
SPACE = re.compile(r"[ \t\n\r]*")


def parse(data: bytes) -> Any:
    """The content of a JSON in COCO's form, in any of Unicode's encodings.

    What is null counts as absent, and an id may be written as a text.

    Raises:
        ValueError or RecursionError: it is no JSON.
    """
    return json.loads(data, object_hook=_tidy)


def read_lists(path: Path) -> Iterator[tuple[str, Iterator[tuple[Any, bytes]] | None]]:
    """Reads a file that holds an object of lists, entry by entry, in constant memory.

    Yields:
        (key, entries): of a list, each of its entries as `parse` reads it and as UTF-8, nulls left
        out; None of any other value. Entries that were not asked for are skipped.

    Raises:
        OSError, ValueError or RecursionError: there is no such file, or it is no JSON of an object.
    """
    with path.open("rb") as file:
        encoding = json.detect_encoding(file.read(4))
    with path.open(encoding=encoding, errors="surrogatepass", newline="") as file:
        text = _JsonText(file)
        text.take("{")
        while text.peek() != "}":
            key, _ = text.value()
            text.take(":")
            if text.peek() == "[":
                entries = text.entries()
                yield key, entries
                for _ in entries:
                    pass
            else:
                text.value()
                yield key, None
            if text.peek() != "}":
                text.take(",")
        text.take("}")
        if text.peek():
            text.fail("nothing else")


class _JsonText:
    """The text of a JSON file, of which a part is in memory: what follows the values that were read."""

    def __init__(self, file: TextIO):
        self._file = file
        self._part, self._place = "", 0
        self._before = 0  # letters of the file that have been dropped

    def peek(self) -> str:
        """The next letter that is no space; "" at the end."""
        while True:
            self._place = SPACE.match(self._part, self._place).end()
            if self._place < len(self._part) or not self._read_on():
                return self._part[self._place : self._place + 1]

    def take(self, letter: str) -> None:
        """Passes a letter. Raises ValueError where another follows."""
        if self.peek() != letter:
            self.fail(repr(letter))
        self._place += 1

    def value(self) -> tuple[Any, bytes]:
        """Passes a value: what it is, and its text in UTF-8. Raises ValueError where none follows."""
        self.peek()
        while True:
            try:
                (value, end), problem = DECODER.raw_decode(self._part, self._place), None
            except json.JSONDecodeError as error:
                end, problem = len(self._part), error
            # What ends with the part may go on in the file: a number goes on after "1", and after "1e+".
            if end + 2 < len(self._part) or not self._read_on():
                break
        if problem:
            raise ValueError(f"{problem.msg} at letter {self._before + problem.pos}")
        text = self._part[self._place : end].encode("utf-8", "surrogatepass")
        self._place = end
        return value, text

    def entries(self) -> Iterator[tuple[Any, bytes]]:
        """Passes a list: the entries that are not null, as `value` returns them."""
        self.take("[")
        while self.peek() != "]":
            value, text = self.value()
            if value is not None:
                yield value, text
            if self.peek() != "]":
                self.take(",")
        self.take("]")

    def fail(self, expected: str) -> None:
        """Raises a ValueError that says what was expected, and where."""
        raise ValueError(f"{expected} is expected at letter {self._before + self._place}")

    def _read_on(self) -> bool:
        """Reads on, and drops what has been passed. Returns False at the end of the file."""
        left = self._part[self._place :]
        more = self._file.read(max(PART, len(left)))
        if more:
            self._before += self._place
            self._part, self._place = left + more, 0
        return bool(more)


def _tidy(entry: dict[str, Any]) -> dict[str, Any]:
    tidy = {}
    for key, value in entry.items():
        if isinstance(value, list):
            tidy[key] = [one for one in value if one is not None]
        elif value is not None:
            tidy[key] = _as_number(value) if key in IDS else value
    return tidy


def _as_number(id: Any) -> Any:
    """An id that is a whole number written as a text or with a point; others as they are."""
    try:
        return int(id) if isinstance(id, str) or int(id) == id else id
    except (TypeError, ValueError, OverflowError):
        return id


DECODER = json.JSONDecoder(object_hook=_tidy)


def image_entry(image_id: int, file_name: str, size: tuple[int, int]) -> dict[str, Any]:
    """Makes an entry of the list `images` of a picture of (height, width)."""
    height, width = size
    return {"id": int(image_id), "file_name": file_name, "height": height, "width": width}


class PanopticResults:
    """Writes panoptic maps picture by picture; only the small records of the JSON stay in memory.

    The JSON being results/panoptic.json, for example, PNG files go to results/panoptic/.
    """

    def __init__(self, path: str | Path, categories: Categories):
        self.path = Path(path)
        self._categories = categories
        self._images: list[dict] = []
        self._annotations: list[dict] = []
        self._pngs = PngFolder(self.path.with_suffix(""))

    def add(self, image_id: int, file_name: str, panoptic: PanopticMap) -> None:
        """Writes the map of one picture, as a PNG named like the picture, subfolders included."""
        areas = np.bincount(segment_index(panoptic).ravel(), minlength=1 + len(panoptic.segments))
        infos = []
        for segment, area in zip(panoptic.segments, areas[1:].tolist()):
            assert 0 < segment.id < NUM_IDS and area, f"{file_name}: {segment}, {area} pixels"
            infos.append(
                {
                    "id": int(segment.id),
                    "category_id": int(self._categories.dataset_ids[segment.label]),
                    "iscrowd": int(segment.iscrowd),
                    "area": area,
                    "score": float(segment.score),
                }
            )
        rgb = segment_colors(panoptic.ids)
        png = self._pngs.write(file_name, cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR))
        self._images.append(image_entry(image_id, file_name, panoptic.ids.shape))
        self._annotations.append(
            {"image_id": int(image_id), "file_name": png, "segments_info": infos}
        )

    def close(self) -> None:
        """Writes the JSON, whole or not at all."""
        c = self._categories
        content = {
            "images": self._images,
            "annotations": self._annotations,
            "categories": [
                {"id": id, "name": name, "isthing": int(label < c.num_things)}
                for label, (id, name) in enumerate(zip(c.dataset_ids, c.names, strict=True))
            ],
        }
        write_json(self.path, content)


class InstanceResults:
    """Writes predicted instances picture by picture, as COCO's test server takes them.

    The JSON appears when it is whole.
    """

    def __init__(self, path: str | Path, categories: Categories):
        self.path = Path(path)
        self._categories = categories
        self._names: dict[int, str] = {}
        self._list = JsonList(self.path)

    def add(self, image_id: int, file_name: str, instances: Sequence[Instance]) -> None:
        """Writes the instances of one picture.

        Raises:
            UserError: there was a picture of the same id.
        """
        if image_id in self._names:
            raise UserError(
                f"{self.path}: {file_name} has id {image_id}, as has {self._names[image_id]}"
            )
        self._names[image_id] = file_name
        for one in instances:
            record = {
                "image_id": int(image_id),
                "category_id": int(self._categories.dataset_ids[one.label]),
                "segmentation": rle.to_json(one.rle),
                "score": float(one.score),
            }
            self._list.add(record)

    def close(self) -> None:
        """Ends the JSON."""
        self._list.close()
