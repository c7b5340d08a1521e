"""Opening a model: the folder that a run of train.py leaves, or a conversion in the same form; the
one file that a conversion makes of it; or a checkpoint of others, with a config beside it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util
from ml_collections import ConfigDict

from knet_jax.config.files import apply_overrides, load_config, load_saved_config
from knet_jax.config.schema import to_tuples
from knet_jax.config.validation import validate
from knet_jax.knet import KNet
from knet_jax.model import init_variables, make_model
from knet_jax.saved.checkpoints import Checkpoints
from knet_jax.saved.class_names import find_categories
from knet_jax.saved.fitting import complete, fit_network
from knet_jax.saved.parameter_names import Variables
from knet_jax.saved.weight_files import READERS, load_backbone, read_weights
from knet_jax.segmentation.segments import Categories
from knet_jax.system.errors import UserError, naming_file
from knet_jax.tasks import TASKS


@dataclass(frozen=True)
class Model:
    """A trained network and what belongs to it."""

    config: ConfigDict
    model: KNet
    shapes: dict[str, Any]
    """Of `params`, and of `batch_stats` where the network has any."""
    categories: Categories
    """The classes that it was trained with."""
    step: int
    read: Callable[[], dict[str, Any]]
    """Gives arrays of these shapes. Raises ValueError where they are damaged."""

    @staticmethod
    def of(
        config: ConfigDict, model: KNet, variables: Variables, categories: Categories, step: int
    ) -> Model:
        """With arrays that are at hand."""
        shapes = jax.eval_shape(lambda: variables)
        return Model(config, model, shapes, categories, step, lambda: variables)

    @cached_property
    def variables(self) -> dict[str, Any]:
        """The arrays, read when they are first asked for."""
        return self.read()


def open_model(*args: Any, **kwargs: Any) -> Model:
    """Reads a model whole. Arguments and errors as of `find_model`, and those of the arrays."""
    run = find_model(*args, **kwargs)
    _ = run.variables  # read here
    return run


def find_model(
    path: str | Path,
    checkpoint: str | int = "best",
    ema: bool = False,
    overrides: Sequence[str] = (),
    dtype: str | None = None,
    num_devices: int = 1,
    config: str | None = None,
) -> Model:
    """Reads a model, of a folder all but its arrays.

    Args:
      path: the folder of a run, or a file of weights.
      checkpoint: of a folder: `best`, `latest`, or the number of a step.
      ema: of a folder: the moving average of the parameters instead of the parameters.
      overrides: `--config.x.y=value` arguments.
      dtype: of the feature maps; default: that of the config.
      num_devices: among which a batch of an evaluation is divided.
      config: `configs/FILE.py` or `configs/FILE.py:variant`, of a file that others wrote.

    Raises:
      ValueError: there is no such model or checkpoint, or something in it does not fit.
    """
    check_arguments(path, overrides, dtype, config)
    path = Path(path)
    if is_file(path):
        if (str(checkpoint), ema) != ("best", False):
            raise UserError(
                f"checkpoint={checkpoint}, ema={ema}: {path} is a file and holds one set of weights; "
                "accepted: best and False"
            )
        return _open_file(path, overrides, dtype, num_devices, config)
    if config:
        raise UserError(f"config={config} is for a file of weights; {path} has a config of its own")
    return _open_folder(path, str(checkpoint), ema, overrides, dtype, num_devices)


def is_file(path: Path) -> bool:
    """Whether a model is a file, be it there or not, and no folder."""
    return path.is_file() or (path.suffix in READERS and not path.is_dir())


def check_arguments(path: Any, overrides: Any, dtype: Any, config: Any) -> None:
    """Raises UserError where what names a model is not of its type."""
    if not isinstance(path, str | os.PathLike):
        raise UserError(f"path is {path!r}; accepted: the folder of a model, or a file of weights")
    if isinstance(overrides, str) or not all(isinstance(item, str) for item in overrides):
        raise UserError(
            f"overrides is {overrides!r}; accepted: a list such as ['--config.x.y=value']"
        )
    if not isinstance(dtype, str | None):
        raise UserError(f"dtype is {dtype!r}; accepted: 'float32', 'bfloat16', or None")
    if not isinstance(config, str | None):
        raise UserError(f"config is {config!r}; accepted: 'configs/FILE.py:variant', or None")


def _make_network(config: ConfigDict, dtype: str | None, num_devices: int) -> KNet:
    """The network of a config, which gets its `dtype`."""
    if dtype:
        config.model.dtype = dtype
    validate(config, num_devices, parts=("eval",))
    return make_model(**config.model)


def _trace_shapes(model: KNet) -> dict[str, Any]:
    """Shapes of the variables of a network; of a large one that takes a second or more."""
    return jax.eval_shape(lambda: init_variables(model, 0))


def _open_folder(
    workdir: Path,
    checkpoint: str,
    ema: bool,
    overrides: Sequence[str],
    dtype: str | None,
    num_devices: int,
) -> Model:
    config = load_saved_config(workdir, overrides)
    model = _make_network(config, dtype, num_devices)
    if ema and not config.train.ema_decay:
        raise UserError("ema=True: the run kept no average, its config.train.ema_decay is 0")
    params = "ema" if ema else "params"
    open_checkpoints = partial(
        Checkpoints,
        workdir / "checkpoints",
        metrics=headlines(config)[-1:] if ema else headlines(config),
        model=config.model.to_dict(),
        read_only=True,
    )
    with open_checkpoints() as checkpoints:
        step = choose_step(checkpoints, checkpoint)
        target = checkpoints.shapes(step)
        if target is None or params not in target:
            target = _trace_shapes(model)
            target[params] = target.pop("params")
        target = {name: target[name] for name in (params, "batch_stats") if name in target}
        categories = checkpoints.check(target, step)["progress"]["categories"]

    def as_variables(tree: dict[str, Any]) -> dict[str, Any]:
        return {"params" if name == params else name: tree[name] for name in tree}

    def read() -> dict[str, Any]:
        with open_checkpoints() as checkpoints:
            return as_variables(checkpoints.restore(target, step)[0])

    return Model(config, model, as_variables(target), Categories.of(categories), step, read)


def _open_file(
    path: Path,
    overrides: Sequence[str],
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
        config = apply_overrides(ConfigDict(to_tuples(about.config)), overrides)
    else:
        raise UserError(
            f"{path} holds weights and no config; knet_jax.load takes its config as "
            "config='configs/FILE.py', and python -m knet_jax.convert makes a model of both"
        )
    model = _make_network(config, dtype, num_devices)
    template = _trace_shapes(model)
    with naming_file(path):
        found = fit_network(weights, template, config)
        if any(not name.startswith("auxiliary_head.") for name in found.missing):
            raise UserError(
                "it holds a backbone only; python -m knet_jax.convert makes a model of it, whose "
                "rest starts anew"
            )
    variables = jax.tree.map(jnp.asarray, complete(found, template, config))
    if spec:
        categories, step = find_categories(config, weights.classes)[0], 0
    else:
        categories, step = about.categories, about.step
    return Model.of(config, model, variables, categories, step)


def headlines(config: ConfigDict) -> tuple[str, ...]:
    """Names of the scores by which a step is the best: of the run, then of its average if it has one."""
    names = ("val", "val_ema") if config.train.ema_decay else ("val",)
    return tuple(f"{name}/{TASKS[config.task].metric.HEADLINE[0]}" for name in names)


def choose_step(checkpoints: Checkpoints, name: str) -> int:
    """The step that a name stands for. Raises UserError where there is none."""
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


def load_start(path: str | Path, variables: Variables) -> tuple[Variables, str]:
    """Variables where training starts, and what they are, in words.

    Args:
      path: the folder of a model, all of which is taken, or a file, as for `load_backbone`.
      variables: of the network, as initialized.

    Raises:
      ValueError: as `load_backbone`, or the model is of another network.
    """
    if not Path(path).is_dir():
        return load_backbone(path, variables), f"backbone from {path}"
    opened = open_model(path)
    found, needed = (
        traverse_util.flatten_dict(tree, sep="/") for tree in (opened.variables, variables)
    )
    for key in sorted(found.keys() | needed.keys()):
        given, wanted = (
            tuple(tree[key].shape) if key in tree else None for tree in (found, needed)
        )
        if given != wanted:
            raise UserError(
                f"config.init_weights: {path}: {key} is {given or 'absent'} in it, "
                f"{wanted or 'absent'} here; python -m knet_jax.convert makes a model of other "
                "classes of it"
            )
    return opened.variables, f"network of step {opened.step} from {path}"
