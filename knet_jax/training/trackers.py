"""Logging a run to Weights & Biases or MLflow too, where these are installed: `config.train.tracker`.

Where they log to, their own variables say: WANDB_MODE=offline, MLFLOW_TRACKING_URI=... A run that is
resumed goes on under its own name, which `WORKDIR/TRACKER.id` keeps.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from knet_jax.config.schema import flatten
from knet_jax.system.errors import UserError, one_line

PROJECT = "knet_jax"
"""The project of runs in Weights & Biases and MLflow."""


class WandbTracker:
    """Weights & Biases."""

    def __init__(self, library: Any, workdir: Path, config: Mapping[str, Any], id: str | None):
        self._library = library
        self.id = id or uuid.uuid4().hex
        self._run = library.init(
            project=PROJECT,
            name=workdir.name,
            dir=workdir,
            id=self.id,
            resume="allow",
            config=dict(config),
        )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Logs numbers, which may be NaN."""
        self._run.log(dict(values), step=step)

    def images(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:
        """Logs uint8 pictures [H, W, 3]."""
        self._run.log({k: self._library.Image(x) for k, x in pictures.items()}, step=step)

    def close(self) -> None:
        """Sends what is buffered."""
        self._run.finish()


class MlflowTracker:
    """MLflow; the methods are those of `WandbTracker`."""

    def __init__(self, library: Any, workdir: Path, config: Mapping[str, Any], id: str | None):
        self._client = library.MlflowClient()
        if id:
            self.id = id
            return
        experiment = self._client.get_experiment_by_name(PROJECT)
        experiment_id = (
            experiment.experiment_id if experiment else self._client.create_experiment(PROJECT)
        )
        self.id = self._client.create_run(experiment_id, run_name=workdir.name).info.run_id
        for name, value in config.items():
            self._client.log_param(self.id, name, value)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._client.log_metric(self.id, name, value, step=step)

    def images(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:
        for name, picture in pictures.items():
            self._client.log_image(self.id, picture, key=name, step=step)

    def close(self) -> None:
        self._client.set_terminated(self.id)


Tracker = WandbTracker | MlflowTracker
TRACKERS = {"wandb": WandbTracker, "mlflow": MlflowTracker}


def open_tracker(config: ConfigDict, workdir: Path) -> Tracker | None:
    """Begins, or resumes, the run of a workdir where `config.train.tracker` says.

    Raises:
        UserError: it is not installed, or does not take the run.
    """
    name = config.train.tracker
    if not name:
        return None
    file = workdir / f"{name}.id"
    try:
        id = file.read_text() if file.exists() else None
        tracker = TRACKERS[name](import_module(name), workdir, flatten(config), id)
    except ImportError as error:
        raise UserError(f"config.train.tracker={name}: pip install {name}: {error}") from error
    except Exception as error:
        raise UserError(f"config.train.tracker={name}: {one_line(error)}") from error
    file.write_text(tracker.id)
    return tracker
