"""Measures how well identities stay through drawn videos: by overlap alone, by kernels alone, by both.

python benchmarks/tracking.py --model runs/demo --output benchmarks/results/tracking.json

Five shapes of two classes cross, hide each other, go and return, at three speeds. The model is one of
`make demo`, panoptic or instance, which has seen pictures and never a video.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

import knet_jax
from knet_jax.app.tracking import Tracker
from knet_jax.data.sources.shapes import Drawing, draw_video
from knet_jax.metrics import tracking
from knet_jax.segmentation.drawing import as_panoptic
from knet_jax.segmentation.segments import Categories, PanopticMap, SegmentInfo
from knet_jax.system.output_files import write_json

SPEEDS = (2.0, 4.0, 8.0)
"""The most that a shape moves from frame to frame, in pixels of 128."""
MATCHINGS = {
    "overlap": {"by_kernels": 0.0, "least": 0.1},
    "kernels": {"by_kernels": 1.0, "least": 0.8},
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


def compare(
    segmenter: knet_jax.Segmenter, drawings: list[Drawing], tracker: Tracker
) -> Iterator[tuple[PanopticMap, PanopticMap]]:
    """The truth of every frame, and what is seen in it."""
    results = segmenter.track([drawing.image for drawing in drawings], tracker=tracker)
    for drawing, result in zip(drawings, results, strict=True):
        truth = truth_of(drawing, segmenter.categories)
        yield truth, as_panoptic(result.prediction, result.size)


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
    num_classes, rows = len(segmenter.categories.names), []
    for speed in SPEEDS:
        counts = {name: [] for name in MATCHINGS}
        seeds = range(args.first, args.first + args.videos)
        for seed in tqdm(seeds, desc=f"speed {speed:g}", unit="video"):
            drawings = list(draw_video(seed, args.frames, speed=speed))
            for name, settings in MATCHINGS.items():
                pairs = compare(segmenter, drawings, Tracker(**settings))
                counts[name].append(tracking.count(pairs, num_classes))
        for name, each in counts.items():
            total = tracking.merge(*each)
            numbers = {"identities": total.tracks, "true": total.tubes}
            rows.append({"speed": speed, "matching": name, **tracking.summarize(total), **numbers})
    print("speed  matching    STQ     AQ     SQ  switches  identities")
    for row in rows:
        print(
            "{speed:5g}  {matching:8} {STQ:6.1f} {AQ:6.1f} {SQ:6.1f}  {switches:8}"
            "  {identities} of {true}".format(**row)
        )
    if args.output:
        write_json(args.output, {"frames": args.frames, "videos": args.videos, "results": rows})


if __name__ == "__main__":
    main()
