"""K-Net in JAX: segments pictures with learned kernels.

knet COMMAND --help tells more of each:
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

# Nothing else is imported before signals have an answer.
from knet_jax.system.ended_by_signals import ended_by_signals

COMMANDS = {
    "train": "trains a network, or goes on with a run that was stopped",
    "eval": "scores a trained network on the validation split",
    "predict": "segments pictures and videos",
    "batch": "segments any number of pictures on a Ray cluster",
    "prepare": "converts a dataset for training, and examines it",
    "convert": "turns PyTorch's checkpoints into models and back",
    "export": "writes a model as one StableHLO or ONNX file",
    "demo": "shows a model as a page in the browser",
    "from-masks": "turns maps of classes and instances into COCO's layout",
    "from-polygons": "turns polygons of LabelMe and YOLO into COCO's layout",
    "logs": "draws the curves of a run",
    "shapes": "writes some drawn pictures, or a video, to try a model of shapes on",
}
"""Commands, each a module of this folder: `add_flags(parser)` adds its flags, and `main(args)` runs it
and may return an exit status."""


def main(arguments: Sequence[str] | None = None) -> None:
    """`knet COMMAND …`, or its arguments given here."""
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help"):
        from knet_jax.system.exit_status import exit_statuses

        width = max(map(len, COMMANDS))
        lines = [f"  {command:{width}}  {text}" for command, text in COMMANDS.items()]
        with exit_statuses("knet"):
            print("\n".join([(__doc__ or "").strip(), *lines]), flush=True)
        return
    run(name, f"knet {name}" if name in COMMANDS else "knet", rest)


def run(name: str, program: str | None = None, arguments: Sequence[str] | None = None) -> None:
    """Runs a command and exits with its status, see `exit_statuses`.

    Args:
        name: one of `COMMANDS`.
        program: how it was called; default: the name of the script.
        arguments: default: those of the process.
    """
    program = program or sys.argv[0].rpartition("/")[2]
    with ended_by_signals(program):
        from knet_jax.system.errors import UserError, suggest
        from knet_jax.system.exit_status import exit_statuses
        from knet_jax.system.library_logs import hide_closed_loops
        from knet_jax.system.xla_flags import known_xla_flags
    hide_closed_loops()
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may not have all letters
    with exit_statuses(program):
        if name not in COMMANDS:
            raise UserError(f"there is no command {name!r}; {suggest(name, COMMANDS)}")
        with ended_by_signals(program), known_xla_flags():
            commandline = import_module("knet_jax.cli.commandline")
            command = import_module(f"knet_jax.cli.{name.replace('-', '_')}")
        parser = commandline.Parser(program, command.__doc__)
        command.add_flags(parser)
        args = parser.read(sys.argv[1:] if arguments is None else arguments)
        if args.help:
            parser.epilog = commandline.config_help(args.config) if "config" in args else None
            print(parser.format_help())
        elif status := command.main(args):
            sys.exit(status)


if __name__ == "__main__":
    main()
