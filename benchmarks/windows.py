"""Large drawn pictures: seen whole, in windows side by side, and in windows that overlap.

python benchmarks/windows.py --model runs/demo --output benchmarks/results/windows.json
python benchmarks/windows.py --model runs/demo --memory 1000x1333,3000x4000,6000x8000

Draws pictures with things of the sizes that the demo was trained on, segments them in every way, and
scores them (PQ, or AP with all predictions from a score of 0.05 on); or tells the peak memory of the processes that
segment pictures of several sizes, 500 things in each.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cv2
import numpy as np
from scipy import ndimage

import knet_jax
from knet_jax.data.sources.shapes import Drawing, draw_large
from knet_jax.segmentation import rle
from knet_jax.segmentation.segments import Instance, PanopticMap, SegmentInfo
from knet_jax.system.output_files import write_whole
from knet_jax.tasks import TASKS

Size = tuple[int, int]

ALL = 10**6
"""Of predictions, where COCO's AP takes the first 100 of a class."""
LEAST = 0.05
"""The least score of an instance that counts."""


def ways(size: Size, side: int, steps: Sequence[int]) -> dict[str, list[str]]:
    """What changes the config for each way to look at a picture."""

    def windows(step: int) -> list[str]:
        return [f"--config.eval.window={side, side}", f"--config.eval.window_step={step, step}"]

    short, long = sorted(size)
    return {
        "whole, reduced": [],
        "whole, at its size": [
            f"--config.data.canvas={-(-short // 32) * 32, -(-long // 32) * 32}",
            f"--config.data.short_side={short, short}",
            f"--config.data.long_side={long}",
            "--config.data.eval_multiple=32",
        ],
    } | {f"windows of {side}, every {step}": windows(step) for step in steps}


def truth_of(drawing: Drawing, task: str, num_things: int) -> PanopticMap | tuple[Instance, ...]:
    """What a drawing shows, as metrics take it."""
    slots, labels = drawing.slots.astype(np.int32), drawing.labels
    if task == "panoptic":
        infos = (SegmentInfo(slot, labels[slot]) for slot in np.unique(slots[slots > 0]).tolist())
        return PanopticMap(slots, tuple(infos))
    instances = []
    for slot, where in enumerate(ndimage.find_objects(slots), 1):
        if where and labels[slot] < num_things:
            mask = rle.encode(slots[where] == slot)
            mask = rle.move(mask, (where[0].start, where[1].start), slots.shape)
            instances.append(Instance(mask, labels[slot], area=float(rle.area(mask))))
    return tuple(instances)


def compare(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Scores every way to look at the pictures."""
    drawings = [draw_large(seed, args.size, args.things) for seed in range(args.pictures)]
    rows = []
    changes = ways(args.size, args.window, args.steps)
    for name in filter(args.only.match, changes):
        overrides = changes[name]
        segmenter = knet_jax.load(args.model, overrides=overrides, batch_size=args.batch_size)
        metric, categories = TASKS[segmenter.task].metric, segmenter.categories
        is_instance = segmenter.task == "instance"
        limit = {"max_predictions": ALL} if is_instance else {}
        counts, found = [], 0
        for i, drawing in enumerate(drawings):
            result = segmenter(drawing.image, threshold=LEAST if is_instance else None)
            truth = truth_of(drawing, segmenter.task, categories.num_things)
            counts.append(metric.count(truth, result.prediction, len(categories.names), i, **limit))
            found += sum(thing.score >= 0.3 for thing in result.instances)
        scores = metric.summarize(metric.merge(*counts), categories)
        names = metric.HEADLINE if is_instance else (*metric.HEADLINE, "SQ", "RQ")
        row = {"way": name} | {key: round(float(scores[key]), 2) for key in names}
        rows.append(row | {"things": found / len(drawings)})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The peak of the resident memory of processes that segment a picture each."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for size in args.memory:
            path = Path(folder) / f"{size[0]}x{size[1]}.png"
            draw = [sys.executable, __file__, "--draw", str(path), "--things", str(args.things)]
            subprocess.run([*draw, "--size", path.stem], check=True)
            for name in filter(args.only.match, ways(size, args.window, args.steps)):
                see = [sys.executable, __file__, "--model", args.model, "--see", str(path), name]
                see += ["--window", str(args.window), "--steps", ",".join(map(str, args.steps))]
                done = subprocess.run(
                    [*see, "--size", path.stem], stdout=subprocess.PIPE, text=True, check=False
                )
                peak = None if done.returncode else int(done.stdout.split()[-1])
                rows.append({"size": path.stem, "way": name, "peak_mib": peak})
                print(json.dumps(rows[-1]), flush=True)
    return rows


def see(args: argparse.Namespace) -> None:
    """Segments a picture, and tells the peak memory of this process in MiB."""
    path, name = args.see
    overrides = ways(args.size, args.window, args.steps)[name]
    segmenter = knet_jax.load(args.model, overrides=overrides, batch_size=args.batch_size)
    result = segmenter(path, threshold=0.3)
    assert result.size == args.size
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)


def parse_size(text: str) -> Size:
    """Reads HEIGHTxWIDTH."""
    height, width = map(int, text.split("x"))
    return height, width


def main() -> None:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a demo: the folder of `make demo`, panoptic or instance")
    parser.add_argument("--size", type=parse_size, default=(3000, 4000), help="height x width")
    parser.add_argument("--things", type=int, default=500, help="in each picture")
    parser.add_argument("--pictures", type=int, default=1)
    parser.add_argument("--window", type=int, default=128, help="its side")
    parser.add_argument(
        "--steps",
        type=lambda text: [int(step) for step in text.split(",")],
        default=[128, 96, 64],
        help="from one window to the next; several to compare",
    )
    parser.add_argument("--batch_size", type=int, default=8, help="windows at a time")
    parser.add_argument(
        "--memory",
        type=lambda text: [parse_size(size) for size in text.split(",")],
        help="measure memory for pictures of these sizes",
    )
    parser.add_argument(
        "--only", type=re.compile, default=re.compile(""), help="ways, by expression"
    )
    parser.add_argument("--output", type=Path, help="JSON of the table")
    parser.add_argument("--see", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--draw", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.draw:
        cv2.imwrite(args.draw, draw_large(0, args.size, args.things).image[..., ::-1])
        return
    if args.see:
        see(args)
        return
    rows = measure(args) if args.memory else compare(args)
    if args.output:
        about = {"model": args.model, "things": args.things, "window": args.window}
        write_whole(args.output, (json.dumps(about | {"results": rows}, indent=2) + "\n").encode())


if __name__ == "__main__":
    main()
