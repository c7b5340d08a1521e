"""How a run ends before its last step: asked to, at numbers that are not finite, or without progress."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from knet_jax.data.prepared_split import Split
from knet_jax.saved.checkpoints import Checkpoints
from knet_jax.structs import EMPTY
from knet_jax.system import processes
from knet_jax.system.errors import UserError
from knet_jax.system.signals import StopRequest
from knet_jax.training.logs import read_log


def check_finite(done: Any, *, split: Split, checkpoints: Checkpoints, start: int) -> None:
    """Stops the run at numbers that are not finite, before anything of them is saved.

    A checkpoint of the step before is set aside: a step tells of the state that it starts from, whatever
    the learning rate. Earlier ones stay.

    Args:
        done: (step, its metrics or its state by name, ids of its pictures), or None before the first.
        start: the step from which the run has started.

    Raises:
        UserError: the loss, the gradient or the state is not finite.
    """
    if done is None:
        return
    step, values, ids = done
    # Other scalars of a step may be nan: a share of no things.
    judged = ("loss/total", "grad_norm") if "loss/total" in values else values
    if all(np.isfinite(values[name]).all() for name in judged):
        return
    bad = [name for name, value in values.items() if not np.isfinite(value).all()]
    shown = [index for each in processes.exchange(np.asarray(ids).tolist()) for index in each]
    names = ", ".join(split.file_name(i) for i in shown if i != EMPTY)

    def way_back() -> str:
        checkpoints.wait()
        if step - 1 in checkpoints.steps():
            checkpoints.set_aside([step - 1])
            print(
                f"checkpoint {step - 1} led there and is moved to {checkpoints.directory}/damaged"
            )
        last = max(checkpoints.steps(), default="none")
        remedy = "a lower config.optim.lr or a longer config.optim.warmup_steps may help"
        if last == start:
            remedy += f"; else remove {checkpoints.directory / str(start)} to begin before it"
        return f"last checkpoint: {last}; {remedy}"

    error = UserError(
        f"step {step}: {', '.join(bad[:5])} is not finite; images: {names}; "
        f"{processes.from_main(way_back)}"
    )
    raise processes.shared(error)


def end_early(step: int, checkpoints: Checkpoints, stop: StopRequest) -> NoReturn:
    """Ends a run that was asked to stop, once the step is on disk."""
    with processes.together():
        checkpoints.wait()
    raise stop.end(f"stopped at step {step}, which is saved; the same command goes on")


def num_worse(workdir: Path, name: str) -> int:
    """How many of the evaluations that a run has logged followed the best one of a score."""
    scores = [record[name] for record in read_log(workdir) if record.get(name) is not None]
    return len(scores) - 1 - int(np.argmax(scores)) if scores else 0
