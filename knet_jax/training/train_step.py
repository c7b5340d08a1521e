"""The train step: functions of one device's arrays, which `pmap` runs on all devices."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from knet_jax import losses
from knet_jax.knet import KNet, normalize
from knet_jax.matching import LossWeights
from knet_jax.nn.layers import AXIS, sum_over_devices
from knet_jax.objectives import Judgement
from knet_jax.structs import Batch, Output
from knet_jax.tasks import Task
from knet_jax.training.optim import gradient_norm


class TrainState(NamedTuple):
    """Everything that a step changes."""

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any
    ema: Any = None
    """Moving average of the parameters, None where a run keeps none."""


class Parts(NamedTuple):
    """How a batch is cut: over how many devices, and how many images each holds at a time."""

    num_devices: int
    num_images: int


def explain_change(model: KNet, was: Parts, now: Parts) -> str | None:
    """A warning for a run that goes on with other parts, None where its numbers stay the same."""
    modules = (model.backbone, model.neck, model.initial, model.auxiliary)
    values = {key: [getattr(m, key, None) for m in modules] for key in ("dropout", "drop_path")}
    affected = [key.replace("_", " ") for key, given in values.items() if any(given)]
    if any(getattr(module, "norm", None) == "batch" for module in modules):
        affected.append("batch statistics")
    if was == now or not affected:
        return None
    return (
        f"WARNING: {was.num_devices} devices of {was.num_images} images at a time have become "
        f"{now.num_devices} of {now.num_images}: {', '.join(affected)} will differ from those of "
        "the run that was stopped"
    )


def compute_loss(
    params: Any,
    batch_stats: Any,
    image: jax.Array,
    targets: Any,
    counts: losses.Counts,
    key: jax.Array,
    *,
    model: KNet,
    task: Task,
    weights: LossWeights,
) -> tuple[jax.Array, tuple[Judgement, Any]]:
    """The total loss of normalized images.

    Returns:
        The loss and (`Judgement`, new batch statistics), as `jax.value_and_grad(has_aux=True)` takes
        them.
    """
    output, updates = model.apply(
        {"params": params, "batch_stats": batch_stats},
        image,
        train=True,
        mutable=["batch_stats"],
        rngs={"dropout": key},
    )
    judgement = task.loss(round_masks(output, model.backbone.dtype), targets, counts, weights)
    batch_stats = updates.get("batch_stats", batch_stats)
    return sum(judgement.terms.values()), (judgement, batch_stats)


def round_masks(output: Output, dtype: str) -> Output:
    """The masks in the type of the maps, in which they are then enlarged. The losses read them many times;
    their sums and exponentials are wide."""
    stages = (stage._replace(masks=stage.masks.astype(dtype)) for stage in output.stages)
    dense = None if output.dense is None else output.dense.astype(dtype)
    return output._replace(stages=tuple(stages), dense=dense)


def part_key(seed: int, step: jax.Array, part: jax.Array) -> jax.Array:
    """The key of the randomness (dropout, drop path) of a part of the batch of a step."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), part)


def count_targets(part: Batch, *, task: Task) -> losses.Counts:
    """What the losses of a part of a batch are divided by, summed over all devices."""
    return sum_over_devices(task.count(task.unpack(part.targets)))


def accumulate(
    grads: Any,
    params: Any,
    batch_stats: Any,
    part: Batch,
    counts: losses.Counts,
    key: jax.Array,
    *,
    model: KNet,
    task: Task,
    weights: LossWeights,
) -> tuple[Any, Any, Judgement]:
    """Adds the gradients of a part of a batch, some of one device's images.

    Args:
        grads: sums over the parts before.
        counts: of the whole batch on all devices.
        key: of this part on all devices.

    Returns:
        the sums, new batch_stats, and what the loss says of this part.
    """
    dtype = model.backbone.dtype
    image = normalize(part.image, part.size, dtype)
    targets = task.unpack(part.targets)
    key = jax.random.fold_in(key, jax.lax.axis_index(AXIS))
    loss = partial(compute_loss, model=model, task=task, weights=weights)
    (_, (judgement, batch_stats)), new = jax.value_and_grad(loss, has_aux=True)(
        params, batch_stats, image, targets, counts, key
    )
    return jax.tree.map(jnp.add, grads, new), batch_stats, judgement


