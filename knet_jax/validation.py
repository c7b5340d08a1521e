"""Whether the values of a config make sense, whoever wrote them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from knet_jax.configuration import ConfigError, to_tuples
from knet_jax.layers import NORMS
from knet_jax.matching import Weights
from knet_jax.optim import parse_groups


def _number(value: Any) -> bool:
    kind = isinstance(value, int | float) and not isinstance(value, bool)
    return kind and math.isfinite(value)


def _positive(value: Any) -> bool:
    return _number(value) and value > 0


def _non_negative(value: Any) -> bool:
    return _number(value) and value >= 0


def _count(value: Any) -> bool:
    return isinstance(value, int) and _non_negative(value)


def _at_least_one(value: Any) -> bool:
    return isinstance(value, int) and _positive(value)


def _share(value: Any) -> bool:
    return _non_negative(value) and value <= 1


def _pair(test: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, tuple) and len(value) == 2 and all(map(test, value))


def _one_of(*choices: str) -> tuple[Callable[[Any], bool], str]:
    return lambda value: value in choices, ", ".join(choices)


ZERO = (_count, "a whole number of at least 0")
ONE = (_at_least_one, "a whole number of at least 1")

RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "task": _one_of("panoptic"),
    "seed": ZERO,
    "init_weights": (lambda value: isinstance(value, str), "a path, or '' for none"),
    "precision": _one_of("float32", "tensorfloat32", "bfloat16"),
    "model.num_proposals": ONE,
    "model.num_things": ONE,
    "model.num_stuff": ZERO,
    "model.num_stages": ONE,
    "model.backbone.frozen_stages": (lambda n: _count(n) and n <= 4, "0 to 4 stages"),
    "model.backbone.depths": (
        lambda depths: (
            isinstance(depths, tuple) and len(depths) == 4 and all(map(_at_least_one, depths))
        ),
        "four numbers of blocks, such as (3, 4, 6, 3)",
    ),
    "model.backbone.width": ONE,
    "model.backbone.norm": _one_of(*NORMS),
    "model.ffn_channels": ONE,
    "model.channels": (lambda n: _at_least_one(n) and n % 2 == 0, "an even number of at least 2"),
    "model.num_heads": ONE,
    "model.dtype": _one_of("float32", "bfloat16"),
    "data.dataset": _one_of("coco", "shapes"),
    "data.canvas": (
        _pair(lambda n: _at_least_one(n) and n % 32 == 0),
        "(height, width), multiples of 32",
    ),
    "data.short_side": (
        lambda pair: _pair(_positive)(pair) and pair[0] <= pair[1],
        "(smallest, largest) in pixels",
    ),
    "data.long_side": (_positive, "a number of pixels"),
    "data.flip": (_share, "a probability"),
    "data.max_things": ONE,
    "data.num_workers": ZERO,
    "data.max_broken_share": (_share, "a share between 0 and 1"),
    **{f"loss.{term}": (_non_negative, "a weight of at least 0") for term in Weights._fields},
    "optim.lr": (_positive, "a number above 0"),
    "optim.reference_batch": (_positive, "a number above 0"),
    "optim.weight_decay": (_non_negative, "a number of at least 0"),
    "optim.clip_norm": (_positive, "a number above 0"),
    "optim.warmup_steps": ZERO,
    "optim.warmup_factor": (_share, "a share between 0 and 1"),
    "optim.decay_at": (
        lambda at: isinstance(at, tuple) and all(map(_positive, at)) and sorted(at) == [*at],
        "numbers above 0 in ascending order, such as (8, 11) or ()",
    ),
    "optim.decay_factor": (lambda f: _positive(f) and f >= 1, "a divisor of at least 1"),
    "optim.unit": _one_of("epoch", "step"),
    "train.batch_size": ONE,
    "train.microbatch": ONE,
    "train.epochs": (_non_negative, "a number above 0, or 0 where train.steps is given"),
    "train.steps": (_count, "a whole number above 0, or 0 where train.epochs is given"),
    "train.log_every": ONE,
    "train.eval_every": (_count, "a number of steps, or 0 for at the end only"),
    "train.checkpoint_every": ONE,
    "train.keep": ONE,
    "eval.batch_size": ONE,
    "eval.instance_threshold": (_share, "a score between 0 and 1"),
    "eval.overlap_threshold": (_share, "a share between 0 and 1"),
    "eval.num_pictures": ZERO,
}
"""Keys that every config has, the test of their values, and what is accepted in words."""


def validate(config: ConfigDict, num_devices: int = 1) -> None:
    """Checks the values of a config, whoever wrote them.

    Args:
      config: from `load_config` or `load_saved_config`.
      num_devices: among which the batch is divided.

    Raises:
      ConfigError: a key is missing or a value makes no sense.
    """
    values = flatten_dict(to_tuples(config.to_dict()), sep=".")
    for key, (test, accepted) in RULES.items():
        if key not in values:
            raise ConfigError(f"config.{key} is missing; accepted: {accepted}")
        if not test(values[key]):
            raise ConfigError(f"config.{key} is {values[key]!r}; accepted: {accepted}")
    parse_groups(config.optim.groups)

    if not (config.train.epochs or config.train.steps):
        raise ConfigError("config.train.epochs and config.train.steps are both 0; give one")
    for part in "train", "eval":
        if config[part].batch_size % num_devices:
            raise ConfigError(
                f"config.{part}.batch_size is {config[part].batch_size}; accepted: "
                f"multiples of the {num_devices} devices"
            )
    share = config.train.batch_size // num_devices
    if share % min(share, config.train.microbatch):
        raise ConfigError(
            f"config.train.microbatch is {config.train.microbatch}; accepted: a divisor of the "
            f"{share} images that each device gets of a batch"
        )
    frozen = config.model.backbone.frozen_stages
    path = f"backbone/layer{frozen}_block0/conv1/kernel"
    groups = parse_groups(config.optim.groups)
    group = next((group for group in groups if re.fullmatch(group.pattern, path)), None)
    if frozen and group and group.lr:
        raise ConfigError(
            f"config.optim.groups: {group.name!r} trains layer{frozen} of the backbone, which "
            f"config.model.backbone.frozen_stages={frozen} freezes"
        )
    if config.data.max_things > config.model.num_proposals:
        raise ConfigError(
            f"config.data.max_things is {config.data.max_things}; accepted: at most "
            f"config.model.num_proposals, {config.model.num_proposals}, one kernel a thing"
        )
    if config.model.channels % config.model.num_heads:
        raise ConfigError(
            f"config.model.channels is {config.model.channels}; accepted: "
            f"multiples of config.model.num_heads, {config.model.num_heads}"
        )
