"""Writes drawn pictures that no network was trained on, to try a model of shapes on.

knet shapes FOLDER
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from knet_jax.cli.commandline import Parser
from knet_jax.data.sources.shapes import write_samples
from knet_jax.system.errors import UserError


def add_flags(parser: Parser) -> None:
    """Adds the flags of the command."""
    parser.reads_config = False
    parser.add_argument("folder", nargs="*", metavar="FOLDER", help="created if need be")


def main(args: Namespace) -> None:
    """Runs the command."""
    if len(args.folder) != 1:
        raise UserError("accepted: FOLDER, where the pictures go")
    write_samples(Path(args.folder[0]))
