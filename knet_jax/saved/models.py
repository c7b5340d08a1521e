"""Opening a trained model, in any of its forms.

- the folder that `train` leaves, or that `knet convert` makes of other weights;
- the `.safetensors` that `knet convert` makes of such a folder;
- a checkpoint that others wrote, together with a config.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from knet_jax.config.files import apply_overrides, complete_saved, load_config, load_saved_config
from knet_jax.config.validation import validate
from knet_jax.knet import KNet
from knet_jax.model import make_model, variable_shapes
from knet_jax.saved.checkpoints import Checkpoints
from knet_jax.saved.class_names import find_categories
from knet_jax.saved.fitting import fill_missing, fit_network, load_backbone
from knet_jax.saved.parameter_names import Variables
from knet_jax.saved.weight_files import READERS, read_weights
from knet_jax.segmentation.class_lists import check_class_counts
from knet_jax.segmentation.segments import Categories
from knet_jax.system.errors import UserError, naming_file
from knet_jax.tasks import TASKS


@dataclass(frozen=True)
class Model:
    """A trained network and what belongs to it."""

    config: ConfigDict
    network: KNet
    variables: Variables
    """The parameters and, if the network has any, running statistics."""
    categories: Categories
    """The classes that it was trained with."""
    step: int
    """The number of training steps behind it; 0 for weights of others."""


def open_model(
    path: str | Path,
    checkpoint: str | int = "best",
    ema: bool = False,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    dtype: str | None = None,
    num_devices: int = 1,
    config: str | None = None,
) -> Model:
    """Reads a trained model.

    Args:
        path: the folder of a model, or a file of weights.
        checkpoint: `best`, `latest`, or the number of a step; for a folder only.
        ema: take the moving average of the parameters; for a folder only.
        overrides: what changes the config, see `load_config`.
        dtype: type of the feature maps; by default that of the config.
        num_devices: how many devices share a batch of an evaluation.
        config: the config of a file that others wrote, see `load_config`.

    Raises:
        UserError: there is no such model or checkpoint, or something in it does not fit.
    """
    if isinstance(overrides, str):
        raise UserError(f"overrides is {overrides!r}; accepted: a list, ['--config.x.y=value']")
    path = Path(path)
    # Also where a file should be and is not.
    is_file = path.is_file() or (path.suffix in READERS and not path.is_dir())
    if config and not is_file:
        raise UserError(f"config={config} is for a file of weights; {path} has its own config")
    if is_file and (str(checkpoint), ema) != ("best", False):
        raise UserError(
            f"checkpoint={checkpoint}, ema={ema}: {path} is a file and holds one set of weights; "
            "accepted: best and False"
        )
    if is_file:
        model = _open_file(path, overrides, dtype, num_devices, config)
    else:
        model = _open_folder(path, str(checkpoint), ema, overrides, dtype, num_devices)
    with naming_file(path):
        check_class_counts(model.config, model.categories)
    return model


def _make_network(config: ConfigDict, dtype: str | None, num_devices: int) -> KNet:
    """The network of a config, in which `dtype` is set."""
    if dtype:
        config.model.dtype = str(dtype)
    validate(config, num_devices, parts=("eval",))
    return make_model(**config.model)


def _open_folder(
    folder: Path,
    checkpoint: str,
    ema: bool,
    overrides: Sequence[str] | Mapping[str, Any],
    dtype: str | None,
    num_devices: int,
) -> Model:
    config = load_saved_config(folder, overrides)
    network = _make_network(config, dtype, num_devices)
    scores = headline_scores(config)
    with Checkpoints(
        folder / "checkpoints",
        metrics=scores[-1:] if ema else scores,
        model=config.model.to_dict(),
        read_only=True,
    ) as checkpoints:
        step = choose_step(checkpoints, checkpoint)
        shapes = checkpoints.saved_shapes(step)  # tracing a large network takes seconds
        if shapes is None:
            shapes = variable_shapes(network)
            shapes["ema"] = shapes["params"]
        params = "ema" if ema else "params"
        if params not in shapes:
            raise UserError(f"ema={ema}: step {step} of {folder} has no {params}")
        parts = {name: shapes[name] for name in (params, "batch_stats") if name in shapes}
        state, record = checkpoints.restore(parts, step)
    variables = {"params": state.pop(params), **state}
    with naming_file(f"step {step} of {folder}"):
        categories = Categories.of(record["progress"]["categories"])
    return Model(config, network, variables, categories, step)


def _open_file(
    path: Path,
    overrides: Sequence[str] | Mapping[str, Any],
    dtype: str | None,
    num_devices: int,
    spec: str | None,
) -> Model:
    with naming_file(path):
        weights = read_weights(path)
    about = weights.about
    if spec:
        config = load_config(spec, overrides)
    elif about:
        with naming_file(path):
            config = complete_saved(about.config)
        config = apply_overrides(config, overrides)
    else:
        raise UserError(
            f"{path} holds weights and no config; knet_jax.load takes its config as "
            "config='configs/FILE.py', and knet convert makes a model of both"
        )
    network = _make_network(config, dtype, num_devices)
    template = variable_shapes(network)
    with naming_file(path):
        found = fit_network(weights, template, config)
        if any(not name.startswith("auxiliary_head.") for name in found.missing):
            raise UserError(
                "it holds a backbone only; knet convert makes a model of it, with "
                "the rest as initialized"
            )
    variables = jax.tree.map(jnp.asarray, fill_missing(found, template, config))
    if spec:
        return Model(config, network, variables, find_categories(config, weights.classes)[0], 0)
    return Model(config, network, variables, about.categories, about.step)


def headline_scores(config: ConfigDict) -> tuple[str, ...]:
    """Names of the scores by which a checkpoint is the best one, such as `val/PQ`.

    Args:
        config: that of the run. If it keeps a moving average, the score of that comes second.
    """
    splits = ("val", "val_ema") if config.train.ema_decay else ("val",)
    return tuple(f"{split}/{TASKS[config.task].metric.HEADLINE[0]}" for split in splits)


def choose_step(checkpoints: Checkpoints, name: str) -> int:
    """Finds the step that `best`, `latest` or a number means. Raises UserError if there is none."""
    steps = checkpoints.steps()
    if not steps:
        raise UserError(f"no checkpoints in {checkpoints.directory}")
    if name == "latest":
        return steps[-1]
    if name == "best":
        best = checkpoints.best_step()
        return steps[-1] if best is None else best
    if not name.isdecimal():
        raise UserError(f"checkpoint={name}; accepted: best, latest, or a step of {steps}")
    return int(name)


def load_init_weights(path: str | Path, variables: Variables) -> tuple[Variables, str]:
    """Reads the weights that `config.init_weights` names.

    Args:
        path: the folder of a model, all of which is taken, or a file, see `load_backbone`.
        variables: those of the network, as initialized.

    Returns:
        The variables with which training starts, and a few words on where they come from.

    Raises:
        UserError: see `load_backbone`; or the model has another network.
    """
    if not Path(path).is_dir():
        return load_backbone(path, variables), f"backbone from {path}"
    opened = open_model(path)
    found, needed = (
        {key: x.shape for key, x in flatten_dict(tree, sep="/").items()}
        for tree in (opened.variables, variables)
    )
    if differing := sorted(dict(found.items() ^ needed.items())):
        given, wanted = (shapes.get(differing[0], "absent") for shapes in (found, needed))
        raise UserError(
            f"config.init_weights: {path}: {differing[0]} is {given} in it, {wanted} here; "
            "knet convert makes a model of other classes of it"
        )
    return opened.variables, f"network of step {opened.step} from {path}"
