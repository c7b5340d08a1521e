"""Pictures and videos on disk, and the folder of what a segmenter makes of pictures."""

from __future__ import annotations

import json
import mimetypes
import os
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from tqdm import tqdm

from knet_jax.app.segmenter import Segmenter
from knet_jax.segmentation import coco_files
from knet_jax.segmentation.drawing import (
    MAX_SIDES,
    THUMBNAIL,
    contact_sheet,
    readable_side,
    save_picture,
    thumbnail,
)
from knet_jax.segmentation.image_files import PICTURES, read_image
from knet_jax.segmentation.result import Result
from knet_jax.segmentation.segments import Categories
from knet_jax.system.errors import UserError
from knet_jax.system.output_files import Stems, write_json
from knet_jax.system.signals import StopRequest
from knet_jax.tasks import TASKS

VIDEOS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")
"""How the names of videos end."""

OVERLAYS, SHEET, VIDEO_RESULTS = "overlays", "contact_sheet.jpg", "videos"
"""What predictions are called in their folder, beside the results of `TASKS`."""

MAX_THUMBNAILS = 60
"""Pictures of a contact sheet."""


class Source(NamedTuple):
    """A picture or a video that was asked for."""

    path: Path
    name: str
    """Where it is found below the folder that was named, subfolders included."""
    stem: str
    """What its results are called, before a suffix; no two sources share one."""


# What there is.


def find_sources(paths: Sequence[str], output: Path) -> tuple[list[Source], list[Source]]:
    """The pictures and the videos that some paths stand for, each once.

    Args:
      paths: of files, and of folders, in which everything is found.
      output: the folder of the predictions; those that it has are left out where a folder is named.

    Raises:
      UserError: there is no such file, nothing in a folder, or what predictions would overwrite.
    """
    found: dict[Path, str] = {}
    for given in map(Path, paths):
        if given.is_dir():
            there = _walk(given)
            if not there:
                accepted = ", ".join(PICTURES + VIDEOS)
                raise UserError(f"no picture or video in {given}; accepted: {accepted}")
        elif given.is_file():
            there = [given.resolve()]
        elif given.exists():
            raise UserError(f"{given} is neither a file nor a folder")
        else:
            raise UserError(f"there is no file or folder {given}")
        inside = [path for path in there if not _is_prediction(path, output.resolve())]
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

    stems = Stems()
    sources = [Source(path, name, stems.of(name)) for path, name in found.items()]
    are_videos = [source.path.suffix.lower() in VIDEOS for source in sources]
    return (
        [source for source, is_video in zip(sources, are_videos) if not is_video],
        [source for source, is_video in zip(sources, are_videos) if is_video],
    )


def _walk(folder: Path) -> list[Path]:
    """Pictures and videos in a folder and those below it, sorted. Those of kinds that are not read
    are named on stderr."""
    # A link that leads nowhere becomes a problem of its own when it is read.
    paths = sorted(
        path
        for path in folder.resolve().rglob("*")
        if path.is_file() or (path.is_symlink() and not path.exists())
    )
    found = [path for path in paths if _is_read(path)]
    others = [path for path in paths if not _is_read(path) and _is_visual(path)]
    if others:
        kinds = Counter(path.suffix.lower() for path in others)
        listed = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
        print(
            f"left out of {folder}: {listed}; accepted: {', '.join(PICTURES + VIDEOS)}",
            file=sys.stderr,
        )
    return found


def _is_read(path: Path) -> bool:
    return path.suffix.lower() in PICTURES + VIDEOS


def _is_visual(path: Path) -> bool:
    """Whether the name of a file is that of a picture or video of any kind."""
    kind, _ = mimetypes.guess_type(path.name)
    return (kind or "").startswith(("image/", "video/"))


def _is_prediction(path: Path, output: Path) -> bool:
    """Whether a file lies where predictions go; both paths are resolved."""
    return any(
        path.is_relative_to(output / name) for name in (OVERLAYS, SHEET, VIDEO_RESULTS, *TASKS)
    )


def find_ids(file: Path, pictures: Sequence[Source]) -> tuple[dict[str, int], int]:
    """The ids that a JSON in COCO's form, such as that of a test set, gives pictures.

    Args:
      file: its `images` have `id` and `file_name`, which is the name of a picture below the folder
        that was named, or without its folders.
      pictures: that were asked for.

    Returns:
      ids by `Source.name`, of the pictures that it lists, and how many it lists in all.

    Raises:
      UserError: there is no such file, it lists none of them, or gives two the same id.
    """
    try:
        listed: dict[str, int] = {}
        for image in json.loads(file.read_text(encoding="utf-8-sig"))["images"]:
            coco_files.check_file_name(image)
            name, id = image["file_name"], image["id"]
            if type(id) is not int or id.bit_length() > 63:
                raise UserError(f"the id of {name} is {id!r}")
            if listed.setdefault(name, id) != id:
                raise UserError(f"{name} has two ids")
    except OSError as error:
        raise UserError(f"--image_info={file} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"--image_info={file}; accepted: a JSON in COCO's form, whose images have id and "
            f"file_name: {error!r:.100}"
        ) from error
    ids = {one.name: listed.get(one.name, listed.get(one.path.name)) for one in pictures}
    ids = {name: id for name, id in ids.items() if id is not None}
    if not ids:
        raise UserError(
            f"--image_info={file} lists none of the {len(pictures)} pictures; it has "
            f"{', '.join([*listed][:2]) or 'nothing'}"
        )
    if len(set(ids.values())) < len(ids):
        raise UserError(f"--image_info={file} gives several of the pictures the same id")
    return ids, len(listed)


