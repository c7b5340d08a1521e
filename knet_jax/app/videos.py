"""Segmenting a video: a video of the overlays, and a JSON of the segments of every frame."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Self

import cv2
import numpy as np
from tqdm import tqdm

from knet_jax.app.predictions import VIDEO_RESULTS, InputFile, end_if_asked, until
from knet_jax.app.segmenter import Segmenter
from knet_jax.segmentation.image_files import MAX_MEGAPIXELS
from knet_jax.system.errors import UserError
from knet_jax.system.output_files import JsonList
from knet_jax.system.signals import StopRequest

FRAMES_PER_SECOND = 25.0
"""Assumed of a video that does not say."""


def predict_video(
    segmenter: Segmenter,
    source: InputFile,
    folder: Path,
    threshold: float | None = None,
    stop: StopRequest | None = None,
    max_megapixels: float = MAX_MEGAPIXELS,
    track: bool = False,
) -> str | None:
    """Segments a video frame by frame, in constant memory, with a progress bar.

    Writes `videos/NAME.mp4`, and `videos/NAME.json`: what `Result.to_coco` gives, the number of the
    frame, from 0 on, being the id of the picture. With `track`, things have identities.

    Returns:
        What was wrong with the video; None where all of it could be read and written.

    Raises:
        Preempted: it was asked to stop.
    """
    end_if_asked(stop)
    capture = cv2.VideoCapture(str(source.path))
    try:
        frames = _Frames(capture)
        if frames.megapixels > max_megapixels:
            return (
                f"{source.path}: {frames.megapixels:.1f} megapixels; accepted: up to "
                f"{max_megapixels:g} (--max_megapixels)"
            )
        first = next(frames, None)
        if first is None:
            return f"{source.path}: no frame of it can be decoded"
        segment = segmenter.track if track else segmenter.stream
        results = segment(chain([first], frames), threshold)
        # Before the first result nothing is written: what an earlier run has left stays.
        results = chain([next(results)], results)
        place = folder / VIDEO_RESULTS / f"{source.stem}.mp4"
        place.parent.mkdir(parents=True, exist_ok=True)
        with (
            VideoWriter(place, frames.rate, first.shape[:2]) as video,
            JsonList(place.with_suffix(".json")) as records,
            tqdm(total=frames.total, desc=source.stem, unit="frame") as bar,
        ):
            for number, result in enumerate(until(stop, results)):
                video.add(result.draw())
                found = result.to_coco(number)
                for record in found if isinstance(found, list) else [found]:
                    records.add(record)
                bar.update()
        if frames.has_more:
            return f"{source.path}: ends after {frames.number} of {frames.total} frames"
    except _UnwritableError as error:
        return f"{source.path}: {error}"
    finally:
        capture.release()
    return None


class _Frames:
    """Iterates over the frames of a video, uint8 [H, W, 3], RGB, as far as they can be decoded."""

    def __init__(self, capture: cv2.VideoCapture):
        self._capture = capture
        rate = capture.get(cv2.CAP_PROP_FPS)
        self.rate = rate if 0 < rate < 1000 else FRAMES_PER_SECOND
        total = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        self.total = total if total > 0 else None
        """How many frames the file says it has, None where it does not say."""
        sides = (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT)
        self.megapixels = np.prod([capture.get(side) for side in sides]) / 1e6
        self.number = 0
        """How many frames were read so far."""
        self._seconds = 0.0

    @property
    def has_more(self) -> bool:
        """Whether the file says that frames follow those that could be read.

        Some files only tell how long they last, which is another number of frames where these are
        not evenly spaced; so it is enough that the last one comes at the end.
        """
        reached = max(self.number, self._seconds * self.rate + 1)
        return self.total is not None and reached < 0.98 * self.total - 1

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> np.ndarray:
        is_there, frame = self._capture.read()
        if not is_there:
            raise StopIteration
        self.number += 1
        self._seconds = self._capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
        return cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)


class _UnwritableError(UserError):
    """OpenCV cannot write a video."""


class VideoWriter:
    """Writes a video, which appears when it is whole.

    Its size is (height, width), its rate frames per second.

    Raises:
        _UnwritableError: OpenCV does not take this, or has not written all frames in the end.
    """

    def __init__(self, path: Path, rate: float, size: tuple[int, int]):
        self._path, self._size = path, size
        # The suffix tells OpenCV the format.
        self._draft = path.with_name(f"{path.name}.part.mp4")
        self._number = 0
        # OpenCV takes thousandths of a frame; MPEG-4 divides a second into at most 65535 ticks.
        rate = round(rate, 3 if rate < 65 else 2 if rate < 655 else 1)
        code = cv2.VideoWriter.fourcc(*"mp4v")
        self._writer = cv2.VideoWriter(str(self._draft), code, rate, size[::-1])
        if not self._writer.isOpened():
            self._draft.unlink(missing_ok=True)
            raise _UnwritableError(
                f"OpenCV cannot write {path} of {size[1]}x{size[0]} at {rate} frames per second"
            )

    def __enter__(self) -> Self:
        return self

    def add(self, frame: np.ndarray) -> None:
        """Writes uint8 [H, W, 3], RGB; a frame of another size is resized."""
        if frame.shape[:2] != self._size:
            frame = cv2.resize(frame, self._size[::-1])
        self._writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
        self._number += 1

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._writer.release()
        written = cv2.VideoCapture(str(self._draft))
        # Ctrl-C may come between a frame and its number.
        is_whole = written.get(cv2.CAP_PROP_FRAME_COUNT) >= max(1, self._number)
        written.release()
        if is_whole:
            self._draft.replace(self._path)
            return
        self._draft.unlink(missing_ok=True)
        if kind is None:
            raise _UnwritableError(f"OpenCV could not write all of {self._path}; is the disk full?")
