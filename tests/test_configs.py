"""The whole train step of every network of the paper at full size, by shapes alone."""

import json
import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from parity import RECIPES

from knet_jax.config.files import load_config
from knet_jax.data.annotations import by_task
from knet_jax.matching import LossWeights
from knet_jax.model import make_model
from knet_jax.nn.layers import AXIS
from knet_jax.saved import checkpoint_record
from knet_jax.segmentation.segments import Categories
from knet_jax.structs import Batch
from knet_jax.tasks import TASKS
from knet_jax.training import optim, train_step

ROOT = Path(__file__).parents[1]
TABLE = (ROOT / "docs" / "models.md").read_text()
ROWS = sorted(set(re.findall(r"`(configs/\w+\.py[:\w,]*)`", TABLE)))
"""The networks of the paper, as the documentation lists them."""
DECODERS = ("", "psp,", "deeplabv3,", "uper,", "swin_t,", "swin_l,", "swin_l_640,")
MORE = [
    *((f"configs/ade20k_semantic.py:{name}baseline",) for name in DECODERS),
    ("configs/ade20k_semantic.py:uper,wide",),
    ("configs/ade20k_semantic.py:swin_t,wide",),
    ("configs/ade20k_semantic.py:swin_l,wide",),
    ("configs/cityscapes_semantic.py",),
    ("configs/coco_semantic.py",),
    ("configs/coco_instance.py:r101,n256",),
    ("configs/coco_instance.py", "model.adaptive_update=False"),
    ("configs/coco_instance.py", "model.kernel_interaction=False"),
    (
        "configs/coco_instance.py",
        "model.adaptive_update=False",
        "model.kernel_interaction=False",
    ),
    ("configs/coco_instance.py", "model.neck.sine=False"),
    ("configs/coco_instance.py", "model.neck.coordinates=True"),
]
"""What it mentions besides: a config with its variants, and flags."""
ABLATED = {
    "model.adaptive_update=False": {
        f"update/{name}"
        for name in ("from_kernel", "from_pixels", "output", "output_norm")
        + tuple(
            f"{of}_{part}" for of in ("kernel", "pixel") for part in ("gate", "gate_norm", "norm")
        )
    },
    "model.kernel_interaction=False": {
        f"interaction/{name}"
        for name in ("attention", "attention_norm", "ffn_hidden", "ffn_norm", "ffn_output")
    },
}
"""The layers of a stage that a flag takes away."""


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(ROOT)


def network(spec, *flags):
    """Config, model, and the shapes of its output for a picture of 64 pixels and of its variables."""
    config = load_config(spec, [f"--config.{flag}" for flag in flags])
    model = make_model(**config.model)
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    return config, model, *jax.eval_shape(model.init_with_output, jax.random.key(0), image)


def batch_of(config, count):
    """A batch of empty pictures on the config's own canvas."""
    kind = by_task.find(config.task)
    recipe = kind.recipe(config.data)
    canvas = recipe.train_canvas(0)
    num_classes = config.model.num_things + config.model.num_stuff
    names = tuple(map(str, range(num_classes)))
    categories = Categories(names, tuple(range(num_classes)), config.model.num_things)
    sizes = np.tile(np.int32([canvas]), (count, 1))
    image = np.zeros((count, *canvas, 3), np.uint8)
    targets = kind.empty(recipe, categories, count, canvas)
    return Batch(image, targets, sizes, sizes, np.arange(count, dtype=np.int32))


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def layers_of(stage):
    """Layers of a stage's parameters, such as update/output."""
    return {"/".join(path.split("/")[:2]) for path in checkpoint_record.leaf_paths(stage)}


def test_the_documentation_lists_the_networks_of_the_paper():
    assert len(ROWS) >= 14


@pytest.mark.parametrize("spec", MORE, ids=" ".join)
def test_more_networks_at_full_size(spec):
    """Kernels, masks and classes of every stage, and which layers there are."""
    config, _, output, variables = network(*spec)
    sizes, params = config.model, variables["params"]
    num_kernels = sizes.num_proposals + sizes.num_stuff
    num_classes = sizes.num_things + sizes.num_stuff
    assert len(output.stages) == 1 + sizes.num_stages
    for stage in output.stages:
        assert stage.kernels.shape == (1, num_kernels, sizes.channels)
        assert stage.masks.shape[:2] == (1, num_kernels)
    if sizes.num_proposals:
        assert all(s.logits.shape == (1, num_kernels, num_classes) for s in output.stages[1:])
    stages = {name for name in params if re.fullmatch(r"stage\d+", name)}
    assert stages == {f"stage{s}" for s in range(1, 1 + sizes.num_stages)}
    for stage in stages:
        for flag, layers in ABLATED.items():
            assert layers_of(params[stage]) & layers == (set() if flag in spec else layers)


@pytest.mark.parametrize(
    "spec", [row[0] for row in MORE if len(row) == 1 and row[0][8:] in RECIPES.values()]
)
def test_more_networks_have_the_parameters_of_the_reference(spec, fixtures):
    models = json.loads((fixtures / "model_sizes.json").read_text())["models"]
    [name] = [name for name, recipe in RECIPES.items() if f"configs/{recipe}" == spec]
    assert count(network(spec)[-1]["params"]) == models[name]["params"]


def test_parameters_that_a_change_adds_are_those_of_the_reference(fixtures):
    """256 kernels on ResNet-101, as on ResNet-50; coordinates, two channels more of a convolution."""
    models = json.loads((fixtures / "model_sizes.json").read_text())["models"]
    r101, n256, r50 = (
        models[f"knet_s3_{name}"]["params"]
        for name in ("r101_fpn_ms-3x_coco", "r50_fpn_1x_coco_N256", "r50_fpn_1x_coco")
    )
    for spec, wanted in {
        ("configs/coco_instance.py:r101,n256",): r101 + n256 - r50,
        ("configs/coco_instance.py", "model.neck.sine=False"): r50,
        ("configs/coco_instance.py", "model.neck.coordinates=True"): r50 + 3 * 3 * 2 * 256,
    }.items():
        assert count(network(*spec)[-1]["params"]) == wanted, spec


SHALLOW = "model.backbone.depths=(1, 1, 1, 1)"
"""Backbones at full depth have a row of the tables."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "spec", [*((row,) for row in ROWS), *((*row, SHALLOW) for row in MORE)], ids=" ".join
)
def test_the_whole_step_at_full_size(spec):
    """Two pictures on one device, from the batch to the next state."""
    config, model, _, variables = network(*spec)
    task, params = TASKS[config.task], variables["params"]
    optimizer, _ = optim.make_optimizer(config.optim, params, 100, config.train.batch_size)
    trainable = optim.trainable(config.optim.groups, params)

    def step(state, part, key):
        counts = train_step.count_targets(part, task=task, sizes=model.sizes)
        zeros = jax.tree.map(jnp.zeros_like, state.params)
        grads, batch_stats, judgement = train_step.accumulate(
            zeros,
            state.params,
            state.batch_stats,
            part,
            counts,
            key,
            model=model,
            task=task,
            weights=LossWeights(**config.loss),
        )
        return train_step.update(
            state,
            grads,
            batch_stats,
            (judgement,),
            optimizer=optimizer,
            trainable=trainable,
            ema_decay=0.0,
        )

    state = train_step.TrainState(
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
