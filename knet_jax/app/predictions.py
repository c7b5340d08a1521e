"""Pictures on disk: which ones a command line means, and the folder of what is predicted for them."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

import numpy as np
from tqdm import tqdm

from knet_jax.app.segmenter import Segmenter
from knet_jax.segmentation.coco_files import image_entry
from knet_jax.segmentation.drawing import (
    MAX_SIDES,
    THUMBNAIL,
    contact_sheet,
    readable_side,
    save_picture,
    thumbnail,
)
from knet_jax.segmentation.image_files import (
    MAX_MEGAPIXELS,
    PICTURES,
    check_megapixels,
    read_image,
)
from knet_jax.segmentation.result import Result
from knet_jax.segmentation.segments import Categories
from knet_jax.system.errors import UserError, naming_file, one_line
from knet_jax.system.output_files import Stems, write_json
from knet_jax.system.signals import StopRequest
from knet_jax.tasks import TASKS

T = TypeVar("T")

VIDEOS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")
"""Suffixes of the names of videos."""

OVERLAYS, SHEET, VIDEO_RESULTS = "overlays", "contact_sheet.jpg", "videos"
"""Names in a folder of predictions, beside the results that are named after the tasks."""

MAX_THUMBNAILS = 60
"""How many pictures the contact sheet shows."""


class InputFile(NamedTuple):
    """A picture or a video that was asked for."""

    path: Path
    name: str
    """Its path below the folder that was asked for."""
    stem: str
    """What results are named after it, without a suffix; no two sources of a kind share one."""


def find_sources(paths: Sequence[str], output: Path) -> tuple[list[InputFile], list[InputFile]]:
    """Finds the pictures and the videos that some paths stand for, each once.

    Args:
        paths: of files, and of folders, in which everything is found.
        output: the folder of the predictions; those that it has are left out where a folder is
            named.

    Returns:
        The pictures, and the videos.

    Raises:
        UserError: there is no such file, nothing in a folder, or predictions would overwrite it.
    """
    found: dict[Path, str] = {}
    predicted = output.resolve()
    if not all(map(str, paths)):
        raise UserError("'' names no file or folder")
    for given in map(Path, paths):
        if given.is_dir():
            there = _walk(given)
        elif given.is_file():
            there = [given.resolve()]
        elif given.exists():
            raise UserError(f"{given} is neither a file nor a folder")
        else:
            raise UserError(f"there is no file or folder {given}")
        inside = [path for path in there if not _is_prediction(path, predicted)]
        if not inside:
            raise UserError(
                f"predictions in {output} would overwrite {given}; accepted: another --output"
            )
        root = given.resolve() if given.is_dir() else given.resolve().parent
        for path in inside:
            found.setdefault(path, path.relative_to(root).as_posix())
    if len(set(found.values())) < len(found):
        root = Path(os.path.commonpath(found))
        found = {path: path.relative_to(root).as_posix() for path in found}

    sources: tuple[list[InputFile], list[InputFile]] = ([], [])
    stems = (Stems(), Stems())
    for path, name in found.items():
        kind = path.suffix.lower() in VIDEOS
        sources[kind].append(InputFile(path, name, stems[kind].of(name)))
    return sources


def _walk(folder: Path) -> list[Path]:
    """Lists pictures and videos in a folder and those below it, sorted.

    Files of kinds that are not read are counted on stderr.
    """
    found, others = [], Counter()
    for path in sorted(folder.resolve().rglob("*")):
        # A link that leads nowhere is named when it is read.
        if not (path.is_file() or (path.is_symlink() and not path.exists())):
            continue
        if path.suffix.lower() in PICTURES + VIDEOS:
            found.append(path)
        else:
            others[path.suffix.lower() or path.name] += 1
    accepted = ", ".join(PICTURES + VIDEOS)
    if others:
        listed = one_line(", ".join(f"{count} {kind}" for kind, count in sorted(others.items())))
        print(f"left out of {folder}: {listed}; accepted: {accepted}", file=sys.stderr)
    if not found:
        raise UserError(f"no picture or video in {folder}; accepted: {accepted}")
    return found


def _is_prediction(path: Path, output: Path) -> bool:
    """Tells whether a file lies where predictions go; both paths are resolved."""
    first = path.relative_to(output).parts[:1] if path.is_relative_to(output) else ()
    return first in ((name,) for name in (OVERLAYS, SHEET, VIDEO_RESULTS, *TASKS))


def find_ids(file: Path, pictures: Sequence[InputFile]) -> tuple[dict[str, int], int]:
    """Looks up the ids that a list of a test set, a JSON in COCO's form, gives to pictures.

    Args:
        file: its `images` have `id` and `file_name`, which is the name of a picture below the
            folder that was asked for, or without its folders.
        pictures: that were asked for.

    Returns:
        The ids of the pictures that are listed, by `InputFile.name`, and how many are listed in all.

    Raises:
        UserError: the file makes no sense, lists none of them, or gives two the same id.
    """
    listed: dict[str, int] = {}
    with naming_file(f"--image_info={file}"):
        for image in json.loads(file.read_bytes())["images"]:
            name, id = image["file_name"], image["id"]
            if type(name) is not str or type(id) is not int or id.bit_length() > 63:
                raise UserError(f"the id of {name!r:.100} is {id!r:.100}; accepted: a whole number")
            if listed.setdefault(name, id) != id:
                raise UserError(f"{name!r:.100} has two ids")
        ids = {one.name: listed.get(one.name, listed.get(one.path.name)) for one in pictures}
        ids = {name: id for name, id in ids.items() if id is not None}
        if not ids:
            some = ", ".join([*listed][:2]) or "nothing"
            raise UserError(f"lists none of the {len(pictures)} pictures; it has {some:.200}")
        if len(set(ids.values())) < len(ids):
            raise UserError("gives several of the pictures the same id")
    return ids, len(listed)


def until(stop: StopRequest | None, results: Iterable[T]) -> Iterator[T]:
    """Yields results until the process is asked to stop.

    Raises:
        Preempted: it was asked to stop, and the result that was due has been dealt with.
    """
    for result in results:
        yield result
        end_if_asked(stop)
    end_if_asked(stop)


def end_if_asked(stop: StopRequest | None) -> None:
    """Raises Preempted if the process was asked to stop."""
    if stop:
        raise stop.end("stopped; what was done is kept")


def save_overlay(folder: Path, stem: str, result: Result) -> None:
    """Draws a result as `overlays/STEM.jpg` of a folder."""
    path = folder / OVERLAYS / f"{stem}.jpg"
    side = min(readable_side(result.size), MAX_SIDES[path.suffix])
    save_picture(path, result.draw(side))


class Predictions:
    """A folder of predictions, written as they come; a context, whose end completes the files.

    It gets `overlays/NAME.jpg` for every picture, and the task's own format: `panoptic.json` with
    `panoptic/NAME.png`, `instance.json`, or `semantic.json` with `semantic/NAME.png`; at the end
    `images.json`, which says which id of these is which file, and `contact_sheet.jpg`. Before the
    first picture nothing is written, so that a failed start leaves what an earlier run has made.

    Args:
        folder: created if need be.
        ids: of the pictures by `InputFile.name`; default: 1, 2, 3 …
    """

    def __init__(
        self,
        folder: Path,
        task: str,
        categories: Categories,
        ids: Mapping[str, int] | None = None,
    ):
        self.folder = folder
        self.counts = np.zeros((2, len(categories.names)), int)
        """[2, k]: in how many pictures each class was seen, and in how many segments."""
        self._task = task
        self._categories = categories
        self._ids = ids
        self._stems = Stems()
        self._images: list[dict] = []
        self._thumbnails: list[np.ndarray] = []

    @cached_property
    def _results(self) -> Any:
        """The writer of the task's own format."""
        return TASKS[self._task].result_files(self.folder / f"{self._task}.json", self._categories)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Completes the files, whatever ends the predictions."""
        if not self._images:
            return
        self._results.close()
        categories = [
            {"id": id, "name": name}
            for id, name in zip(self._categories.dataset_ids, self._categories.names)
        ]
        write_json(self.folder / "images.json", {"images": self._images, "categories": categories})
        save_picture(self.folder / SHEET, contact_sheet(self._thumbnails))

    def add(self, source: InputFile, result: Result) -> None:
        """Writes the result of a picture."""
        image_id = self._ids[source.name] if self._ids else len(self._images) + 1
        # The task's own files are named in the same way, so that names agree.
        stem = self._stems.of(source.name)
        save_overlay(self.folder, stem, result)
        self._results.add(image_id, source.name, result.prediction)
        self._images.append(image_entry(image_id, source.name, result.size))
        if len(self._thumbnails) < MAX_THUMBNAILS:
            self._thumbnails.append(thumbnail(result.draw(THUMBNAIL), stem))
        labels = [segment.label for segment in result.segments]
        np.add.at(self.counts[1], labels, 1)
        self.counts[0, list(set(labels))] += 1

    def table(self) -> str:
        """Formats the classes that were seen, most frequent first: in how many pictures, how often."""
        seen = [label for label in np.argsort(-self.counts[1]) if self.counts[1, label]]
        if not seen:
            return "nothing was seen"
        width = max(len(self._categories.names[label]) for label in seen)
        lines = [f"{'':{width}}  pictures  segments"]
        for label in seen:
            pictures, segments = self.counts[:, label]
            lines.append(f"{self._categories.names[label]:{width}}  {pictures:8}  {segments:8}")
        return "\n".join(lines)


def predict_pictures(
    segmenter: Segmenter,
    sources: Sequence[InputFile],
    predictions: Predictions,
    threshold: float | None = None,
    stop: StopRequest | None = None,
    max_megapixels: float = MAX_MEGAPIXELS,
) -> list[str]:
    """Segments pictures from files, with a progress bar.

    Returns:
        What was wrong with each picture that was not read, such as one that is too large.

    Raises:
        Preempted: it was asked to stop.
    """
    problems: list[str] = []
    with tqdm(total=len(sources), desc="segmenting", unit="img") as bar:

        def read(source: InputFile) -> np.ndarray:
            with naming_file(source.path):
                check_megapixels(source.path, max_megapixels)
            return read_image(source.path)

        def skip(source: InputFile, error: UserError) -> None:
            problems.append(one_line(error))
            tqdm.write(f"skipped {problems[-1]}", file=sys.stderr)
            bar.update()

        asked = takewhile(lambda _: not stop, sources)
        results = segment_sources(segmenter, asked, read, skip, threshold)
        for source, result in until(stop, results):
            predictions.add(source, result)
            bar.update()
    return problems


def segment_sources(
    segmenter: Segmenter,
    sources: Iterable[T],
    read: Callable[[T], np.ndarray],
    skip: Callable[[T, UserError], None],
    threshold: float | None = None,
) -> Iterator[tuple[T, Result]]:
    """Segments pictures one after the other, and goes on where one cannot be read.

    Args:
        segmenter: of the model.
        sources: what stands for the pictures.
        read: makes a picture, uint8 [H, W, 3], of one of them, or raises a UserError.
        skip: is called with those that could not be read, and the error.
        threshold: as of the segmenter.

    Returns:
        The others with their results, in their order.
    """
    waiting: deque[T] = deque()

    def images() -> Iterator[np.ndarray]:
        for source in sources:
            try:
                image = read(source)
            except UserError as error:
                skip(source, error)
                continue
            waiting.append(source)
            yield image

    for result in segmenter.stream(images(), threshold):
        yield waiting.popleft(), result
