"""Pictures and videos on disk, and the folder of what a segmenter makes of them."""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePath
from typing import NamedTuple, Self

import cv2
import numpy as np
from tqdm import tqdm

from knet_jax.configuration import ConfigError
from knet_jax.data.transforms import PICTURES, read_image
from knet_jax.metrics.result_files import JsonList, write_json
from knet_jax.results import Result
from knet_jax.segmenter import Segmenter
from knet_jax.structs import Categories
from knet_jax.tasks import TASKS
from knet_jax.visualize import (
    MAX_SIDES,
    THUMBNAIL,
    contact_sheet,
    readable_side,
    save_picture,
    thumbnail,
)

VIDEOS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")
"""How the names of videos end."""

MAX_THUMBNAILS = 60
"""Pictures of a contact sheet."""

FRAMES_PER_SECOND = 25.0
"""Of a video that does not say."""


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
      output: a folder whose content is left out: that of earlier predictions.

    Raises:
      ConfigError: there is no such file, or nothing in a folder.
    """
    found: dict[Path, str] = {}
    for given in map(Path, paths):
        if given.is_dir():
            inside = [path for path in _walk(given) if not path.is_relative_to(output.resolve())]
            if not inside:
                accepted = ", ".join(PICTURES + VIDEOS)
                raise ConfigError(f"no picture or video in {given}; accepted: {accepted}")
        elif given.exists():
            inside = [given.resolve()]
        else:
            raise ConfigError(f"there is no file or folder {given}")
        root = given.resolve() if given.is_dir() else given.resolve().parent
        for path in inside:
            found.setdefault(path, path.relative_to(root).as_posix())
    if len(set(found.values())) < len(found):
        root = Path(os.path.commonpath(found))
        found = {path: path.relative_to(root).as_posix() for path in found}

    sources, taken = [], set()
    for path, name in found.items():
        # 1.jpg and 1.png must not overwrite each other, nor 1.jpg and 1.JPG on other systems.
        stem = PurePath(name).with_suffix("").as_posix()
        number = 1
        while stem.lower() in taken:
            stem = name if number == 1 else f"{name}-{number}"
            number += 1
        taken.add(stem.lower())
        sources.append(Source(path, name, stem))
    are_videos = [source.path.suffix.lower() in VIDEOS for source in sources]
    return (
        [source for source, is_video in zip(sources, are_videos) if not is_video],
        [source for source, is_video in zip(sources, are_videos) if is_video],
    )


def _walk(folder: Path) -> list[Path]:
    """Pictures and videos in a folder and those below it, sorted."""
    paths = sorted(path for path in folder.resolve().rglob("*") if path.is_file())
    return [path for path in paths if path.suffix.lower() in PICTURES + VIDEOS]


# Pictures.


class Predictions:
    """A folder of predictions, written as they come.

    For every picture `overlays/NAME.jpg`, and what the task's own format holds: `panoptic.json` with
    `panoptic/NAME.png`, `instance.json`, or `semantic.json` with `semantic/NAME.png`; then
    `images.json`, which says which id of these is which file, and `contact_sheet.jpg`.

    Args:
      folder: created if need be.
      task: of the network.
      categories: its classes.
    """

    def __init__(self, folder: Path, task: str, categories: Categories):
        self.folder = folder
        self.counts = np.zeros((2, len(categories.names)), int)
        """Of each class, in how many pictures it was seen, and how many segments of it."""
        self._categories = categories
        self._images: list[dict] = []
        self._thumbnails: list[np.ndarray] = []
        self._results = TASKS[task].results(folder / f"{task}.json", categories)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Whatever ends the predictions: what there is becomes whole files."""
        self._results.close()
        categories = [
            {"id": id, "name": name}
            for id, name in zip(self._categories.dataset_ids, self._categories.names)
        ]
        write_json(self.folder / "images.json", {"images": self._images, "categories": categories})
        if self._thumbnails:
            save_picture(self.folder / "contact_sheet.jpg", contact_sheet(self._thumbnails))

    def add(self, source: Source, result: Result) -> None:
        """Writes the result of a picture."""
        image_id = len(self._images) + 1
        self._results.add(image_id, source.name, result.prediction, f"{source.stem}.png")
        overlay = self.folder / "overlays" / f"{source.stem}.jpg"
        overlay.parent.mkdir(parents=True, exist_ok=True)
        save_picture(
            overlay, result.draw(min(readable_side(result.size), MAX_SIDES[overlay.suffix]))
        )
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


