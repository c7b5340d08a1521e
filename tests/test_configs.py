"""Every config at full size: its values, its network, and its whole train step, by shapes alone."""

import json
import re
import runpy
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
from knet_jax.knet import make_model
from knet_jax.layers import AXIS
from knet_jax.matching import Weights
from knet_jax.structs import Batch, Categories
from knet_jax.tasks import TASKS
from knet_jax.validation import validate

ROOT = Path(__file__).parents[1]
FILES = sorted(path.relative_to(ROOT) for path in (ROOT / "configs").glob("*.py"))
SPECS = [
    f"{path}:{variant}"
    for path in FILES
    for variant in ("", *runpy.run_path(str(ROOT / path)).get("VARIANTS", {}))
]
ROWS = sorted(set(re.findall(r"`(configs/\w+\.py[:\w,]*)`", (ROOT / "docs/models.md").read_text())))
"""The networks of the paper, as the documentation lists them."""

# The reference's name of each row, and what it is called in its table of sizes.
SIZES = {
    "configs/coco_panoptic.py": "knet_s3_r50_fpn_1x_coco-panoptic",
    "configs/coco_panoptic.py:ms3x": "knet_s3_r50_fpn_ms-3x_coco-panoptic",
    "configs/coco_panoptic.py:r101,ms3x": "knet_s3_r101_fpn_ms-3x_coco-panoptic",
    "configs/coco_panoptic.py:r101_dcn,ms3x": "knet_s3_r101_dcn-c3-c5_fpn_ms-3x_coco-panoptic",
    "configs/coco_panoptic.py:swin_l,ms3x": "knet_s3_swin-l_fpn_ms-3x_16x2_coco-panoptic",
    "configs/coco_instance.py": "knet_s3_r50_fpn_1x_coco",
    "configs/coco_instance.py:ms3x": "knet_s3_r50_fpn_ms-3x_coco",
    "configs/coco_instance.py:n256,ms3x": "knet_s3_r50_fpn_1x_coco_N256",
    "configs/coco_instance.py:r101,ms3x": "knet_s3_r101_fpn_ms-3x_coco",
    "configs/coco_instance.py:r101_dcn,ms3x": "knet_s3_r101_dcn-c3-c5_fpn_ms-3x_coco",
    "configs/ade20k_semantic.py": "knet_s3_fcn_r50-d8_80k_adamw_ade20k",
    "configs/ade20k_semantic.py:psp": "knet_s3_pspnet_r50-d8_80k_adamw_ade20k",
    "configs/ade20k_semantic.py:deeplabv3": "knet_s3_deeplabv3_r50-d8_80k_adamw_ade20k",
    "configs/ade20k_semantic.py:uper": "knet_s3_upernet_r50-d8_80k_adamw_ade20k",
    "configs/ade20k_semantic.py:uper,wide": "knet-s3_r50-d8_upernet, 512 channels",
    "configs/ade20k_semantic.py:swin_t": "knet_s3_upernet_swin-t_80k_adamw_ade20k",
    "configs/ade20k_semantic.py:swin_t,wide": "knet-s3_swin-t_upernet, 512 channels",
    "configs/ade20k_semantic.py:swin_l": "knet_s3_upernet_swin-l_80k_adamw_ade20k",
    "configs/ade20k_semantic.py:swin_l_640": "knet_s3_upernet_swin-l_80k_adamw_640x640_ade20k",
}


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(ROOT)


def network(spec):
    config = load_config(spec)
    model = make_model(**config.model)
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    return config, model, jax.eval_shape(model.init, jax.random.key(0), image)


@pytest.mark.parametrize("spec", SPECS)
def test_values_are_valid_and_groups_cover_the_network(spec):
    config, _, variables = network(spec)
    validate(config, 1)
    optim.trainable(config.optim.groups, variables["params"])  # raises where one is not covered


def test_every_row_of_the_documentation_is_here():
    assert {row.removesuffix(":") for row in ROWS} <= set(SIZES) | {
        "configs/coco_instance.py:r101,n256,ms3x"
    }


@pytest.mark.parametrize("spec", SIZES)
def test_sizes_are_the_references(fixtures, spec):
    models = json.loads((fixtures / "model_sizes.json").read_text())["models"]
    [wanted] = [model for name, model in models.items() if name.split(" (")[0] == SIZES[spec]]
    config, _, variables = network(spec)
    sizes = jax.tree.map(lambda x: x.size, variables["params"])
    assert sum(jax.tree.leaves(sizes)) == wanted["params"]
    if "params_without_aux" in wanted:
        del sizes["auxiliary"]
        assert sum(jax.tree.leaves(sizes)) == wanted["params_without_aux"]
    if "trainable" in wanted:
        mask = optim.trainable(config.optim.groups, variables["params"])
        trained = jax.tree.map(lambda x, moves: x.size * moves, variables["params"], mask)
        assert sum(jax.tree.leaves(trained)) == wanted["trainable"]


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
@pytest.mark.parametrize("spec", [spec for spec in SIZES if "ms3x" not in spec or "," in spec])
def test_the_whole_step_at_full_size(spec):
    """Two pictures on one device, from the batch to the next state."""
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
