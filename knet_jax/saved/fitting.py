"""What a network takes over from a file of weights, and what starts anew in it."""

from __future__ import annotations

import sys

import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict

from knet_jax.model import init_variables, make_model
from knet_jax.saved.parameter_names import CLASSES, Fit, Variables, fit
from knet_jax.saved.weight_files import NETWORK, NEW, WeightFile
from knet_jax.system.errors import UserError


def fit_network(
    weights: WeightFile,
    template: Variables,
    config: ConfigDict,
    new_classes: bool = False,
    partial: bool = False,
) -> Fit:
    """Finds the places of all tensors, and judges what has none.

    The auxiliary head, which only training needs, may be missing or left over; so may all but the
    backbone where the file is of an ImageNet model.

    Args:
      weights: of the file.
      template: shapes of the network's variables.
      config: of the network.
      new_classes: whether what belongs to the classes starts anew.
      partial: whether anything may start anew, and be left over.

    Raises:
      ValueError: anything else is missing, left over or of another shape.
    """
    tensors = weights.tensors
    if new_classes:
        tensors = {name: x for name, x in tensors.items() if not CLASSES.fullmatch(name)}
    found = fit(tensors, template)
    if not found.used:
        raise UserError("nothing of it belongs to this network; is it that of the config?")
    infinite = [key for key, array in found.arrays.items() if not np.isfinite(array).all()]
    if infinite:
        raise UserError(f"its numbers for {infinite[0]} are not all finite")
    if partial:
        return found

    for name, (given, needed) in found.misfits.items():
        if CLASSES.fullmatch(name) and given[1:] == needed[1:]:
            raise UserError(
                f"it has {given[0]} classes, but config.model.num_things="
                f"{config.model.num_things} and num_stuff={config.model.num_stuff}; give its own, "
                "or keep what does not belong to them by python -m knet_jax.convert --new_classes"
            )
    # An ImageNet model has a backbone only, and lacks some of that.
    is_classifier = not any(name.startswith(NETWORK[1:]) for name in weights.tensors)

    def is_optional(name: str) -> bool:
        of_backbone = name.startswith("backbone.")
        return name.startswith("auxiliary_head.") or (is_classifier and not of_backbone)

    def may_start_anew(name: str) -> bool:
        expected = (new_classes and CLASSES.fullmatch(name)) or (
            is_classifier and NEW.fullmatch(name)
        )
        return bool(expected) or is_optional(name)

    strict = found._replace(
        missing={name: path for name, path in found.missing.items() if not may_start_anew(name)},
        left=tuple(name for name in found.left if not is_optional(name)),
    )
    try:
        strict.check(weights.original)
    except ValueError as error:
        raise UserError(f"{error}; python -m knet_jax.convert --partial keeps what fits") from error
    return found


def complete(found: Fit, template: Variables, config: ConfigDict) -> Variables:
    """All variables of a network: those that were found, and the rest as initialized.

    Args:
      found: from `fit_network`.
      template: shapes and types of the variables.
      config: of the network.
    """
    flat = traverse_util.flatten_dict(template, sep="/")
    arrays = found.arrays
    if arrays.keys() != flat.keys():
        print("initializing what starts anew, which can take a minute", file=sys.stderr, flush=True)
        fresh = init_variables(make_model(**config.model), config.seed)
        fresh = traverse_util.flatten_dict(fresh, sep="/")
        arrays = {key: arrays.get(key, fresh[key]) for key in flat}
    arrays = {key: np.asarray(arrays[key], leaf.dtype) for key, leaf in flat.items()}
    return traverse_util.unflatten_dict(arrays, sep="/")