def predict_pictures(
    segmenter: Segmenter,
    sources: Sequence[Source],
    predictions: Predictions,
    threshold: float | None = None,
) -> list[str]:
    """Segments pictures from files, with a progress bar.

    Args:
      segmenter: how.
      sources: the pictures.
      predictions: where results go.
      threshold: least score of a thing.

    Returns:
      what was wrong with each that could not be read.
    """
    problems: list[str] = []
    waiting: deque[Source] = deque()
    with tqdm(total=len(sources), desc="segmenting", unit="img") as bar:

        def readable() -> Iterator[np.ndarray]:
            for source in sources:
                try:
                    image = read_image(source.path)
                except ValueError as error:
                    problems.append(str(error))
                    tqdm.write(f"skipped {error}", file=sys.stderr)
                    bar.update()
                    continue
                waiting.append(source)
                yield image

        for result in segmenter.stream(readable(), threshold):
            predictions.add(waiting.popleft(), result)
            bar.update()
    return problems


# Videos.


def predict_video(
    segmenter: Segmenter, source: Source, folder: Path, threshold: float | None = None
) -> str | None:
    """Segments a video frame by frame, in constant memory, with a progress bar.

    Writes `NAME.mp4`, and `NAME.json`: what `Result.to_coco` gives, the number of the frame being
    the id of the picture, from 0 on.

    Args:
      segmenter: how.
      source: the video.
      folder: where results go.
      threshold: least score of a thing.

    Returns:
      what was wrong with the video, None where it could be read.

    Raises:
      OSError: this build of OpenCV cannot write such a video.
    """
    capture = cv2.VideoCapture(str(source.path))
    try:
        frames = _frames(capture)
        first = next(frames, None)
        if first is None:
            return f"{source.path}: no frame of it can be decoded"
        place = folder / f"{source.stem}.mp4"
        place.parent.mkdir(parents=True, exist_ok=True)
        height, width = first.shape[:2]
        rate = capture.get(cv2.CAP_PROP_FPS)
        rate = rate if 0 < rate < 1000 else FRAMES_PER_SECOND
        total = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        # An .mp4 cannot be read before it is closed: it gets its name then.
        draft = place.with_name(f"{place.stem}.part.mp4")
        writer = cv2.VideoWriter(str(draft), cv2.VideoWriter.fourcc(*"mp4v"), rate, (width, height))
        if not writer.isOpened():
            raise OSError(f"{draft}: OpenCV cannot write this video")
        try:
            with (
                JsonList(place.with_suffix(".json")) as records,
                tqdm(total=total if total > 0 else None, desc=source.name, unit="frame") as bar,
            ):
                results = segmenter.stream(_chain(first, frames), threshold)
                for number, result in enumerate(results):
                    writer.write(cv2.cvtColor(result.draw(), cv2.COLOR_RGB2BGR))
                    found = result.to_coco(number)
                    for record in found if isinstance(found, list) else [found]:
                        records.add(record)
                    bar.update()
        finally:
            writer.release()
            draft.replace(place)
    finally:
        capture.release()
    return None


def _frames(capture: cv2.VideoCapture) -> Iterator[np.ndarray]:
    """uint8 [H, W, 3], RGB, until the video ends."""
    while True:
        is_there, frame = capture.read()
        if not is_there:
            return
        yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)


def _chain(first: np.ndarray, rest: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    yield first
    yield from rest
