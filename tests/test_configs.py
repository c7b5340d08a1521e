"""The whole train step of every network of the paper at full size, by shapes alone."""

import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from knet_jax import optim, training
from knet_jax.configuration import load_config
from knet_jax.data import kinds
from knet_jax.layers import AXIS
from knet_jax.matching import Weights
from knet_jax.model import make_model
from knet_jax.segments import Categories
from knet_jax.structs import Batch
from knet_jax.tasks import TASKS

ROOT = Path(__file__).parents[1]
TABLE = (ROOT / "docs" / "models.md").read_text()
ROWS = sorted(set(re.findall(r"`(configs/\w+\.py[:\w,]*)`", TABLE)))
"""The networks of the paper, as the documentation lists them."""


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(ROOT)


def network(spec):
    config = load_config(spec)
    model = make_model(**config.model)
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    return config, model, jax.eval_shape(model.init, jax.random.key(0), image)


def batch_of(config, count):
    """A batch of empty pictures on the config's own canvas."""
    kind = kinds.find(config.task)
    recipe = kind.recipe(config.data)
    canvas = recipe.train_canvas(0)
    num_classes = config.model.num_things + config.model.num_stuff
    names = tuple(map(str, range(num_classes)))
    categories = Categories(names, tuple(range(num_classes)), config.model.num_things)
    sizes = np.tile(np.int32([canvas]), (count, 1))
    image = np.zeros((count, *canvas, 3), np.uint8)
    targets = kind.empty(recipe, categories, count, canvas)
    return Batch(image, targets, sizes, sizes, np.arange(count, dtype=np.int32))


@pytest.mark.slow
@pytest.mark.parametrize("spec", ROWS)
def test_the_whole_step_at_full_size(spec):
    """Two pictures on one device, from the batch to the next state."""
    assert len(ROWS) >= 14
    config, model, variables = network(spec)
    task, params = TASKS[config.task], variables["params"]
    optimizer, _ = optim.make_optimizer(config.optim, params, 100, config.train.batch_size)
    trainable = optim.trainable(config.optim.groups, params)

    def step(state, part, key):
        counts = training.count_targets(part, task=task, sizes=model.sizes)
        zeros = jax.tree.map(jnp.zeros_like, state.params)
        grads, batch_stats, judgement = training.accumulate(
            zeros,
            state.params,
            state.batch_stats,
            part,
            counts,
            key,
            model=model,
            task=task,
            weights=Weights(**config.loss),
        )
        return training.update(
            state,
            grads,
            batch_stats,
            (judgement,),
            optimizer=optimizer,
            trainable=trainable,
            ema_decay=0.0,
        )

    state = training.TrainState(
        jax.ShapeDtypeStruct((), jnp.int32),
        params,
        variables.get("batch_stats", {}),
        jax.eval_shape(optimizer.init, params),
    )
    everywhere = PartitionSpec()
    on_one_device = partial(
        jax.shard_map,
        mesh=Mesh(jax.devices()[:1], (AXIS,)),
        in_specs=everywhere,
        out_specs=everywhere,
        check_vma=False,
    )
    after, metrics = jax.eval_shape(
        on_one_device(step), state, batch_of(config, 2), jax.random.key(0)
    )
    shape = partial(jax.tree.map, lambda x: (x.shape, x.dtype))
    assert shape(after) == shape(state)
    stages = {name.split("/")[1] for name in metrics if name.startswith("loss/stage")}
    assert stages == {f"stage{s}" for s in range(1, config.model.num_stages + 1)}
    assert all(value.shape == () for value in metrics.values())
