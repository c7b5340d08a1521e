"""Says what a train step needs, and how it would scale over nodes of GPUs: on paper.

python benchmarks/efficiency.py --config coco_panoptic --size 800x1344
python benchmarks/efficiency.py --gpus 64 --nic 1.5    # GB/s from a GPU to other nodes

Operations, work space and traffic of the gradients of one picture and the bytes that devices exchange are
XLA's and the network's own; nothing is run. The speed of the GPU and its links is assumed, by the flags,
whose defaults are those of an H200 in a node of eight with a 400 Gbit/s adapter each.

A step: every GPU computes the gradients of its pictures, as fast as its arithmetic or its memory lets it;
then all add up theirs (within the node, then each GPU an eighth of them with the other nodes, in a ring),
and take the same step of AdamW. Nothing of it overlaps.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
import scenes
from ml_collections import ConfigDict
from parts import Size, lower
from run import count, input_size

from knet_jax.config.files import load_config
from knet_jax.matching import LossWeights
from knet_jax.model import init_variables, make_model
from knet_jax.nn.layers import AXIS
from knet_jax.tasks import TASKS
from knet_jax.training import train_step

NODE = 8
"""GPUs of a node."""


class Needs(NamedTuple):
    """What the gradients of one picture need."""

    flop: float
    bytes_moved: float
    """Read and written."""
    work_space: float
    exchanged: float
    """Bytes of all gradients, which every device adds to those of the others in every step."""


def find_needs(config: ConfigDict, size: Size) -> Needs:
    """Compiles the gradients of one picture, for the CPU but in the forms of GPUs, and asks XLA."""
    model, task = make_model(**config.model), TASKS[config.task]
    variables = init_variables(model, config.seed)
    params, batch_stats = variables["params"], variables.get("batch_stats", {})
    batch = scenes.batch(1, size, config, seed=0)
    part = jax.tree.map(lambda x: np.asarray(x)[None], batch)
    counts = task.count(task.unpack(batch.targets))
    gradients = jax.pmap(
        partial(train_step.accumulate, model=model, task=task, weights=LossWeights(**config.loss)),
        in_axes=(None, None, None, 0, None, None),
        axis_name=AXIS,
        devices=jax.local_devices()[:1],
    )
    key = jax.random.key(config.seed)
    program = lower(gradients, params, params, batch_stats, part, counts, key).compile()
    costs = program.cost_analysis()
    return Needs(
        costs["flops"],
        costs["bytes accessed"],
        program.memory_analysis().temp_size_in_bytes,
        sum(x.nbytes for x in jax.tree.leaves(params)),
    )


def seconds_of_step(needs: Needs, gpus: int, args: argparse.Namespace) -> dict[str, float]:
    """What each part of a step takes.

    Args:
        needs: of a picture.
        gpus: all of them, full nodes or a part of one.
        args: see `main`.
    """
    picture = max(
        needs.flop / (args.tflops * 1e12 * args.share),
        needs.bytes_moved / (args.memory * 1e9 * args.share),
    )
    inside, nodes = min(gpus, NODE), -(-gpus // NODE)
    within = 2 * (inside - 1) / inside * needs.exchanged / (args.nvlink * 1e9 * args.share)
    between = 2 * (nodes - 1) / nodes * needs.exchanged / inside / (args.nic * 1e9 * args.share)
    hops = 2 * (inside - 1 + nodes - 1) * args.latency * 1e-6
    # AdamW reads gradient, parameter and two moments, and writes the last three.
    update = 7 * needs.exchanged / (args.memory * 1e9 * args.share)
    return {
        "gradients": args.pictures * picture,
        "exchange": within + between + hops,
        "rest": update + args.matching * 1e-3,
    }


def main() -> None:
    """Prints the needs and a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="coco_panoptic")
    parser.add_argument("--size", type=input_size, default=Size(800, 1344))
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--gpus", type=count, nargs="+", default=[1, 8, 64, 512])
    flags = {
        "pictures": (2.0, "of a GPU in a step"),
        "tflops": (989.0, "of its arithmetic at best, in 10^12 a second"),
        "memory": (4800.0, "of its memory at best, in GB/s"),
        "nvlink": (450.0, "between GPUs of a node, each way, in GB/s"),
        "nic": (50.0, "from a GPU to other nodes, in GB/s"),
        "latency": (10.0, "of a message, in microseconds"),
        "share": (0.5, "of these that is reached"),
        "matching": (3.0, "milliseconds of the assignments of a step"),
    }
    for name, (default, text) in flags.items():
        parser.add_argument(f"--{name}", type=float, default=default, help=text)
    args = parser.parse_args()
    config = load_config(args.config, {"model.dtype": args.dtype})
    needs = find_needs(config, args.size)
    print(
        f"a picture of {args.size} in {args.dtype}: {needs.flop / 1e12:.2f} Tflop, "
        f"{needs.bytes_moved / 2**30:.1f} GiB read and written, work space "
        f"{needs.work_space / 2**30:.2f} GiB; {needs.exchanged / 1e6:.0f} MB of gradients a step\n"
    )
    print("| GPUs | pictures a step | gradients | exchange | rest | efficiency | images/s a node |")
    print("|---|---|---|---|---|---|---|")
    alone = sum(seconds_of_step(needs, 1, args).values())
    for gpus in args.gpus:
        seconds = seconds_of_step(needs, gpus, args)
        total = sum(seconds.values())
        cells = [
            gpus,
            f"{gpus * args.pictures:.0f}",
            *(f"{1e3 * s:.1f} ms" for s in seconds.values()),
        ]
        cells += [f"{alone / total:.2f}", f"{min(gpus, NODE) * args.pictures / total:.0f}"]
        print("| " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    main()
