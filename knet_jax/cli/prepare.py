"""Converts a dataset to ArrayRecord, as the first training run would, and says what it holds.

knet prepare --config coco_panoptic --config.data.root=/data/coco
knet prepare --config coco_panoptic --config.data.root=/data/coco --check
knet prepare --config coco_instance --config.data.root=/nfs/big --beam_runner=FlinkRunner \\
    --beam_options='--flink_master=host:8081 --parallelism=64'

Ends with the command that trains on this data. --check reports what the annotations show, and draws
some of them. What was interrupted goes on when it is called again.
"""

from __future__ import annotations

import shlex
import sys
from argparse import Namespace
from pathlib import Path

from knet_jax.cli.commandline import Parser, number
from knet_jax.config.files import load_config
from knet_jax.data.prepare import prepare_dataset
from knet_jax.segmentation import class_lists
from knet_jax.system.errors import UserError


def add_flags(parser: Parser) -> None:
    parser.config_flag(required=True)
    parser.switch("check", "examine what is prepared, and draw a sheet of it")
    parser.flag("output", "where --check puts its sheets", "runs/check")
    parser.flag(
        "workers", "how many processes convert; default: one for each core", 0, type=number(int, 1)
    )
    parser.flag("beam_runner", "convert on a cluster: a runner of Apache Beam, such as FlinkRunner")
    parser.flag("beam_options", "flags of that runner", "")


def main(args: Namespace) -> None:
    config = load_config(args.config, args.overrides)
    if args.beam_options and not args.beam_runner:
        raise UserError("--beam_options needs --beam_runner, such as --beam_runner=FlinkRunner")
    beam = shlex.split(args.beam_options)
    if args.beam_runner:
        beam.append(f"--runner={args.beam_runner}")
    sheets = args.output if args.check else None
    categories = prepare_dataset(config, sheets, args.workers, beam)
    counts = class_lists.class_counts(config, categories).items()
    flags = [
        f"--config.model.{name}={n}" for name, n in counts if config.model[name] not in (None, n)
    ]
    script = Path(sys.argv[0]).name == "prepare_data.py"
    program = "python train.py" if script else "knet train"
    command = [f"--config={args.config}", "--workdir=runs/mine", *args.overrides, *flags]
    print(f"To train on it: {program} {shlex.join(command)}")