def until(stop: StopRequest | None, results: Iterable[Result]) -> Iterator[Result]:
    """Results until the process is asked to stop. Raises Preempted after the one that is then due."""
    for result in results:
        yield result
        end_if_asked(stop)
    end_if_asked(stop)


def end_if_asked(stop: StopRequest | None) -> None:
    """Raises Preempted if the process was asked to stop."""
    if stop:
        raise stop.end("stopped; what was done is kept")


class Predictions:
    """A folder of predictions, written as they come.

    For every picture `overlays/NAME.jpg`, and what the task's own format holds: `panoptic.json` with
    `panoptic/NAME.png`, `instance.json`, or `semantic.json` with `semantic/NAME.png`; then
    `images.json`, which says which id of these is which file, and `contact_sheet.jpg`. Before the
    first picture nothing is written: what an earlier run has left stays.

    Args:
      folder: created if need be.
      task: of the network.
      categories: its classes.
      ids: of the pictures by `Source.name`; default: 1, 2, 3 …
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
        """Of each class, in how many pictures it was seen, and how many segments of it."""
        self._task = task
        self._categories = categories
        self._ids = ids
        self._images: list[dict] = []
        self._thumbnails: list[np.ndarray] = []

    @cached_property
    def _results(self) -> Any:
        """The task's own format."""
        return TASKS[self._task].results(self.folder / f"{self._task}.json", self._categories)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Whatever ends the predictions: what there is becomes whole files."""
        if not self._images:
            return
        self._results.close()
        categories = [
            {"id": id, "name": name}
            for id, name in zip(self._categories.dataset_ids, self._categories.names)
        ]
        write_json(self.folder / "images.json", {"images": self._images, "categories": categories})
        save_picture(self.folder / SHEET, contact_sheet(self._thumbnails))

    def add(self, source: Source, result: Result) -> None:
        """Writes the result of a picture."""
        image_id = self._ids[source.name] if self._ids else len(self._images) + 1
        overlay = self.folder / OVERLAYS / f"{source.stem}.jpg"
        overlay.parent.mkdir(parents=True, exist_ok=True)
        save_picture(
            overlay, result.draw(min(readable_side(result.size), MAX_SIDES[overlay.suffix]))
        )
        self._results.add(image_id, source.name, result.prediction, f"{source.stem}.png")
        height, width = result.size
        self._images.append(
            {"id": image_id, "file_name": source.name, "height": height, "width": width}
        )
        if len(self._thumbnails) < MAX_THUMBNAILS:
            self._thumbnails.append(thumbnail(result.draw(THUMBNAIL), source.name))
        labels = [segment.label for segment in result.segments]
        np.add.at(self.counts[1], labels, 1)
        self.counts[0, list(set(labels))] += 1

    def table(self) -> str:
        """Classes that were seen, most frequent first: in how many pictures, and how often."""
        seen = [label for label in np.argsort(-self.counts[1]) if self.counts[1, label]]
        if not seen:
            return "nothing was seen"
        width = max(len(self._categories.names[label]) for label in seen)
        lines = [f"{'':{width}}  pictures  segments"]
        for label in seen:
            pictures, segments = self.counts[:, label]
            lines.append(f"{self._categories.names[label]:{width}}  {pictures:8}  {segments:8}")
        return "\n".join(lines)


def readable(
    sources: Iterable[Source],
    note: Callable[[Source], object] | None = None,
    skip: Callable[[ValueError], object] | None = None,
) -> Iterator[np.ndarray]:
    """The pictures that can be read.

    Args:
      sources: where they are.
      note: is told the source of each, before it is given out.
      skip: is told why another cannot be read.
    """
    for source in sources:
        try:
            image = read_image(source.path)
        except ValueError as error:
            if skip:
                skip(error)
            continue
        if note:
            note(source)
        yield image


def predict_pictures(
    segmenter: Segmenter,
    sources: Sequence[Source],
    predictions: Predictions,
    threshold: float | None = None,
    stop: StopRequest | None = None,
) -> list[str]:
    """Segments pictures from files, with a progress bar.

    Args:
      segmenter: how.
      sources: the pictures.
      predictions: where results go.
      threshold: least score of a thing.
      stop: what ends it early.

    Returns:
      what was wrong with each that could not be read.

    Raises:
      Preempted: it was asked to stop.
    """
    problems: list[str] = []
    waiting: deque[Source] = deque()
    with tqdm(total=len(sources), desc="segmenting", unit="img") as bar:

        def skip(error: ValueError) -> None:
            problems.append(str(error))
            tqdm.write(f"skipped {error}", file=sys.stderr)
            bar.update()

        going_on = takewhile(lambda _: not stop, sources)  # also past what cannot be read
        images = readable(going_on, waiting.append, skip)
        for result in until(stop, segmenter.stream(images, threshold)):
            predictions.add(waiting.popleft(), result)
            bar.update()
    return problems
