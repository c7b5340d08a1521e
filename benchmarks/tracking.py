"""Measures how well identities stay through drawn videos: by overlap alone, by kernels alone, by both.

python benchmarks/tracking.py --model runs/demo --output benchmarks/results/tracking.json

Five shapes of two classes cross, hide each other, go and return, at three speeds. The model is one of
`make demo`, panoptic or instance, which has seen pictures and never a video.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from tqdm import tqdm

import knet_jax
from knet_jax.app.tracking import Tracker
from knet_jax.data.sources.shapes import Drawing, draw_video
from knet_jax.metrics.tracking import TrackingCounts, count, merge, summarize
from knet_jax.segmentation.drawing import as_panoptic
from knet_jax.segmentation.result import Result
from knet_jax.segmentation.segments import Categories, PanopticMap, SegmentInfo
from knet_jax.system.output_files import write_json

SPEEDS = (2.0, 4.0, 8.0)
"""The most that a shape moves from frame to frame, in pixels of 128."""
MATCHINGS = {
    "overlap, of a class": {"by_kernels": 0.0, "least": 0.05, "same_class": True},
    "overlap": {"by_kernels": 0.0, "least": 0.05},
    "kernels": {"by_kernels": 1.0, "least": 0.8},
    "both, of a class": {"same_class": True},
    "both": {},
}
"""Settings of a `Tracker`, each the best of some on other videos than those that are measured."""


def truth_of(drawing: Drawing, categories: Categories) -> PanopticMap:
    """The segments of a frame whose classes a model knows; a thing's number is its identity."""
    known = range(len(categories.names))
    segments = tuple(
        SegmentInfo(slot, label, track=slot if label < categories.num_things else 0)
        for slot, label in enumerate(drawing.labels)
        if label in known
    )
    is_known = np.isin(drawing.slots, [segment.id for segment in segments])
    return PanopticMap(np.where(is_known, drawing.slots, 0), segments)


class SideBySide:
    """All matchings on what the network has seen once, in the place of a `Tracker`."""

    def __init__(self):
        self._trackers = [Tracker(**settings) for settings in MATCHINGS.values()]

    def update(self, result: Result, kernels: np.ndarray) -> list[Result]:
        """The result of every matching."""
        return [tracker.update(result, kernels) for tracker in self._trackers]


def measure(
    segmenter: knet_jax.Segmenter, seed: int, num_frames: int, speed: float
) -> list[TrackingCounts]:
    """The counts of every matching in a video."""
    drawings = list(draw_video(seed, num_frames, speed=speed))
    seen = segmenter.track([drawing.image for drawing in drawings], tracker=SideBySide())
    truth = [truth_of(drawing, segmenter.categories) for drawing in drawings]
    maps = [[as_panoptic(r.prediction, r.size) for r in results] for results in seen]
    num_classes = len(segmenter.categories.names)
    return [count(zip(truth, each, strict=True), num_classes) for each in zip(*maps)]


def main() -> None:
    """Measures what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="as of `knet predict`")
    parser.add_argument("--videos", type=int, default=20, help="how many of each speed")
    parser.add_argument("--frames", type=int, default=100, help="of a video")
    parser.add_argument("--first", type=int, default=100, help="seed of the first video")
    parser.add_argument("--output", type=Path, help="JSON of the numbers")
    args = parser.parse_args()

    segmenter = knet_jax.load(args.model)
    rows = []
    for speed in SPEEDS:
        seeds = tqdm(range(args.first, args.first + args.videos), f"speed {speed:g}", unit="video")
        counts = [measure(segmenter, seed, args.frames, speed) for seed in seeds]
        for name, total in zip(MATCHINGS, map(merge, *counts)):
            about = {
                "speed": speed,
                "matching": name,
                "identities": total.tracks,
                "true": total.tubes,
            }
            rows.append(about | summarize(total))
    print("speed  matching                STQ     AQ     SQ  switches  identities")
    for row in rows:
        print(
            "{speed:5g}  {matching:20} {STQ:6.1f} {AQ:6.1f} {SQ:6.1f}  {switches:8}"
            "  {identities} of {true}".format(**row)
        )
    if args.output:
        write_json(args.output, {"frames": args.frames, "videos": args.videos, "results": rows})


if __name__ == "__main__":
    main()
