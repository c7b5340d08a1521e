"""Configs: read from a file, changed by variants and the command line, kept with the run.

A config file has `get_config()`, which returns a `ConfigDict`, and `VARIANTS`, a dict from a name to
the keys that it changes: {"r101": {"model.backbone.depths": (3, 4, 23, 3)}}. A dict takes the place
of all keys below one: {"swin": {"model.backbone": {"name": "swin", …}}}. What a file leaves out has
the default of `schema`. The config files of the package are found by name, others by path:

    --config=coco_panoptic:r101,ms3x --config.optim.lr=2e-4
    --config=my_configs/cells.py

A file builds on one of the package by `base`:

    from knet_jax.config.files import base

    def get_config():
        config = base("coco_panoptic").get_config()
        config.data.root = "data/cells"
        return config
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import re
import runpy
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from flax.traverse_util import unflatten_dict
from ml_collections import ConfigDict

from knet_jax.config import schema
from knet_jax.config.schema import flatten, to_tuples
from knet_jax.system.errors import UserError, naming_file, suggest
from knet_jax.system.output_files import write_whole

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

PACKAGE = Path(__file__).parents[1]
SHIPPED = next(path for path in (PACKAGE / "configs", PACKAGE.parent / "configs") if path.is_dir())
"""The folder of the package's config files: inside it where it is installed, beside it in a checkout."""


# Config files.


def list_configs() -> dict[str, Path]:
    """The config files that are found by name, those of ./configs before those of the package."""
    files = [*SHIPPED.glob("*.py"), *Path("configs").glob("*.py")]
    return {path.stem: path for path in sorted(files, key=lambda path: path.stem)}


def parse_spec(spec: str) -> tuple[str, list[str]]:
    """Splits `coco_panoptic:r101,ms3x` into the name or path and the names of the variants."""
    path, _, variants = spec.partition(":")
    return path, [name for name in variants.split(",") if name]


def default_workdir(spec: str) -> Path:
    """Where a run of a config lives: runs/coco_panoptic_r101 for `coco_panoptic:r101`."""
    path, variants = parse_spec(spec)
    return Path("runs") / "_".join([Path(path).stem, *variants])


def read_file(path: Path) -> SimpleNamespace:
    """What a config file defines: `get_config`, `VARIANTS`, and names of its own.

    Raises:
        UserError: the file has no `get_config`, or is no Python that runs.
    """
    with naming_file(path):
        names = runpy.run_path(str(path))
        if "get_config" not in names:
            raise UserError("there is no function get_config()")
        return SimpleNamespace(**{"VARIANTS": {}} | names)


def base(name: str) -> SimpleNamespace:
    """What a config file of the package defines, for another file to build on.

    Args:
        name: of the file without its suffix, such as "coco_panoptic".

    Raises:
        UserError: there is no such file.
    """
    path = SHIPPED / f"{name}.py"
    if not path.is_file():
        known = [path.stem for path in SHIPPED.glob("*.py")]
        raise UserError(f"there is no config {name!r}; {suggest(name, known)}")
    return read_file(path)


def load_config(spec: str, overrides: Sequence[str] | Mapping[str, Any] = ()) -> ConfigDict:
    """Reads a config, applies its variants from left to right, then the overrides.

    Args:
        spec: the path of a config file, or the name of one in ./configs or in the package, and
            variants: `coco_panoptic`, `coco_panoptic:r101,ms3x`, `my_configs/cells.py:small`.
        overrides: values by key, {"optim.lr": 2e-4}, or arguments, ["--config.optim.lr=2e-4"].

    Returns:
        All keys of the config, locked: a value can be changed, but no key added.

    Raises:
        UserError: no such file, variant or key, or a value of another type than the key's.
    """
    name, variants = parse_spec(spec)
    known = list_configs()
    path = Path(name) if Path(name).is_file() else known.get(name)
    if path is None:
        raise UserError(
            f"--config={spec}: there is no file {name}; {suggest(name, known)} (or the path of a file)"
        )
    with naming_file(path):  # whatever its code does
        file = read_file(path)
        values = flatten(file.get_config())
        schema.check_names(values, schema.find_keys(values))
        for variant in variants:
            if variant not in file.VARIANTS:
                raise UserError(
                    f"there is no variant {variant!r}; {suggest(variant, file.VARIANTS)}"
                )
            for key, value in file.VARIANTS[variant].items():
                if isinstance(value, Mapping):  # takes the place of all keys below this one
                    values = {k: v for k, v in values.items() if not k.startswith(f"{key}.")}
                values |= flatten({key: value})
            with naming_file(f"variant {variant!r}"):
                schema.check_names(values, schema.find_keys(values))
    return apply_overrides(values, overrides)


