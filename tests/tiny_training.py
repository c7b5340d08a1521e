"""Configs, one a task, whose training compiles in seconds."""

import jax
import jax.numpy as jnp
import numpy as np
import tiny_runs

from knet_jax.config.files import load_config
from knet_jax.model import variable_shapes
from knet_jax.training import evaluation, loop, train_step

SHARED = {
    "data.num_train": 8,
    "data.num_val": 4,
    "data.image_side": (64, 64),  # squares: one program for all pictures
    "model.channels": 8,
    "model.ffn_channels": 8,
    "model.num_heads": 2,
    "model.num_stages": 1,
    "model.backbone.width": 4,
    # Without the gradient of a backbone most of the compilation is gone.
    "model.backbone.norm": "frozen_batch",
    "model.backbone.frozen_stages": 4,
    "optim.groups": (("frozen", r"backbone/.*", 0.0, 0.0), ("head", r".*", 1.0, 1.0)),
    "optim.lr": 0.01,
    "optim.warmup_steps": 0,
    "train.steps": 6,
    "train.ema_decay": 0.2,  # reached at the third step: before it, (1 + t) / (10 + t) is less
    "train.log_every": 1,
    "train.eval_every": 3,
    "train.checkpoint_every": 2,
    "eval.batch_size": 4,
    "eval.num_pictures": 2,
    "eval.analysis": 0,
}
WITH_THINGS = {
    "data.canvas": (64, 64),
    "data.short_side": (64, 64),
    "data.long_side": 64,
    "data.max_things": 6,
    "model.num_proposals": 8,
}
OF_TASKS = {
    "panoptic": WITH_THINGS | {"eval.instance_threshold": 0.0, "eval.overlap_threshold": 0.0},
    "instance": WITH_THINGS | {"eval.num_results": 20},
    "semantic": {
        "data.scale": (64, 64),
        "data.crop": (64, 64),
        "data.eval_multiple": 64,
        "model.auxiliary_channels": 0,
        "model.dropout": 0.5,
        "model.neck.norm": "batch",  # running statistics, which a run must keep
    },
}


def overrides_of(task, data_dir, **changes):
    """What a tiny run of a task has otherwise than `shapes_TASK:tiny`."""
    return SHARED | OF_TASKS[task] | {"data.data_dir": str(data_dir)} | changes


def config_of(task, data_dir, **changes):
    """The config of a run of a task, with changes such as `{"train.steps": 2}`."""
    return load_config(f"shapes_{task}:tiny", overrides_of(task, data_dir, **changes))


# Programs and first weights, shared by the runs of a process.

_SHARED: dict = {}


def _once(key, make):
    if key not in _SHARED:
        _SHARED[key] = make()
    return _SHARED[key]


def variables_of(model, seed=0):
    """Variables of a network that need no compilation."""
    shapes = _once(("shapes", repr(model)), lambda: variable_shapes(model))
    variables = tiny_runs.random_variables(shapes, np.random.default_rng(seed))
    return jax.tree.map(jnp.asarray, variables)


def share_programs(monkeypatch):
    """Lets all runs of equal networks in this process share what they compile."""
    make_train_step, make_evaluator = train_step.make_train_step, evaluation.Evaluator

    def shared_step(devices, **given):
        key = (repr(given["model"]), given["task"].loss, given["ema_decay"])
        return _once(key, lambda: make_train_step(devices, **given))

    def shared_evaluator(model, split, config, devices, limit=None, inside=0):
        made = make_evaluator(model, split, config, devices, limit, inside)
        key = (repr(model), inside > 0, str(dict(config.eval) | {"analysis": 0}))
        programs = made._look, made._predict, made._observe
        made._look, made._predict, made._observe = _once(key, lambda: programs)
        return made

    monkeypatch.setattr(loop, "init_variables", variables_of)
    monkeypatch.setattr(train_step, "make_train_step", shared_step)
    for module in (loop, evaluation):
        monkeypatch.setattr(module, "Evaluator", shared_evaluator)
