"""Draws every logged value of runs over the steps, into curve.png of their workdirs.

knet logs runs/coco_panoptic runs/r101
"""

from __future__ import annotations

from argparse import Namespace

from knet_jax.cli.commandline import Parser
from knet_jax.system.errors import UserError
from knet_jax.training.logs import plot_curves


def add_flags(parser: Parser) -> None:
    parser.reads_config = False
    parser.add_argument("workdirs", nargs="*", metavar="WORKDIR", help="of a run")


def main(args: Namespace) -> None:
    if not args.workdirs:
        raise UserError("accepted: WORKDIR ..., the folders of runs")
    for workdir in args.workdirs:
        print(plot_curves(workdir))
