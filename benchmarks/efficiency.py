"""Says how a train step would scale over nodes of GPUs: on paper.

python benchmarks/efficiency.py
python benchmarks/efficiency.py --gpus 64 --nic 1.5    # GB/s from a GPU to other nodes

What a step needs is what `gpu_programs.py` has found, and how fast an H200 is at best is what it says. The
speed of links and the share of all speeds that is reached are assumed, by the flags, whose defaults are a
node of eight with a 400 Gbit/s adapter each.

A step: every GPU computes the gradients of its pictures, as fast as its arithmetic, its memory or the
launches of its kernels let it; then all add up theirs (within the node, then each GPU an eighth of them
with the other nodes, in a ring), and take the same step of AdamW. Nothing of it overlaps.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import NamedTuple

from gpu_programs import MEMORY, TFLOPS
from run import count

NODE = 8
"""GPUs of a node."""
PROGRAMS = Path(__file__).with_name("results") / "gpu_programs.json"


class Needs(NamedTuple):
    """What a program needs, as `gpu_programs.py` says it."""

    flop: float
    bytes_moved: float
    """Read and written."""
    kernels: int


def find_needs(report: dict, **wanted: str | int) -> Needs:
    """Of the program with these keys."""
    for row in report["programs"]:
        if wanted.items() <= row.items():
            return Needs(*(row[key] for key in Needs._fields))
    sys.exit(f"the file has no program {wanted}; gpu_programs.py makes one, by its flags")


def seconds_of_program(needs: Needs, args: argparse.Namespace) -> float:
    """What bounds it most: arithmetic, memory or launches."""
    return max(
        needs.flop / (TFLOPS[args.precision] * 1e12 * args.share),
        needs.bytes_moved / (MEMORY * args.share),
        needs.kernels * args.launch * 1e-6,
    )


def seconds_of_step(
    gradients: Needs, update: Needs, exchanged: int, gpus: int, args: argparse.Namespace
) -> dict[str, float]:
    """What each part of a step takes.

    Args:
        gradients: of the pictures of a GPU.
        update: of AdamW.
        exchanged: bytes of all gradients, which every GPU adds to those of the others.
        gpus: all of them, full nodes or a part of one.
        args: see `main`.
    """
    inside, nodes = min(gpus, NODE), -(-gpus // NODE)
    within = 2 * (inside - 1) / inside * exchanged / (args.nvlink * 1e9 * args.share)
    between = 2 * (nodes - 1) / nodes * exchanged / inside / (args.nic * 1e9 * args.share)
    hops = 2 * (inside - 1 + nodes - 1) * args.latency * 1e-6
    return {
        "gradients": seconds_of_program(gradients, args),
        "exchange": within + between + hops,
        "rest": seconds_of_program(update, args) + args.matching * 1e-3,
    }


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--programs", type=Path, default=PROGRAMS, help="JSON of gpu_programs.py")
    parser.add_argument("--precision", choices=TFLOPS, default="bfloat16")
    parser.add_argument("--pictures", type=count, default=2, help="of a GPU in a step")
    parser.add_argument("--gpus", type=count, nargs="+", default=[1, 8, 64, 512])
    flags = {
        "launch": (2.0, "microseconds from one kernel to the next at least"),
        "nvlink": (450.0, "between GPUs of a node, each way, in GB/s"),
        "nic": (50.0, "from a GPU to other nodes, in GB/s"),
        "latency": (10.0, "of a message, in microseconds"),
        "share": (0.5, "of the speed of arithmetic, memory and links that is reached"),
        "matching": (3.0, "milliseconds of the assignments of a step"),
    }
    for name, (default, text) in flags.items():
        parser.add_argument(f"--{name}", type=float, default=default, help=text)
    args = parser.parse_args()
    try:
        report = json.loads(args.programs.read_text())
        exchanged = report["gradient_bytes"]
        of = f"{report['config']}, {'x'.join(map(str, report['size']))}, {report['target']}"
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f"{args.programs}: is no JSON of gpu_programs.py: {error!r}")
    gradients = find_needs(
        report, program="gradients", precision=args.precision, batch=args.pictures
    )

    def step(gpus: int) -> dict[str, float]:
        update = find_needs(report, program="update", gpus=min(gpus, NODE))
        return seconds_of_step(gradients, update, exchanged, gpus, args)

    print(f"{of}, {args.precision}, {args.pictures} pictures a GPU\n")
    print("| GPUs | pictures a step | gradients | exchange | rest | efficiency | images/s a node |")
    print("|---|---|---|---|---|---|---|")
    alone = sum(step(1).values())
    for gpus in args.gpus:
        seconds = step(gpus)
        total = sum(seconds.values())
        cells = [gpus, gpus * args.pictures, *(f"{1e3 * s:.1f} ms" for s in seconds.values())]
        cells += [f"{alone / total:.2f}", f"{min(gpus, NODE) * args.pictures / total:.0f}"]
        print("| " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    main()
