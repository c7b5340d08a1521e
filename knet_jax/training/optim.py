"""AdamW in groups of parameters, with warm-up, steps and clipping as in the PyTorch reference.

`config.optim.groups` is a sequence of (name, pattern, learning rate factor, weight decay factor),
read in order: a parameter belongs to the first group whose regular expression matches the whole of
its path (`backbone/layer2_block0/conv1/kernel`). A learning rate factor of 0 freezes the group: its
parameters never change, have no optimizer state and do not count in the gradient norm.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import starmap
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from knet_jax.config.schema import decay_steps
from knet_jax.saved.checkpoint_record import leaf_paths
from knet_jax.system.errors import UserError

# The constants of the reference, which no recipe changes.
BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8
CLIP_EPSILON = 1e-6


class Group(NamedTuple):
    """One row of `config.optim.groups`."""

    name: str
    pattern: str
    lr: float
    weight_decay: float


def assign_groups(groups: Sequence[Sequence[Any]], params: Any) -> Any:
    """The name of the group of every parameter, a tree like `params`.

    Raises:
        UserError: a parameter is in no group, or a group has no parameter.
    """
    rows = [*starmap(Group, groups)]
    labels = []
    for path in leaf_paths(params):
        label = next((row.name for row in rows if re.fullmatch(row.pattern, path)), None)
        if label is None:
            raise UserError(f"parameter {path!r} is in no group of config.optim.groups")
        labels.append(label)
    for row in rows:
        if row.name not in labels:
            raise UserError(
                f"config.optim.groups: {row.name!r} has no parameter, {row.pattern!r} matches none "
                f"that the rows above it leave; a path looks like {leaf_paths(params)[0]!r}"
            )
    return jax.tree.unflatten(jax.tree.structure(params), labels)


def check_frozen(groups: Sequence[Sequence[Any]], params: Any, frozen: tuple[str, ...]) -> None:
    """Checks that no group trains what the network gives no gradient.

    `frozen` are beginnings of the names of the backbone's modules without a gradient.

    Raises:
        UserError: a group does.
    """
    labels = jax.tree.leaves(assign_groups(groups, params))
    rates = {row.name: row.lr for row in starmap(Group, groups)}
    for path, label in zip(leaf_paths(params), labels):
        if rates[label] and path.removeprefix("backbone/").startswith(frozen):
            raise UserError(
                f"config.optim.groups: {label!r} trains {path}, which "
                "config.model.backbone.frozen_stages freezes"
            )


def trainable(groups: Sequence[Sequence[Any]], params: Any) -> Any:
    """True for every parameter that is not frozen, a tree like `params`."""
    frozen = {row.name for row in starmap(Group, groups) if row.lr == 0}
    return jax.tree.map(lambda label: label not in frozen, assign_groups(groups, params))


def gradient_norm(grads: Any, mask: Any) -> jax.Array:
    """Global norm of the gradients where `mask` (from `trainable`) is true, before clipping."""
    return optax.tree.norm([g for g, kept in zip(*map(jax.tree.leaves, (grads, mask))) if kept])


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Scales gradients by min(1, max_norm / (norm + 1e-6)), as PyTorch's `clip_grad_norm_`.

    `optax.clip_by_global_norm` has no epsilon.
    """

    def clip(updates: Any) -> Any:
        scale = jnp.minimum(1.0, max_norm / (optax.tree.norm(updates) + CLIP_EPSILON))
        return jax.tree.map(lambda g: g * scale.astype(g.dtype), updates)

    return optax.stateless(lambda updates, _: clip(updates))


def base_rate(optim: ConfigDict, batch_size: int) -> float:
    """`config.optim.lr`, in proportion to the batch where `config.optim.scale_lr` asks for it."""
    return optim.lr * (batch_size / optim.reference_batch if optim.scale_lr else 1.0)


