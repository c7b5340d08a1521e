"""Times K-Net, and draws how time and memory grow with the pictures, the kernels, the rounds and more.

python benchmarks/scaling.py --output benchmarks/results/scaling.json

Panoptic K-Net on ResNet-50 in float32. From the setting in the middle, a picture of 512 x 512 (256 x
256 for a train step), 100 kernels for things, three rounds and eight things, one number after the
other is changed; things with 600 kernels, so that up to 200 find theirs, and devices with a batch of 8
of 128 x 128. The plot lies beside the JSON; one that is there is drawn anew with --draw.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from parts import Case, Size
from run import measure_cases, print_report

from knet_jax.config.files import load_config

AXES = {
    "side": "side of the picture",
    "kernels": "kernels for things",
    "rounds": "rounds S",
    "things": "things in the picture",
    "devices": "devices, of a batch of 8",
}
"""What is changed, and how the plot calls it."""
COLORS = {"network": "#4269d0", "train": "#efb118", "fuse": "#3ca951"}


class Point(NamedTuple):
    """A case, and where it lies in the plot."""

    axis: str
    value: int
    case: Case
    overrides: dict[str, Any]


def points(sizes: tuple[int, ...], side: int) -> Iterator[Point]:
    """All that is measured.

    Args:
        sizes: sides of pictures.
        side: of the picture while other numbers are changed; half of it for train steps.
    """

    def cases(side: int, *parts: str, **numbers: int) -> Iterator[Case]:
        for part in parts:
            # A train step of the same program at a quarter of the pixels says as much.
            size = Size(side, side) if part != "train" else Size(side // 2, side // 2)
            scene = "objects" if part == "fuse" else None
            original = size if part == "fuse" else None
            yield Case(part, size=size, original=original, scene=scene, **numbers)

    for each in sizes:
        yield from (Point("side", case.size.height, case, {}) for case in cases(each, *COLORS))
    for number in (50, 300, 1000):
        for case in cases(side, *COLORS):
            overrides = {"model.num_proposals": number, "data.max_things": 50}
            yield Point("kernels", number, case, overrides)
    for number in (0, 1, 3, 7):
        for case in cases(side, "network", "train"):
            yield Point("rounds", number, case, {"model.num_stages": number})
    for number in (0, 60, 200):
        overrides = {"model.num_proposals": 600, "data.max_things": 200}
        for case in cases(side, "train", "fuse", things=number):
            yield Point("things", number, case, overrides)
    for number in (1, 2, 4, 8):
        for case in cases(side // 2, "train", batch=8, devices=number):
            yield Point("devices", number, case, {"train.microbatch": 1})


def draw(records: list[dict[str, Any]], path: Path) -> None:
    """Time above memory, a column for each number that is changed."""
    figure = Figure(figsize=(3.2 * len(AXES), 5.6), layout="constrained")
    panels = figure.subplots(2, len(AXES), sharex="col")
    rows = {"min_ms": "milliseconds", "host_peak_mib": "memory of the process, MiB"}
    for above, (axis, title) in zip(panels.T, AXES.items()):
        for panel, key in zip(above, rows):
            for part, color in COLORS.items():
                line = sorted(
                    (int(record["config"].removeprefix(f"{axis}=")), record[key])
                    for record in records
                    if record["config"].startswith(f"{axis}=")
                    and record["part"] == part
                    and key in record
                )
                if line:
                    panel.plot(*zip(*line), "o-", color=color, label=part)
            panel.set_ylim(bottom=0)
            panel.grid(alpha=0.3)
        above[0].legend()
        above[1].set_xlabel(title)
    for panel, text in zip(panels[:, 0], rows.values()):
        panel.set_ylabel(text)
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--repeat", type=int, default=5, help="how often each case is timed (default: 5)"
    )
    parser.add_argument(
        "--axes", default=",".join(AXES), help=f"A,B,... of {', '.join(AXES)} (default: all)"
    )
    parser.add_argument("--tiny", action="store_true", help="a tiny network: does this run here?")
    parser.add_argument("--draw", action="store_true", help="measure nothing, draw what is there")
    parser.add_argument("--output", type=Path, required=True, help="JSON for the results")
    args = parser.parse_args()
    if unknown := set(args.axes.split(",")) - set(AXES):
        parser.error(f"--axes: {', '.join(sorted(unknown))}; accepted: {', '.join(AXES)}")
    if not args.draw:
        name = "coco_panoptic:tiny" if args.tiny else "coco_panoptic"
        sizes, side = ((64, 128), 128) if args.tiny else ((256, 512, 768), 512)
        chosen = [p for p in points(sizes, side) if p.axis in args.axes.split(",")]
        # What is measured is called by what is changed, which the plot is drawn from.
        specs = [f"{point.axis}={point.value}" for point in chosen]
        configs = {spec: load_config(name, p.overrides) for spec, p in zip(specs, chosen)}
        planned = [(spec, point.case) for spec, point in zip(specs, chosen)]
        args.output.parent.mkdir(parents=True, exist_ok=True)
        print_report(measure_cases(planned, configs, args.repeat, args.output), args.output)
    records = json.loads(args.output.read_text())["results"]
    draw(records, args.output.with_suffix(".png"))
    print(f"wrote {args.output.with_suffix('.png')}")
    return int(any("error" in record for record in records))


if __name__ == "__main__":
    sys.exit(main())
