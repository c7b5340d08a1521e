"""Opening a model: the folder that a run of train.py leaves, or a conversion in the same form."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from knet_jax.checkpoint import Checkpoints
from knet_jax.configuration import ConfigError, load_saved_config
from knet_jax.knet import KNet, make_model
from knet_jax.structs import Categories
from knet_jax.tasks import TASKS
from knet_jax.training import init_variables
from knet_jax.validation import validate


class Run(NamedTuple):
    """A trained network and what belongs to it."""

    config: ConfigDict
    model: KNet
    variables: dict[str, Any]
    """`params`, and `batch_stats` where the network has any."""
    categories: Categories
    """The classes that it was trained with."""
    step: int


def open_run(
    workdir: str | Path,
    checkpoint: str | int = "best",
    ema: bool = False,
    overrides: Sequence[str] = (),
    dtype: str | None = None,
    num_devices: int = 1,
) -> Run:
    """Reads a checkpoint of a run, without the state of its optimizer.

    Args:
      workdir: of the run.
      checkpoint: `best`, `latest`, or the number of a step.
      ema: the moving average of the parameters instead of the parameters.
      overrides: `--config.x.y=value` arguments.
      dtype: of the feature maps; default: that of the config.
      num_devices: among which a batch of an evaluation is divided.

    Raises:
      ValueError: there is no such model or checkpoint, or something in it does not fit.
    """
    workdir = Path(workdir)
    if workdir.is_file():
        raise ConfigError(f"{workdir} is a file; accepted: the folder of a model")
    config = load_saved_config(workdir, overrides)
    if dtype:
        config.model.dtype = dtype
    validate(config, num_devices, parts=("eval",))
    if ema and not config.train.ema_decay:
        raise ConfigError("--ema: the run kept no average, its config.train.ema_decay is 0")
    model = make_model(**config.model)
    target = jax.eval_shape(lambda: init_variables(model, config.seed))
    params = "ema" if ema else "params"
    target[params] = target.pop("params")
    with Checkpoints(
        workdir / "checkpoints",
        metric=f"{'val_ema' if ema else 'val'}/{TASKS[config.task].metric.HEADLINE[0]}",
        model=config.model.to_dict(),
        read_only=True,
    ) as checkpoints:
        step = choose_step(checkpoints, str(checkpoint))
        variables, record = checkpoints.restore(target, step)
    variables["params"] = variables.pop(params)
    saved = record["progress"]["categories"]
    categories = Categories(tuple(saved["names"]), tuple(saved["dataset_ids"]), saved["num_things"])
    return Run(config, model, variables, categories, step)


def choose_step(checkpoints: Checkpoints, name: str) -> int:
    """The step that a name stands for. Raises ConfigError where there is none."""
    steps = checkpoints.steps()
    if not steps:
        raise ConfigError(f"no checkpoints in {checkpoints.directory}")
    if name == "latest":
        return steps[-1]
    if name == "best":
        best = checkpoints.best_step()
        return steps[-1] if best is None else best
    if not name.isdecimal():
        raise ConfigError(f"--checkpoint={name}; accepted: best, latest, or a step of {steps}")
    return int(name)
