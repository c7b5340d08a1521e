"""What a checkpoint holds: arrays under their paths, and a record that describes and proves them.

The record is JSON: `step`, `progress`, `model` (the config of the network), `code` (a digest of what
made the network), `arrays` (path -> shape, dtype, digest of the bytes), and `digest` of all this.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from knet_jax.system.errors import UserError

DIGEST_SIZE = 16


class CheckpointError(UserError):
    """A checkpoint cannot be written, read, or put into this network."""


class DamagedError(CheckpointError):
    """What is on disk is not what was saved."""


def copy_to_host(state: Any) -> dict[str, np.ndarray]:
    """Arrays of a pytree under their paths, sharing no memory with what the next step overwrites."""
    leaves = jax.tree.leaves(state)
    for leaf in leaves:  # all copies are under way before the first is waited for
        if isinstance(leaf, jax.Array):
            leaf.copy_to_host_async()
    return {
        path: np.array(leaf, copy=True, order="C") for path, leaf in zip(leaf_paths(state), leaves)
    }


def make_record(arrays: Mapping[str, np.ndarray], **fields: Any) -> dict[str, Any]:
    """The record of arrays; `fields` are what JSON holds."""
    record = fields | {"arrays": {path: _describe(array) for path, array in arrays.items()}}
    return record | {"digest": _digest_of_record(record)}


def check_record(record: Any) -> None:
    """Raises `DamagedError` where a record, any JSON, is not what `make_record` made."""
    if not isinstance(record, Mapping) or record.get("digest") != _digest_of_record(record):
        raise DamagedError("its record is not what was saved")


def check_arrays(arrays: Mapping[str, np.ndarray], record: Mapping[str, Any]) -> None:
    """Raises `DamagedError` with the path of the first array that is not what was saved."""
    for path, array in arrays.items():
        if _describe(array) != record["arrays"][path]:
            raise DamagedError(f"{path} is not what was saved")


def check_fit(
    wanted: Mapping[str, Any], record: Mapping[str, Any], model: Mapping[str, Any]
) -> None:
    """Compares saved arrays with those of a network.

    Args:
      wanted: path -> array or shape; whole parts of the saved state (`params`) or all of it.
      record: of the checkpoint.
      model: `config.model` of the network that is to hold the arrays.

    Raises:
      CheckpointError: a path, shape or dtype differs; with the keys of `config.model` that do.
    """
    saved = record["arrays"]
    problems = {}
    for path, leaf in wanted.items():
        if path not in saved:
            problems[path] = "is not in it"
        elif [*leaf.shape] != saved[path]["shape"]:
            problems[path] = f"is {tuple(saved[path]['shape'])} in it, {tuple(leaf.shape)} here"
        elif str(leaf.dtype) != saved[path]["dtype"]:
            problems[path] = f"is {saved[path]['dtype']} in it, {leaf.dtype} here"
    parts = {path.split("/")[0] for path in wanted}
    for path in saved.keys() - wanted.keys():
        if path.split("/")[0] in parts:
            problems[path] = "is in it, not here"
    if problems:
        # The optimizer's state has the parameter's path within a longer one.
        path = min(problems, key=lambda path: (len(path), path))
        raise CheckpointError(
            f"{path} {problems[path]}{_explain_difference(record['model'], model)}"
        )


@functools.cache
def network_code() -> str:
    """A digest of the files that say which arrays the network of a config has."""
    package = Path(__file__).parents[1]
    files = [package / "knet.py", package / "kernels.py", *sorted((package / "nn").glob("*.py"))]
    code = b"".join(file.read_bytes() for file in files)
    return hashlib.blake2b(code, digest_size=DIGEST_SIZE).hexdigest()


def saved_shapes(record: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, Any] | None:
    """Shapes of the saved arrays, a dict of dicts, if a network has just these by construction.

    Args:
      record: of the checkpoint.
      model: `config.model` of the network.

    Returns:
      None where other code or another config made the network that was saved.
    """
    changed = _differences(record["model"], model).keys() - {"dtype"}
    if changed or record.get("code") != network_code():
        return None
    return unflatten_dict(
        {
            path: jax.ShapeDtypeStruct(tuple(saved["shape"]), saved["dtype"])
            for path, saved in record["arrays"].items()
        },
        sep="/",
    )


def _differences(saved: Mapping[str, Any], here: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The keys of `config.model` that are not the same, with both values."""
    old, new = (flatten_dict(json.loads(json.dumps(model)), sep=".") for model in (saved, here))
    keys = sorted(old.keys() | new.keys())
    return {key: (old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)}


def _explain_difference(saved: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    parts = [
        f"config.model.{key} is {old!r} in it, {new!r} here"
        for key, (old, new) in _differences(saved, here).items()
    ]
    return "; ".join(["", *parts])


def _describe(array: np.ndarray) -> dict[str, Any]:
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    digest = hashlib.blake2b(data, digest_size=DIGEST_SIZE).hexdigest()
    return {"shape": [*array.shape], "dtype": str(array.dtype), "digest": digest}


def _digest_of_record(record: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in record.items() if key != "digest"}
    text = json.dumps(rest, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=DIGEST_SIZE).hexdigest()


def leaf_paths(tree: Any) -> list[str]:
    """Path of every leaf, joined by '/', in the order of `jax.tree.leaves`."""
    leaves, _ = jax.tree.flatten_with_path(tree)
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
