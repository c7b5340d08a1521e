"""What a checkpoint says of its arrays: their shapes and types, and digests that prove them.

The record is JSON: `step`, `progress`, `model` (the config of the network), `arrays` (path -> shape,
dtype, digest of the bytes), and `digest`, which is that of all the rest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from knet_jax.config.schema import complete_model, flatten
from knet_jax.system.errors import UserError


class DamagedError(UserError):
    """The checkpoint on disk is not what was saved."""


def leaf_paths(tree: Any) -> list[str]:
    """The path of every leaf of a pytree, joined by '/', in the order of `jax.tree.leaves`."""
    leaves, _ = jax.tree.flatten_with_path(tree)
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]


def make_record(arrays: Mapping[str, np.ndarray], **fields: Any) -> dict[str, Any]:
    """Makes the record of arrays by their paths, with further entries of what JSON can hold."""
    record = fields | {"arrays": {path: _describe(array) for path, array in arrays.items()}}
    return record | {"digest": _digest_of_record(record)}


def check_record(record: Any, step: int) -> None:
    """Raises DamagedError if a record, which may be any JSON, is not one that was made at a step."""
    if not isinstance(record, Mapping) or record.get("digest") != _digest_of_record(record):
        raise DamagedError("its record is not what was saved")
    if record["step"] != step:
        raise DamagedError(f"it is a copy of step {record['step']!r:.20}")


def check_arrays(arrays: Mapping[str, np.ndarray], record: Mapping[str, Any]) -> None:
    """Raises DamagedError with the path of the first array that is not what was saved."""
    for path, array in arrays.items():
        if _describe(array) != record["arrays"][path]:
            raise DamagedError(f"{path} is not what was saved")


def check_fit(
    wanted: Mapping[str, Any], record: Mapping[str, Any], model: Mapping[str, Any]
) -> None:
    """Compares saved arrays with those of a network.

    Args:
        wanted: the arrays of the network, or their shapes, by path: all of the saved state, or whole
            parts of it (such as all paths that begin with `params/`).
        record: that of the checkpoint.
        model: `config.model` of the network, for the message.

    Raises:
        UserError: a path, shape or dtype differs. The message also has the keys of
            `config.model` that differ.
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
        differences = [
            f"; config.model.{key} is {old!r} in it, {new!r} here"
            for key, (old, new) in model_differences(record, model).items()
        ]
        raise UserError(f"{path} {problems[path]}{''.join(differences)}")


def model_differences(
    record: Mapping[str, Any], model: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """The keys of `config.model` in which a network is not the saved one.

    Returns:
        Both values of every such key, the saved one first; None stands for an absent one.
    """
    if not record["model"]:
        return {}  # a checkpoint that was saved without its config
    # A key that the saved config lacks has come since, with a default that is what there was before.
    saved, here = (flatten(complete_model(config)) for config in (record["model"], model))
    keys = sorted(saved.keys() | here.keys())
    return {key: (saved.get(key), here.get(key)) for key in keys if saved.get(key) != here.get(key)}


def _describe(array: np.ndarray) -> dict[str, Any]:
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return {"shape": [*array.shape], "dtype": str(array.dtype), "digest": _digest(data)}


def _digest_of_record(record: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in record.items() if key != "digest"}
    return _digest(json.dumps(rest, sort_keys=True).encode())


def _digest(data: bytes | np.ndarray) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
