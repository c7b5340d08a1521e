"""Trains K-Net, or goes on with a run that was stopped.

knet train --config coco_panoptic --config.data.root=/data/coco
knet train --config configs/coco_panoptic.py:r101,ms3x --workdir runs/r101 --config.optim.lr=2e-4

A run lives in its workdir: config.json, checkpoints/, log.jsonl, events/ for TensorBoard, pictures/.
The same command again resumes it where it stopped, to the same numbers.
"""

from __future__ import annotations

from argparse import Namespace

from knet_jax.cli.commandline import Parser
from knet_jax.config.files import default_workdir, load_config
from knet_jax.system.processes import joined
from knet_jax.training.loop import train


def add_flags(parser: Parser) -> None:
    parser.config_flag(required=True)
    parser.flag("workdir", "where the run lives; default: runs/NAME_VARIANT")
    parser.process_flags()


def main(args: Namespace) -> None:
    with joined(args.coordinator, args.num_processes, args.process_id, args.heartbeat):
        config = load_config(args.config, args.overrides)
        train(config, args.workdir or default_workdir(args.config))