def make_schedule(optim: ConfigDict, steps_per_epoch: float, batch_size: int) -> optax.Schedule:
    """Learning rate of a group of factor 1 at step t, counted from 0.

    lr(t) = base / decay_factor^(decays at or before t) * (f + (1 - f) * min(1, t / W)), where
    f = warmup_factor and W = warmup_steps; the decay goes on during the warm-up.
    """
    base = base_rate(optim, batch_size)
    boundaries = jnp.array(decay_steps(optim, steps_per_epoch), jnp.int32)

    def schedule(step: jax.Array | int) -> jax.Array:
        step = jnp.asarray(step)
        rate = base / optim.decay_factor ** jnp.sum(step >= boundaries)
        if optim.warmup_steps == 0:
            return rate
        progress = jnp.minimum(1.0, step / optim.warmup_steps)
        return rate * (optim.warmup_factor + (1.0 - optim.warmup_factor) * progress)

    return schedule


def group_rates(
    optim: ConfigDict, schedule: optax.Schedule, step: jax.Array | int
) -> dict[str, jax.Array]:
    """Learning rates at a step under the names of the logs, `lr/<group>`, without frozen groups."""
    rate = schedule(step)
    return {f"lr/{row.name}": rate * row.lr for row in starmap(Group, optim.groups) if row.lr}


def make_optimizer(
    optim: ConfigDict, params: Any, steps_per_epoch: float, batch_size: int
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Clipping, then AdamW (Loshchilov and Hutter, 2019) in groups.

    p <- p - lr * wd * p - lr * m / (sqrt(v) + eps), m and v the bias-corrected moments, lr that of
    the group.

    Args:
        optim: `config.optim`.
        params: parameters or their shapes.
        steps_per_epoch: batches that one pass over the training set gives.
        batch_size: images of a step on all devices.

    Returns:
        The transformation and the learning rate of a group of factor 1, a function of the step.

    Raises:
        UserError: the groups do not fit the parameters.
    """
    schedule = make_schedule(optim, steps_per_epoch, batch_size)

    def adamw(group: Group) -> optax.GradientTransformation:
        if group.lr == 0:
            return optax.set_to_zero()
        return optax.adamw(
            lambda step: schedule(step) * group.lr,
            b1=BETA1,
            b2=BETA2,
            eps=EPSILON,
            weight_decay=optim.weight_decay * group.weight_decay,
        )

    rows = [*starmap(Group, optim.groups)]
    labels = assign_groups(optim.groups, params)
    transformation = optax.chain(
        optax.masked(clip_by_global_norm(optim.clip_norm), trainable(optim.groups, params)),
        optax.partition({row.name: adamw(row) for row in rows}, labels),
    )
    return transformation, schedule


def describe(
    optim: ConfigDict, params: Any, steps_per_epoch: float, total_steps: int, batch_size: int
) -> str:
    """The schedule and the groups in words, for the start of a run."""
    base = base_rate(optim, batch_size)
    reason = f"{optim.lr:g} x {batch_size} / {optim.reference_batch}, scaled to the batch"
    rate = f"{base:g} ({reason})" if optim.scale_lr else f"{base:g}"
    decays = [f"{at}" for at in decay_steps(optim, steps_per_epoch) if at < total_steps]
    decay = f"/ {optim.decay_factor:g} at {', '.join(decays)}" if decays else "no decay"
    lines = [
        f"learning rate {rate}; warm-up {optim.warmup_steps} steps; {decay}; {total_steps} steps"
    ]
    labels = jax.tree.leaves(assign_groups(optim.groups, params))
    for row in starmap(Group, optim.groups):
        sizes = [p.size for p, label in zip(jax.tree.leaves(params), labels) if label == row.name]
        what = (
            f"lr {base * row.lr:g}, weight decay {optim.weight_decay * row.weight_decay:g}"
            if row.lr
            else "frozen"
        )
        lines.append(f"  {row.name}: {what}; {sum(sizes):,} parameters in {len(sizes)} arrays")
    return "\n".join(lines)
