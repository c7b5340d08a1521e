"""Where a run starts: at its last checkpoint, at given weights, or at random ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from knet_jax.saved.checkpoints import Checkpoints
from knet_jax.saved.models import load_init_weights
from knet_jax.system import processes
from knet_jax.training.train_step import TrainState


def find_start(
    config: ConfigDict,
    variables: Mapping[str, Any],
    optimizer: optax.GradientTransformation,
    checkpoints: Checkpoints | processes.Absent,
) -> tuple[TrainState, dict[str, Any] | None]:
    """The state from which a run goes on.

    That is the last checkpoint, else the initial weights that the config names, else new variables.

    Returns:
        The state, and what was noted at the checkpoint, None where there is none.
    """
    params, has_average = variables["params"], bool(config.train.ema_decay)
    state = TrainState(
        jnp.zeros((), jnp.int32),
        params,
        variables.get("batch_stats", {}),
        jax.jit(optimizer.init)(params),
        params if has_average else None,
    )
    restored = checkpoints.restore_latest(state)
    found = processes.from_main(lambda: restored and (restored[1]["step"], restored[1]["progress"]))
    if found:
        step, progress = found
        state = processes.broadcast(restored[0] if restored else state)
        if config.init_weights:
            print(f"config.init_weights={config.init_weights} is not used where a run goes on")
        if processes.is_main():
            print(f"resuming from step {step} of {checkpoints.directory.parent}")
        return state, progress
    if config.init_weights and processes.is_main():
        loaded, origin = load_init_weights(config.init_weights, variables)
        state = state._replace(**loaded)
        print(origin)
    elif not config.init_weights:
        print("FROM SCRATCH: config.init_weights names no weights of a backbone")
    state = processes.broadcast(state._replace(ema=None))
    if has_average:
        state = state._replace(ema=jax.tree.map(jnp.copy, state.params))
    return state, None