def apply_overrides(
    config: Mapping[str, Any] | ConfigDict, overrides: Sequence[str] | Mapping[str, Any] = ()
) -> ConfigDict:
    """Makes a config of all keys: those given, with overrides, and the defaults of the others.

    Args:
        config: nested, or flat: {"optim.lr": 1.0}.
        overrides: as of `load_config`.

    Raises:
        UserError: a key does not exist, or a value is of another type than the key's.
    """
    given = overrides if isinstance(overrides, Mapping) else parse_arguments(overrides)
    values = flatten(config)
    for key in schema.CHOICES:  # other keys depend on them
        if key in given:
            values[key] = _convert(key, given[key], "")
    keys = schema.find_keys(values)
    schema.check_names([*values, *given], keys)
    likes = schema.with_defaults(values, keys) | schema.with_defaults({}, keys)
    values |= {key: _convert(key, value, likes.get(key)) for key, value in given.items()}
    return ConfigDict(unflatten_dict(schema.with_defaults(values, keys), sep=".")).lock()


def parse_arguments(arguments: Sequence[str]) -> dict[str, str]:
    """Reads `--config.x.y=value`, `--config.x.y value`, `--config.flag` and `--noconfig.flag`.

    Returns:
        The text of each value by its key; of a key that comes twice the last one.

    Raises:
        UserError: an argument is of another form.
    """
    values, key = {}, None
    for argument in arguments:
        match = re.fullmatch(r"--?(no)?config\.([^=]+)(?:=(.*))?", argument, re.DOTALL)
        if match:
            no, key, text = match.groups()
            values[key] = text if text is not None else "False" if no else "True"
            key = None if no or text is not None else key
        elif key:
            values[key], key = argument, None
        else:
            raise UserError(f"{argument!r} belongs to no flag; write --config.x.y=value")
    return values


def _convert(key: str, value: Any, like: Any) -> Any:
    """A value, or the text of one, as of the type of another value of the key, None if unknown."""
    if isinstance(like, str):
        value = os.fspath(value) if isinstance(value, os.PathLike) else value
    elif isinstance(value, str):
        with contextlib.suppress(Exception):  # what is no literal is judged below
            value = ast.literal_eval({"true": "True", "false": "False"}.get(value, value))
    if value is None:
        return value
    if isinstance(like, tuple):
        value = to_tuples(value) if isinstance(value, list | tuple) else (value,)
    if isinstance(like, float) and type(value) is int and abs(value) < 1e300:
        value = float(value)
    if like is not None and type(value) is not type(like):
        raise UserError(f"--config.{key}={value}: accepted: a value like {like!r}")
    return value


# The config of a run, on disk.


def save_config(config: ConfigDict, workdir: str | Path) -> None:
    """Writes `config.json` into the workdir, whole or not at all."""
    content = json.dumps(config.to_dict(), indent=2) + "\n"
    write_whole(Path(workdir) / SAVED_NAME, content.encode())


def load_saved_config(
    workdir: str | Path, overrides: Sequence[str] | Mapping[str, Any] = ()
) -> ConfigDict:
    """Reads the config that a run was started with, and changes it by overrides.

    Keys that have come since the run was started get their defaults.

    Raises:
        UserError: no run in the workdir, a file that is no JSON, or overrides that do not fit.
    """
    path = Path(workdir) / SAVED_NAME
    if not path.is_file():
        raise UserError(
            f"{workdir} is no model: no run has been started here, there is no {SAVED_NAME}"
        )
    with naming_file(path):
        config = complete_saved(json.loads(path.read_bytes()))
    return apply_overrides(config, overrides)


def complete_saved(content: Any) -> ConfigDict:
    """Makes a config of what JSON gives back of one, with the defaults of keys that have come since.

    Raises:
        UserError: it was none: a section or a key is missing, or there is one that does not exist.
    """
    sections = {key.partition(".")[0] for key in schema.EVERY if "." in key}
    if missing := sections.difference(content):
        raise UserError(f"config.{min(missing)} is missing")
    return apply_overrides(content)


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
    old = flatten(load_saved_config(workdir))
    new = flatten(config)
    fine, fatal = [], []
    for key in sorted(old.keys() | new.keys()):
        was, now = old.get(key, "absent"), new.get(key, "absent")
        if was != now:
            resumable = any(re.fullmatch(pattern, key) for pattern in RESUMABLE)
            (fine if resumable else fatal).append(f"config.{key} was {was!r}, now {now!r}")
    if fatal:
        raise UserError(
            f"the run in {workdir} cannot be resumed with another config: {'; '.join(fatal)}; "
            "choose the old values, or another --workdir, in which "
            f"--config.init_weights={workdir} starts from its weights"
        )
    return fine
