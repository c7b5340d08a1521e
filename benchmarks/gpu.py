"""Times what matters on an accelerator, the most telling cases first, for as long as there is time.

python benchmarks/gpu.py --minutes 8 --output benchmarks/results/gpu.json

COCO panoptic with ResNet-50 at 800 x 1344: train step, network, fusion and end to end, in three
precisions, at one picture, eight, and more until the memory is full; and the loader, on drawn pictures.
Cases that there was no time for are named.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from parts import Case, Size
from run import measure_cases, print_report

from knet_jax.config.files import load_config

FULL = {"size": Size(800, 1344), "picture": Size(800, 1333), "config": "coco_panoptic"}
TINY = {"size": Size(64, 96), "picture": Size(64, 90), "config": "coco_panoptic:tiny"}
LOADED = {
    "data.image_side": (480, 640),
    "data.num_train": 64,
    "data.canvas": (640, 640),
    "data.short_side": (480, 640),
    "data.long_side": 640,
}
"""Drawn pictures of the size of COCO's."""


def cases(size: Size, picture: Size) -> list[Case]:
    """In the order of their worth."""

    def train(precision: str, batch: int) -> Case:
        return Case("train", precision, batch, size)

    def network(precision: str, batch: int) -> Case:
        return Case("network", precision, batch, size)

    def whole(precision: str, batch: int) -> Case:
        return Case("segmenter", precision, batch, original=picture, scene="objects")

    return [
        train("bfloat16", 8),
        network("bfloat16", 8),
        train("tensorfloat32", 8),
        whole("bfloat16", 1),
        Case("fuse", batch=8, size=size, original=picture, scene="objects"),
        Case("loader", batch=16, workers=4),
        train("float32", 1),
        network("float32", 1),
        network("bfloat16", 1),
        train("bfloat16", 32),
        network("bfloat16", 64),
        whole("bfloat16", 8),
        train("bfloat16", 1),
        network("tensorfloat32", 8),
        network("float32", 8),
        train("float32", 8),
        Case("fuse", batch=1, size=size, original=picture, scene="random"),
        train("bfloat16", 64),
        network("bfloat16", 128),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="when to stop (default: 8)")
    parser.add_argument(
        "--repeat", type=int, default=7, help="how often each is timed (default: 7)"
    )
    parser.add_argument("--tiny", action="store_true", help="a tiny network: does this run here?")
    parser.add_argument("--output", type=Path, help="JSON for the results")
    args = parser.parse_args()
    shapes = dict(TINY if args.tiny else FULL)
    config = load_config(shapes.pop("config"))
    config.train.microbatch = 1 << 20  # a whole batch at once
    drawn = load_config("shapes_panoptic", {} if args.tiny else LOADED)
    planned = [
        ("shapes_panoptic" if case.part == "loader" else "coco_panoptic", case)
        for case in cases(**shapes)
    ]
    configs = {"coco_panoptic": config, "shapes_panoptic": drawn}
    deadline = time.monotonic() + 60 * args.minutes
    report = measure_cases(planned, configs, args.repeat, args.output, deadline=deadline)
    print_report(report, args.output)
    # That a batch has no room is a result.
    return int("error" in report["results"][0])


if __name__ == "__main__":
    sys.exit(main())