def update(
    state: TrainState,
    grads: Any,
    batch_stats: Any,
    judgements: tuple[Judgement, ...],
    stops: jax.Array | None = None,
    *,
    optimizer: optax.GradientTransformation,
    trainable: Any,
    ema_decay: float,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One step of the optimizer by the gradients of all devices.

    Args:
        state: the same on all devices.
        grads: of this device.
        batch_stats: new ones.
        judgements: of this device, one for each part.
        stops: 1 where the process of this device was asked to stop, else 0; None for one process.
        trainable: True for every parameter that is not frozen, a tree like the parameters.
        ema_decay: of the moving average, if the state has one; less during the first steps.

    Returns:
        the next state, and scalars: every loss term, their sum, the gradient norm before clipping,
        the measures of the task, and the sum of `stops` if there are any.
    """
    grads = sum_over_devices(grads)
    judgement = jax.tree.map(lambda *parts: sum(parts), *judgements)
    (terms, measures), stops = sum_over_devices((judgement, stops))
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = terms | {
        "loss/total": sum(terms.values()),
        "grad_norm": gradient_norm(grads, trainable),
        **measures,
    }
    if stops is not None:
        metrics["stops"] = stops
    decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))
    ema = jax.tree.map(
        lambda average, new: (average + (1 - decay) * (new - average)).astype(average.dtype),
        state.ema,
        None if state.ema is None else params,
    )
    return TrainState(state.step + 1, params, batch_stats, opt_state, ema), metrics


def make_train_step(
    devices: list[jax.Device],
    *,
    model: KNet,
    task: Task,
    optimizer: optax.GradientTransformation,
    trainable: Any,
    weights: LossWeights,
    seed: int,
    ema_decay: float = 0.0,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """Makes the function that takes a training step on all devices, those of other processes too.

    It maps (state, batch in parts, `stops`) to (next state, scalars, see `update`); every array of a
    part has a leading axis over the devices of this process, and so has `stops`, which may be None.
    Gradients are sums over parts and devices, divided by the counts of the whole batch, so that
    neither changes the result. Exceptions are `norm: batch`, whose statistics are those of a part on
    all devices, and dropout and drop path, which are drawn for each part and device. The parts are a
    loop on the host: within one compiled program, XLA on the CPU runs the gradient of a convolution a
    hundred times slower.
    """
    on_devices = partial(jax.pmap, axis_name=AXIS, devices=devices)
    count_ = on_devices(partial(count_targets, task=task), out_axes=None)
    zeros = on_devices(lambda params, _: jax.tree.map(jnp.zeros_like, params), in_axes=(None, 0))
    accumulate_ = on_devices(
        partial(accumulate, model=model, task=task, weights=weights),
        in_axes=(0, None, None, 0, None, None),
        out_axes=(0, None, 0),
        donate_argnums=0,
    )
    update_ = on_devices(
        partial(update, optimizer=optimizer, trainable=trainable, ema_decay=ema_decay),
        in_axes=(None, 0, None, 0, 0),
        out_axes=None,
        donate_argnums=0,
    )
    keys = jax.jit(partial(part_key, seed))

    def step(
        state: TrainState, parts: list[Batch], stops: np.ndarray | None = None
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        counts = jax.tree.map(lambda *each: sum(each), *map(count_, parts))
        grads, batch_stats, judgements = zeros(state.params, parts[0].id), state.batch_stats, []
        for i, part in enumerate(parts):
            grads, batch_stats, judgement = accumulate_(
                grads, state.params, batch_stats, part, counts, keys(state.step, i)
            )
            judgements.append(judgement)
        return update_(state, grads, batch_stats, tuple(judgements), stops)

    return step


def to_devices(batch: Batch, devices: list[jax.Device], num_parts: int) -> list[Batch]:
    """Starts the transfer of a host's batch, cut into parts with a leading axis over devices."""
    sharding = NamedSharding(Mesh(np.array(devices), (AXIS,)), PartitionSpec(AXIS))

    def part(i: int) -> Batch:
        shape = (len(devices), num_parts, -1)
        return jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:])[:, i], batch)

    return [jax.device_put(part(i), sharding) for i in range(num_parts)]


def replicate(tree: Any, devices: list[jax.Device]) -> Any:
    """The same arrays on all devices of this process, laid out as the train step returns them.

    What jax makes of an array of numpy may share its memory, and could not be donated then. Of what
    a train step of several processes returned, this process has a copy on each of its devices.
    """

    def local(x: Any) -> jax.Array:
        if not isinstance(x, jax.Array):
            return jnp.array(x)
        return x if x.is_fully_addressable else x.addressable_data(0)

    tree = jax.tree.map(local, tree)
    return jax.device_put(tree, NamedSharding(Mesh(np.array(devices), (AXIS,)), PartitionSpec()))
