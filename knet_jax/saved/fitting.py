"""Which weights of a file a network takes over, and which of its own stay as initialized."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from knet_jax.model import init_variables, make_model, variable_shapes
from knet_jax.saved.parameter_names import (
    CLASSES,
    Fit,
    Variables,
    fit,
    from_reference,
    to_reference,
)
from knet_jax.saved.weight_files import NETWORK, NEW, WeightFile, read_weights
from knet_jax.system.errors import UserError, naming_file


def fit_network(
    weights: WeightFile,
    template: Variables,
    config: ConfigDict,
    new_classes: bool = False,
    partial: bool = False,
) -> Fit:
    """Finds the place of every tensor, and decides whether what has none is acceptable.

    The auxiliary head, which only training needs, may be missing or left over; so may all but the
    backbone if the file is of an ImageNet model.

    Args:
        weights: the content of the file.
        template: shapes of the network's variables.
        config: that of the network.
        new_classes: whether what belongs to the classes stays as initialized.
        partial: whether anything may stay as initialized, and be left over.

    Raises:
        UserError: anything else is missing, left over or of another shape.
    """
    tensors = weights.tensors
    if new_classes:
        tensors = {name: x for name, x in tensors.items() if not CLASSES.fullmatch(name)}
    found = fit(tensors, template)
    if not found.used:
        raise UserError("nothing of it belongs to this network; is it that of the config?")
    if partial:
        return found

    for name, (given, needed) in found.misfits.items():
        if CLASSES.fullmatch(name) and given[1:] == needed[1:]:
            raise UserError(
                f"it has {given[0]} classes, but config.model.num_things="
                f"{config.model.num_things} and num_stuff={config.model.num_stuff}; give its own, "
                "or keep what does not belong to them by knet convert --new_classes"
            )
    is_classifier = not any(name.startswith(NETWORK[1:]) for name in weights.tensors)

    def is_optional(name: str) -> bool:
        of_backbone = name.startswith("backbone.")
        return name.startswith("auxiliary_head.") or (is_classifier and not of_backbone)

    def may_be_missing(name: str) -> bool:
        is_class = new_classes and CLASSES.fullmatch(name)
        is_new = is_classifier and NEW.fullmatch(name)
        return bool(is_class or is_new or is_optional(name))

    strict = found._replace(
        missing={name: path for name, path in found.missing.items() if not may_be_missing(name)},
        left=tuple(name for name in found.left if not is_optional(name)),
    )
    try:
        strict.check(weights.original)
    except UserError as error:
        raise UserError(f"{error}; knet convert --partial keeps what fits") from error
    return found


def fill_missing(found: Fit, template: Variables, config: ConfigDict) -> Variables:
    """Adds to what `fit_network` found, where it lacks something, what a new network has there."""
    flat = flatten_dict(template, sep="/")
    arrays = found.arrays
    if arrays.keys() != flat.keys():
        print("initializing the rest, which can take a minute", file=sys.stderr, flush=True)
        fresh = init_variables(make_model(**config.model), config.seed)
        arrays = flatten_dict(fresh, sep="/") | arrays
    return unflatten_dict(
        {key: np.asarray(arrays[key], leaf.dtype) for key, leaf in flat.items()}, sep="/"
    )


def check_backbone(path: str | Path, model: Mapping[str, Any]) -> None:
    """Compares the backbone in a file with that of a config, by names and shapes alone.

    Args:
        path: a file that `read_weights` reads.
        model: `config.model`, in which numbers of classes and norms may be None.

    Raises:
        UserError: it is another backbone; the message has the flags that fit it.
    """
    stated = {key: 1 if value is None else value for key, value in model.items()}
    for part in ("backbone", "neck"):
        stated[part] = {key: value for key, value in model[part].items() if value is not None}
    shapes = variable_shapes(make_model(**stated))["params"]["backbone"]
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    needed = _describe_backbone(to_reference({"params": {"backbone": zeros}}))
    with naming_file(f"config.init_weights: {path}"):
        given = _describe_backbone(read_weights(path).tensors)
        others = [f"{key}={value}" for key, value in given.items() if value != needed.get(key)]
        if others:
            flags = " ".join(f'"--config.model.backbone.{flag}"' for flag in others)
            raise UserError(f"it holds another backbone than the config has; {flags} would fit")


def _describe_backbone(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The keys of `config.model.backbone` that the names and shapes of tensors show."""
    patches = tensors.get("backbone.patch_embed.projection.weight")
    blocks = re.findall(r"backbone\.blocks\.(\d+)\.", " ".join(tensors))
    if patches is not None and blocks:
        return {
            "name": "vit",
            "channels": len(patches),
            "depth": 1 + max(map(int, blocks)),
            "patch": patches.shape[-1],
            "registers": tensors.get("backbone.register_tokens", patches[:, :0]).shape[1],
            "positions": "learned" if "backbone.pos_embed" in tensors else "rotary",
        }
    blocks = re.findall(
        r"backbone\.(?:layer|stages\.)(\d)\.(?:blocks\.)?(\d+)\.", " ".join(tensors)
    )
    if not blocks:
        raise UserError("it holds no backbone that is known here")
    stages = sorted({stage for stage, _ in blocks})
    depths = tuple(1 + max(int(block) for s, block in blocks if s == stage) for stage in stages)
    for name, first in {
        "swin": "patch_embed.projection",
        "convnext": "downsample_layers.0.0",
    }.items():
        if (patches := tensors.get(f"backbone.{first}.weight")) is not None:
            return {"name": name, "depths": depths, "channels": len(patches)}
    return {"name": "resnet", "depths": depths, "deep_stem": "backbone.stem.0.weight" in tensors}


def load_backbone(path: str | Path, variables: Variables) -> Variables:
    """Reads a backbone from a file, be it of an ImageNet model or of a whole network.

    What no classifier has (`NEW`) stays as initialized if the file lacks it.

    Args:
        path: a file that `read_weights` reads.
        variables: those of the network, as initialized.

    Returns:
        The variables, with the backbone of the file.

    Raises:
        UserError: the file cannot be read, or something does not fit; the message names the file.
    """
    # A backbone without running statistics has parameters only.
    template = {
        kind: {"backbone": tree["backbone"]}
        for kind, tree in variables.items()
        if "backbone" in tree
    }
    new = {name: x for name, x in to_reference(template).items() if NEW.fullmatch(name)}
    try:
        weights = read_weights(path)
        tensors = {k: x for k, x in weights.tensors.items() if k.startswith("backbone.")}
        loaded = from_reference(new | tensors, template, weights.original)
    except UserError as error:
        message = str(error).replace("backbone.", "")  # an ImageNet model has no such prefix
        raise UserError(f"config.init_weights: {path}: {message}") from error
    loaded = jax.tree.map(lambda new, old: jnp.asarray(new, old.dtype), loaded, template)
    return {kind: tree | loaded.get(kind, {}) for kind, tree in variables.items()}
