"""Segmenting files and folders of pictures and videos in one call."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax

from knet_jax.app.predictions import (
    VIDEOS,
    Predictions,
    find_ids,
    find_sources,
    predict_pictures,
)
from knet_jax.app.segmenter import load
from knet_jax.app.videos import predict_video
from knet_jax.saved.checkpoints import check_writable
from knet_jax.segmentation.image_files import MAX_MEGAPIXELS
from knet_jax.system.errors import UserError
from knet_jax.system.signals import stop_when_asked


class Outcome(NamedTuple):
    """What has been segmented."""

    num_pictures: int
    num_videos: int
    problems: list[str]
    """What was wrong with each file that could not be read, or not to its end."""


def predict_files(
    model: str | os.PathLike,
    paths: Sequence[str],
    output: str | Path = "predictions",
    *,
    threshold: float | None = None,
    checkpoint: str | int = "best",
    ema: bool = False,
    batch_size: int | None = None,
    image_info: str | Path | None = None,
    max_megapixels: float = MAX_MEGAPIXELS,
    track: bool = False,
    overrides: Sequence[str] = (),
) -> Outcome:
    """Segments pictures and videos, and writes pictures of the results and files of them.

    Args:
        model: folder or file of a model, as for `knet_jax.load`.
        paths: of files, and of folders, in which everything is found, subfolders included.
        output: folder of the results, created if need be, see `Predictions`.
        threshold: least score of a thing; default: that of the config.
        checkpoint: of a folder: `best`, `latest`, or the number of a step.
        ema: of a folder: the moving average of the parameters instead of the parameters.
        batch_size: how many pictures are segmented together; default: 1 on a CPU, else 8.
        image_info: JSON in COCO's form: only the pictures that it lists are taken, under its ids.
        max_megapixels: of a picture or a frame; larger ones are skipped.
        track: whether the things of a video get identities, as of `Segmenter.track`.
        overrides: `--config.x.y=value` arguments.

    Returns:
        How many files were found, and the problems with some of them.

    Raises:
        UserError: there is no such model or file, or an argument is not accepted.
        Preempted: SIGTERM or Ctrl-C came; what was done until then is kept.
    """
    output = Path(output)
    pictures, videos = find_sources(paths, output)
    if track and not videos:
        raise UserError(
            f"track: no video among the {len(pictures)} files that are named; accepted: "
            + ", ".join(VIDEOS)
        )
    ids = None
    if image_info and pictures:
        ids, num_listed = find_ids(Path(image_info), pictures)
        print(f"{len(ids)} of {len(pictures)} pictures are among the {num_listed} of {image_info}")
        pictures = [picture for picture in pictures if picture.name in ids]
    check_writable(next(path for path in (output, *output.parents) if path.exists()))
    print(f"opening {model}; the first picture of a size compiles", flush=True)
    segmenter = load(model, checkpoint, ema, batch_size=batch_size, overrides=overrides)
    print(
        f"{len(pictures)} pictures and {len(videos)} videos, {segmenter.task} model of step "
        f"{segmenter.step}, {jax.devices()[0].device_kind}"
    )
    if track:
        segmenter.track(())  # refuses a model without things before anything is segmented
    problems = []
    with stop_when_asked() as stop:
        if pictures:
            with Predictions(output, segmenter.task, segmenter.categories, ids) as predictions:
                problems += predict_pictures(
                    segmenter, pictures, predictions, threshold, stop, max_megapixels
                )
            print(predictions.table())
        for video in videos:
            if problem := predict_video(
                segmenter, video, output, threshold, stop, max_megapixels, track
            ):
                print(f"problem: {problem}", file=sys.stderr)
                problems.append(problem)
    print(f"wrote {output}/" + (f", problems with {len(problems)} files" if problems else ""))
    return Outcome(len(pictures), len(videos), problems)
