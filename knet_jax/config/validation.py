"""Whether the values of a config make sense, each by itself and together."""

from __future__ import annotations

from collections.abc import Sequence

from ml_collections import ConfigDict

from knet_jax.config import schema
from knet_jax.config.rules import STRIDE
from knet_jax.system.errors import UserError


def check_data(config: ConfigDict) -> None:
    """Checks a config as far as preparing its dataset needs: every value by itself, and its data.

    Raises:
        UserError: a key is missing or unknown, or a value makes no sense.
    """
    schema.check(schema.flatten(config))
    if config.task != "semantic":
        data = config.data
        if None in (data.canvas, data.short_side, data.long_side):
            return  # a training fills them in
        if data.short_side[1] > data.canvas[0] or data.long_side > data.canvas[1]:
            raise UserError(
                f"config.data.short_side {data.short_side} and long_side {data.long_side} "
                f"do not fit into config.data.canvas {data.canvas}"
            )


def validate(
    config: ConfigDict, num_devices: int = 1, parts: Sequence[str] = ("train", "eval")
) -> None:
    """Checks all values of a config.

    Args:
        config: from `load_config` or `load_saved_config`.
        num_devices: among which a batch is divided.
        parts: what is to be run, and must fit the devices.

    Raises:
        UserError: a key is missing or unknown, or a value makes no sense.
    """
    check_data(config)
    for section in ("model", "data", "eval") if "train" not in parts else ():
        for key, value in schema.flatten(config[section]).items():
            if value is None:
                raise UserError(f"config.{section}.{key} is None, which a training alone fills in")
    _check_batches(config, num_devices, parts)
    model = config.model
    if model.kernel_interaction and model.channels % model.num_heads:
        raise UserError(
            f"config.model.channels is {model.channels}; accepted: "
            f"multiples of config.model.num_heads, {model.num_heads}"
        )
    _check_window(config)
    if config.task == "semantic":
        return
    if config.data.max_things > model.num_proposals:
        raise UserError(
            f"config.data.max_things is {config.data.max_things}; accepted: at most "
            f"config.model.num_proposals, {model.num_proposals}, one kernel a thing"
        )


def _check_batches(config: ConfigDict, num_devices: int, parts: Sequence[str]) -> None:
    train = config.train
    if not (train.epochs or train.steps):
        raise UserError("config.train.epochs and config.train.steps are both 0; give one")
    for part in parts:
        if config[part].batch_size % num_devices:
            raise UserError(
                f"config.{part}.batch_size is {config[part].batch_size}; accepted: "
                f"multiples of the {num_devices} devices"
            )
    per_device = train.batch_size // num_devices
    if "train" in parts and per_device % min(per_device, train.microbatch):
        raise UserError(
            f"config.train.microbatch is {train.microbatch}; accepted: a divisor of the "
            f"{per_device} images that each device gets of a batch"
        )


def _check_window(config: ConfigDict) -> None:
    window, step = config.eval.window, config.eval.window_step
    if len(step) != len(window) or any(move > side for move, side in zip(step, window)):
        raise UserError(
            f"config.eval.window_step is {step}; accepted where config.eval.window is {window}: "
            + ("(height, width) of at most these, so that no pixel is left out" if window else "()")
        )
    multiple = config.data.eval_multiple
    if config.task == "semantic" and window and multiple % STRIDE:
        raise UserError(
            f"config.data.eval_multiple is {multiple}; accepted with config.eval.window: multiples "
            f"of {STRIDE}, so that windows meet at the pixels of the masks"
        )
