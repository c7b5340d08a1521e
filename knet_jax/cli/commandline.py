"""What the entry points share: flags, `--help`, and a user's mistake told in one clear line."""

from __future__ import annotations

import errno
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from absl import flags

from knet_jax.config import schema
from knet_jax.config.files import list_configs, load_config, read_file
from knet_jax.system.errors import UserError, one_line
from knet_jax.system.library_logs import hide_closed_loops
from knet_jax.system.signals import Preempted

# What a user can do something about; other system errors are bugs.
DISK_ERRORS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENOTEMPTY,
    errno.EBUSY,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.EFBIG,
    errno.EIO,
)


class CommandLine(NamedTuple):
    """What is left of the command line once the absl flags have their values."""

    overrides: list[str]
    """The `--config.x.y=value` arguments."""
    paths: list[str]
    """Arguments that are no flags."""


def run(
    main: Callable[[CommandLine], None],
    argv: Sequence[str] | None = None,
    *,
    takes_paths: bool = False,
) -> None:
    """Parses the absl flags, runs `main`, and exits with a status.

    Mistakes of the user end in one line on stderr and status 2, an unusable disk in status 1,
    Ctrl-C in 130 and SIGTERM in 143. Other exceptions are bugs and keep their traceback.
    """
    argv = list(sys.argv if argv is None else argv)
    program = Path(argv[0]).name
    hide_closed_loops()
    try:
        overrides, rest = _split_overrides(argv[1:])
        questions = [argument for argument in rest if argument in ("--help", "-help", "-h")]
        rest = [argument for argument in rest if argument not in questions]
        try:
            paths = flags.FLAGS([argv[0], *rest])[1:]
        except flags.Error as error:
            raise UserError(f"{one_line(error)} (--help lists the flags)") from error
        for name, value in flags.FLAGS.flag_values_dict().items():
            # The bounds of a flag let nan through.
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"--{name} is {value}; accepted: a number (--help lists the flags)")
        if questions:
            print(usage())
            return
        if paths and not takes_paths:
            raise UserError(f"{paths[0]!r} belongs to no flag (--help lists the flags)")
        main(CommandLine(overrides, paths))
    except KeyboardInterrupt:
        _exit(program, "interrupted", 130)
    except Preempted as error:
        _exit(program, one_line(error), 128 + error.signum)
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        where = "" if error.filename is None else f": {error.filename}"
        _exit(program, f"{error.strerror}{where}", 1)
    except UserError as error:
        _exit(program, one_line(error), 2)


def _exit(program: str, message: str, status: int) -> None:
    print(f"{program}: {message}", file=sys.stderr, flush=True)
    sys.exit(status)


def _split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
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


def usage() -> str:
    """The text of `--help`: the script, its flags, and the configs or the keys of the one given.

    Raises:
      UserError: there is no config as the command line names.
    """
    script = sys.modules["__main__"]
    parts = [(script.__doc__ or "").strip()]
    parts.append(flags.FLAGS.module_help(script).strip().replace("__main__:", "Flags:"))
    if "config" in flags.FLAGS:
        parts.append(_config_help())
    return "\n\n".join(part for part in parts if part)


def _config_help() -> str:
    if flags.FLAGS["config"].present:
        spec = flags.FLAGS.config
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
