"""The networks of the paper at full width, by shapes alone."""

import re
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from knet_jax.config.files import load_config
from knet_jax.data import recipes
from knet_jax.data.annotations import by_task
from knet_jax.data.canvas import empty_batch
from knet_jax.matching import LossWeights
from knet_jax.model import make_model
from knet_jax.saved import checkpoint_record
from knet_jax.segmentation.segments import Categories
from knet_jax.tasks import TASKS
from knet_jax.training import optim, train_step

TABLE = (Path(__file__).parents[1] / "docs" / "models.md").read_text()
KIND = r"\w+_(?:panoptic|instance|semantic)"
ROWS = sorted(set(re.findall(rf"`(?:configs/)?({KIND})(?:\.py)?(:[\w,]+)?`", TABLE)))
"""The networks of the paper, as the documentation lists them: config and variants."""
SHALLOW = ("model.backbone.depths", (1, 1, 1, 1))
"""More blocks are more of the same, and take long to trace; `parity.py` counts those of all rows."""
WITHOUT = {"model.adaptive_update": "update/", "model.kernel_interaction": "interaction/"}
"""Flags, and the layers of a stage that are gone without them."""
MORE = [
    *((f"ade20k_semantic:{name}baseline",) for name in ("", "psp,", "deeplabv3,", "uper,")),
    *((f"ade20k_semantic:{name},wide",) for name in ("uper", "swin_t")),
    ("cityscapes_semantic",),
    ("coco_semantic",),
    ("coco_instance", *((flag, False) for flag in WITHOUT)),
]
"""What it mentions besides: a config with its variants, and changes."""


def every_network():
    """A spec and changes for every network that differs in more than in how often a layer comes."""
    found = {}
    for spec, *changes in [("".join(row),) for row in ROWS] + MORE:
        model = load_config(spec).model
        shallow = ("model.backbone.depth", 1) if "depth" in model.backbone else SHALLOW
        changes += [shallow, ("model.num_stages", min(1, model.num_stages))]
        found.setdefault(load_config(spec, dict(changes)).model.to_json(), (spec, *changes))
    return found.values()


@cache
def network(spec, *changes):
    """Config, model, and the shapes of its output for a picture of 64 pixels and of its variables."""
    config = load_config(spec, dict(changes))
    model = make_model(**config.model)
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    return config, model, *jax.eval_shape(model.init_with_output, jax.random.key(0), image)


def batch_of(config, num_images):
    """A batch of empty pictures on the config's own canvas."""
    recipe = recipes.find(config.task, config.data)
    [canvas, *_] = recipe.train_canvases
    num_classes = config.model.num_things + config.model.num_stuff
    names = tuple(map(str, range(num_classes)))
    categories = Categories(names, tuple(range(num_classes)), config.model.num_things)
    targets = by_task.KINDS[config.task](categories).empty(recipe, 0, num_images)
    return empty_batch(num_images, canvas)._replace(targets=targets)


def count(params):
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def layers_of(stage):
    """Layers of a stage's parameters, such as update/output."""
    return {"/".join(path.split("/")[:2]) for path in checkpoint_record.leaf_paths(stage)}


def test_the_documentation_lists_the_networks_of_the_paper():
    assert len(ROWS) >= 14
    assert len(every_network()) >= 20


def small(*changes):
    """Parameters of an instance network with a shallow backbone and one update."""
    changes = (SHALLOW, ("model.num_stages", 1), *changes)
    return network("coco_instance", *changes)[-1]["params"]


def test_flags_of_the_ablation_take_away_their_layers():
    everything = layers_of(small()["stage1"])
    for flag, prefix in WITHOUT.items():
        gone = {layer for layer in everything if layer.startswith(prefix)}
        assert gone and layers_of(small((flag, False))["stage1"]) == everything - gone


def test_coordinates_are_two_channels_more_of_a_convolution():
    assert count(small(("model.neck.sine", False))) == count(small())
    coordinates = small(("model.neck.coordinates", True))
    assert count(coordinates) - count(small()) == 3 * 3 * 2 * 256


@pytest.mark.slow
@pytest.mark.parametrize("spec", every_network(), ids=lambda spec: spec[0])
def test_the_whole_step_at_full_width(spec):
    """Two pictures on one device, from the batch to the next state."""
    config, model, output, variables = network(*spec)
    task, params, sizes = TASKS[config.task], variables["params"], config.model
    assert len(output.stages) == 1 + sizes.num_stages
    for stage in output.stages:
        num_kernels = sizes.num_proposals + sizes.num_stuff
        assert stage.kernels.shape == (1, num_kernels, sizes.channels)
        assert stage.masks.shape[:2] == (1, num_kernels)
    optimizer, _ = optim.make_optimizer(config.optim, params, 100, config.train.batch_size)
    step = train_step.make_train_step(
        jax.devices()[:1],
        model=model,
        task=task,
        optimizer=optimizer,
        trainable=optim.trainable(config.optim.groups, params),
        weights=LossWeights(**config.loss),
        seed=0,
    )
    state = train_step.TrainState(
        jax.ShapeDtypeStruct((), jnp.int32),
        params,
        variables.get("batch_stats", {}),
        jax.eval_shape(optimizer.init, params),
    )
    batch = jax.tree.map(lambda x: x[None], batch_of(config, 2))
    after, metrics = jax.eval_shape(step, state, [batch])
    shape = partial(jax.tree.map, lambda x: (x.shape, x.dtype))
    assert shape(after) == shape(state)
    stages = {name.split("/")[1] for name in metrics if name.startswith("loss/stage")}
    assert stages == {f"stage{s}" for s in range(1, config.model.num_stages + 1)}
    assert all(value.shape == () for value in metrics.values())
