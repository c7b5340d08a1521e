"""Configs: read from a file, changed by variants and the command line, kept with the run.

A config file has `get_config()`, which returns a `ConfigDict`, and `VARIANTS`, a dict from a name to
the keys that it changes: {"r101": {"model.backbone.depths": (3, 4, 23, 3)}}. A dict takes the place of
all keys below one: {"swin": {"model.backbone": {"name": "swin", …}}}. On the command line:

    --config=configs/coco_panoptic.py:r101,ms3x --config.optim.lr=2e-4
"""

from __future__ import annotations

import json
import re
import runpy
from collections.abc import Mapping, Sequence
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

from absl import flags
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict, config_flags

from knet_jax.system.errors import UserError, one_line, suggest

SAVED_NAME = "config.json"
CONVERSION_NAME = "conversion.json"
"""Beside it where the weights come from elsewhere, and there has been no run."""

# A resumed run must be the run that was stopped. These keys may differ all the same: where things
# lie, how they are shown, how long and how fast to go on.
RESUMABLE = (
    r"init_weights",
    r"data\.(root|data_dir|num_workers|max_broken_share|val_split|num_val)",
    r"optim\.(?!groups).*",
    r"train\.(?!batch_size|ema_decay).*",
    r"eval\..*",
)


# From text to a config.


def parse_spec(spec: str) -> tuple[Path, list[str]]:
    """`configs/x.py:a,b` -> the path and the names of the variants."""
    path, _, variants = spec.partition(":")
    return Path(path), [name for name in variants.split(",") if name]


def default_workdir(spec: str) -> Path:
    """`configs/coco_panoptic.py:r101` -> `runs/coco_panoptic_r101`."""
    path, variants = parse_spec(spec)
    return Path("runs") / "_".join([path.stem, *variants])


def load_config(spec: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """Reads a config file, applies its variants from left to right, then the overrides.

    Raises:
      UserError: no such file, variant or key, or a value of another type than the key's.
    """
    path, names = parse_spec(spec)
    if not path.is_file():
        known = ", ".join(map(str, sorted(Path("configs").glob("*.py")))) or (
            "the whole path, or one in configs/ of the repository's root, which is not here"
        )
        raise UserError(f"--config={spec}: there is no file {path}; accepted: {known}")
    try:
        module = runpy.run_path(str(path))
    except (SyntaxError, UnicodeDecodeError) as error:
        raise UserError(f"--config={spec}: {path} is no Python: {one_line(error)}") from error
    if "get_config" not in module:
        raise UserError(f"--config={spec}: {path} has no function get_config()")
    config = module["get_config"]()
    variants = module.get("VARIANTS", {})
    for name in names:
        if name not in variants:
            raise UserError(
                f"--config={spec}: there is no variant {name!r}; {suggest(name, variants)}"
            )
        for key, value in variants[name].items():
            known = flatten_dict(config.to_dict(), sep=".")
            parent, _, last = key.rpartition(".")
            if isinstance(value, Mapping) and any(k.startswith(f"{key}.") for k in known):
                reduce(getitem, parent.split(".") if parent else [], config)[last] = ConfigDict(
                    value
                )
                continue
            _check_key(key, known, f"variant {name!r} of {path}")
            config.update_from_flattened_dict({key: value})
    return apply_overrides(config, overrides)


def apply_overrides(config: ConfigDict, overrides: Sequence[str]) -> ConfigDict:
    """Sets keys of a config from `--config.x.y=value` arguments, in place.

    Raises:
      UserError: no such key, or a value of another type.
    """
    known = flatten_dict(config.to_dict(), sep=".")
    for argument in overrides:
        if match := re.match(r"--?(?:no)?config\.([^=]+)", argument):
            _check_key(match[1], known, argument)
    values = flags.FlagValues()
    argv = ["", *overrides]
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
        rest = values(argv)[1:]
    except (flags.Error, TypeError, ValueError) as error:
        text = one_line(error)
        if match := re.search(r"--config\.([\w.]+)=", text):
            text += f"; accepted: a value like {known[match[1]]!r}"
        raise UserError(text) from error
    if rest:
        raise UserError(f"{rest[0]!r} belongs to no flag; write --config.x.y=value")
    return config


def _check_key(key: str, known: Mapping[str, Any], where: str) -> None:
    if key not in known:
        raise UserError(f"{where}: there is no key config.{key}; {suggest(key, known)}")


# The config of a run, on disk.


def save_config(config: ConfigDict, workdir: str | Path) -> None:
    """Writes `config.json` into the workdir, whole or not at all."""
    path = Path(workdir) / SAVED_NAME
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(config.to_dict(), indent=2) + "\n")
    draft.replace(path)


def load_saved_config(workdir: str | Path, overrides: Sequence[str] = ()) -> ConfigDict:
    """The config that a run was started with, and overrides.

    Raises:
      UserError: no run in the workdir, a file that is no JSON, or overrides that do not fit.
    """
    path = Path(workdir) / SAVED_NAME
    if not path.is_file():
        raise UserError(
            f"{workdir} is no model: no run has been started here, there is no {SAVED_NAME}"
        )
    try:
        config = ConfigDict(to_tuples(json.loads(path.read_text())))
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is broken: {error}") from error
    return apply_overrides(config, overrides)


def to_tuples(value: Any) -> Any:
    """Lists in a nest of dicts become tuples: JSON has the ones only, a config the others."""
    if isinstance(value, Mapping):
        return {key: to_tuples(item) for key, item in value.items()}
    return tuple(map(to_tuples, value)) if isinstance(value, list) else value


def check_resume(config: ConfigDict, workdir: str | Path) -> list[str]:
    """Compares a config with that of the run in the workdir.

    Returns:
      One sentence for every difference that a resumed run can live with.

    Raises:
      UserError: a difference that would make it another run, all of them named; or a folder in
        which no run can go on, because there was none.
    """
    if (Path(workdir) / CONVERSION_NAME).exists():
        raise UserError(
            f"--workdir={workdir} holds a converted model and no run; start from it by "
            f"--config.init_weights={workdir} in another --workdir"
        )
    old = flatten_dict(load_saved_config(workdir).to_dict(), sep=".")
    new = flatten_dict(to_tuples(config.to_dict()), sep=".")
    fine, fatal = [], []
    for key in sorted(old.keys() | new.keys()):
        was, now = old.get(key, "absent"), new.get(key, "absent")
        if was != now:
            resumable = any(re.fullmatch(pattern, key) for pattern in RESUMABLE)
            (fine if resumable else fatal).append(f"config.{key} was {was!r}, now {now!r}")
    if fatal:
        raise UserError(
            f"the run in {workdir} cannot be resumed with another config: {'; '.join(fatal)}; "
            "choose another --workdir or the old values"
        )
    return fine
