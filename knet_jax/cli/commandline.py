"""What the commands share: flags, `--help`, and a user's mistake told in one clear line."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from knet_jax.config import schema
from knet_jax.config.files import list_configs, load_config, read_file
from knet_jax.segmentation.image_files import MAX_MEGAPIXELS
from knet_jax.system.errors import UserError, suggest
from knet_jax.system.processes import HEARTBEAT

SOME_SKIPPED = 3
"""Exit status where some files could not be used; they are named."""


class Parser(argparse.ArgumentParser):
    """The flags of a command, whose values are attributes of the `argparse.Namespace` that it reads.

    Args:
        program: how the command was called, which begins its messages.
        description: the text above the flags in `--help`.
    """

    def __init__(self, program: str, description: str):
        super().__init__(
            prog=program,
            description=description,
            add_help=False,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.reads_config = True
        """Whether `--config.x.y=value` arguments are taken, as the list `overrides`."""
        self._required: dict[str, str] = {}
        self.add_argument("-h", "--help", action="store_true", help="show this text")

    def flag(
        self, name: str, help: str, default: Any = None, required: bool = False, **how: Any
    ) -> None:
        """Adds a flag with a value, `how` as of `argparse.ArgumentParser.add_argument`."""
        if required:  # argparse's own would be asked for beside --help, too
            self._required[name] = help
        self.add_argument(f"--{name}", help=help, default=default, **how)

    def switch(self, name: str, help: str) -> None:
        """Adds a flag that is off unless given."""
        self.add_argument(f"--{name}", action="store_true", help=help)

    def config_flag(self, required: bool = False) -> None:
        """Adds `--config`."""
        text = "a config's name or file, and variants: coco_panoptic:r101,ms3x"
        self.flag("config", text, required=required)

    def checkpoint_flags(self) -> None:
        """Adds `--checkpoint` and `--ema`, which say what of a run is taken."""
        self.flag("checkpoint", "best, latest, or the number of a step", "best")
        self.switch("ema", "take the moving average of the parameters")

    def picture_flags(self) -> None:
        """Adds `--model`, `--output`, `--batch_size` and `--max_megapixels`, to segment pictures."""
        self.flag("model", "folder of a run, or file or folder of a conversion", required=True)
        self.flag("output", "folder where results go", "predictions")
        self.flag(
            "batch_size",
            "pictures at a time; default: 1 on a CPU, else 8",
            type=number(int, 1, 1024),
        )
        self.flag(
            "max_megapixels",
            "of a picture or of a frame; larger ones are left out",
            MAX_MEGAPIXELS,
            type=number(float, 0.01),
        )

    def process_flags(self) -> None:
        """Adds what joins several processes, see `knet_jax.system.processes`."""
        self.flag("coordinator", "several processes: HOST:PORT of the first one")
        self.flag("num_processes", "several processes: how many", type=number(int, 1))
        self.flag("process_id", "several processes: which one this is, from 0", type=number(int, 0))
        self.flag(
            "heartbeat",
            "several processes: seconds until one that is silent is taken for dead",
            HEARTBEAT,
            type=number(int, 1),
        )

    def read(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Reads a command line.

        Raises:
            UserError: an unknown flag, one that is missing, or a value that is not accepted.
        """
        overrides, rest = split_overrides(arguments) if self.reads_config else ([], arguments)
        args, unknown = self.parse_known_intermixed_args(rest)
        for argument in unknown:
            if argument.startswith("-"):
                name = argument.lstrip("-").partition("=")[0]
                keys = {f"config.{key}" for group in schema.KEY_GROUPS for key in group.keys}
                meant = [key for key in keys if key.endswith(f".{name}")]
                raise UserError(f"there is no flag --{name}; {suggest(name, meant or vars(args))}")
            raise UserError(f"{argument!r} belongs to no flag (--help lists the flags)")
        for name, value in vars(args).items():
            if value == "" != self.get_default(name) or (isinstance(value, list) and "" in value):
                raise UserError(f"{name} is empty; accepted: a value, or to leave it away")
        missing = [name for name in self._required if not (getattr(args, name) or args.help)]
        if missing:
            lines = (f"--{name} is missing: {self._required[name]}" for name in missing)
            raise UserError("; ".join(lines))
        args.overrides = overrides
        return args

    def error(self, message: str) -> NoReturn:
        """Raises what argparse finds wrong as a UserError."""
        raise UserError(f"{message} (--help lists the flags)")


def number(kind: type, least: float = -math.inf, most: float = math.inf) -> Callable[[str], Any]:
    """A type of flags: an `int` or a `float` within bounds, and never nan."""

    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not least <= value <= most:
            what = "a whole number" if kind is int else "a number"
            what += "" if math.isinf(least) else f" from {least:g}"
            what += "" if math.isinf(most) else f" to {most:g}"
            raise argparse.ArgumentTypeError(f"{text} is not accepted; accepted: {what}")
        return value

    return read


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separates `--config.x=1`, `--config.x 1` and `--noconfig.x` from everything else."""
    overrides, rest = [], []
    arguments = list(arguments)
    while arguments:
        argument = arguments.pop(0)
        if not re.match(r"--?(no)?config\.", argument):
            rest.append(argument)
            continue
        overrides.append(argument)
        valued = "=" in argument or argument.lstrip("-").startswith("no")
        if not valued and arguments and not arguments[0].startswith("--"):
            overrides.append(arguments.pop(0))
    return overrides, rest


def config_help(spec: str | None) -> str:
    """The keys of a config with their values, or the configs that there are, for `--help`.

    Raises:
        UserError: there is no such config.
    """
    if spec:
        keys = schema.describe(schema.flatten(load_config(spec)))
        return f"Keys of {spec}, their values, what they mean and what is accepted:\n{keys}"
    lines = ["Configs, with variants that can be combined (--config=coco_panoptic:r101,ms3x):"]
    for name, path in list_configs().items():
        file = read_file(path)
        lines.append(f"  {name}: {(file.__doc__ or 'undocumented').splitlines()[0]}")
        lines.append(f"    variants: {', '.join(file.VARIANTS) or 'none'}")
    lines.append("Every key is a flag, as --config.optim.lr=2e-4; after --config=...,")
    lines.append("--help lists the keys of that config.")
    return "\n".join(lines)
