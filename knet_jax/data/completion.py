"""What follows from the data: values that a config leaves to them, and doubts about the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from knet_jax.config.files import SAVED_NAME, load_saved_config
from knet_jax.config.rules import STRIDE
from knet_jax.config.schema import decay_steps
from knet_jax.data import pipeline, recipes
from knet_jax.data.prepared_split import Split
from knet_jax.segmentation.class_lists import class_counts

MOST_PASSES = 500
"""A run that shows every picture more often is doubted; the longest recipe, of Cityscapes, does 430 times."""
MOST_ENLARGED = 2.0
"""Pictures that become larger than so many times their sides are doubted; COCO's become 1.7 times."""


def complete(config: ConfigDict, split: Split) -> ConfigDict:
    """Gives a value to each key of a config that is None.

    Args:
        config: for a training.
        split: what is trained on.

    Returns:
        A copy of the config. Pictures keep their size unless that is beyond the paper's recipes.
    """
    config = config.copy_and_resolve_references()
    model, data, optim, train = config.model, config.data, config.optim, config.train
    has_things = config.task != "semantic"
    _set(model, **class_counts(config, split.categories))

    if not config.init_weights:
        norms = {"backbone": "group", "neck": "group"}
    elif (Path(config.init_weights) / SAVED_NAME).is_file():
        initial = load_saved_config(config.init_weights).model
        norms = {part: initial[part].get("norm", "group") for part in ("backbone", "neck")}
    else:
        norms = {"backbone": "frozen_batch" if has_things else "batch", "neck": "batch"}
    for part, norm in norms.items():
        _set(model[part], norm=norm)

    short, long = np.sort(split.sizes).T
    if has_things:
        side = min(800, int(np.median(short)))
        _set(data, short_side=(round(0.8 * side), side))
        side = data.short_side[1]
        _set(data, long_side=round(side * min(1333 / 800, np.quantile(long / short, 0.95))))
        _set(data, canvas=(_round_up(side), max(_round_up(side), _round_up(data.long_side))))
    else:
        side = min(512, int(np.median(short)))
        _set(data, scale=(4 * side, side))
        _set(data, crop=(_round_up(data.scale[1]),) * 2)

    epoch, total = lengths(config, split)
    _set(optim, warmup_steps=min(1000, total // 20))
    if optim.decay_at is None:
        optim.unit = "step"
        optim.decay_at = tuple(max(1, round(total * share)) for share in (2 / 3, 11 / 12))
    _set(train, eval_every=epoch)
    return config


def lengths(config: ConfigDict, split: Split) -> tuple[int, int]:
    """How many steps an epoch has, and the run."""
    epoch = pipeline.steps_per_epoch(split, config.data, config.train.batch_size)
    return epoch, config.train.steps or round(config.train.epochs * epoch)


def find_doubts(config: ConfigDict, split: Split) -> list[str]:
    """What of a config hardly fits the data, a sentence each, with the flags that mend it."""
    data, optim, train = config.data, config.optim, config.train
    epoch, total = lengths(config, split)
    doubts = []
    if optim.warmup_steps >= total:
        doubts.append(
            f"the warm-up takes {optim.warmup_steps} steps, and the run {total}; "
            "--config.optim.warmup_steps=None makes it a twentieth"
        )
    first = min(decay_steps(optim, epoch), default=0)
    if first >= total:
        doubts.append(
            f"the learning rate would fall first at step {first}, and the run has {total}; "
            "--config.optim.decay_at=None lets it fall at 2/3 and 11/12"
        )
    if train.eval_every > total:
        doubts.append(
            f"config.train.eval_every is {train.eval_every}, and the run has {total} steps; "
            "--config.train.eval_every=None evaluates every epoch"
        )
    if total > MOST_PASSES * epoch:
        doubts.append(
            f"{total} steps show each of {len(split)} pictures {total // epoch} times; "
            "--config.train.steps=0 --config.train.epochs=50 --config.optim.decay_at=None "
            "is a usual length"
        )
    size = np.median(split.sizes, axis=0)
    shown = recipes.find(config.task, data).eval_size(tuple(size.astype(int)))
    if shown[0] > MOST_ENLARGED * size[0]:
        keys = (
            ("scale", "crop")
            if config.task == "semantic"
            else ("canvas", "short_side", "long_side")
        )
        doubts.append(
            f"pictures of {size[1]:.0f}x{size[0]:.0f} are enlarged to {shown[1]}x{shown[0]}; "
            + " ".join(f"--config.data.{key}=None" for key in keys)
            + " leaves them as they are"
        )
    backbone = config.model.backbone
    is_frozen = backbone.get("norm") == "frozen_batch" or backbone.get("frozen_stages")
    if is_frozen and not config.init_weights:
        doubts.append(
            "norms or stages of the backbone stay frozen at random values without "
            "config.init_weights; --config.model.backbone.norm=group "
            "--config.model.backbone.frozen_stages=0 "
            "--config.optim.groups=\"(('all', '.*', 1.0, 1.0),)\" trains all"
        )
    return doubts


def _set(part: ConfigDict, **values: Any) -> None:
    """Sets those keys that a part of a config has as None."""
    for name, value in values.items():
        if name in part and part[name] is None:
            part[name] = value


def _round_up(side: float) -> int:
    return -(-int(side) // STRIDE) * STRIDE
