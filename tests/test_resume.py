"""Every kind of network, made tiny: stopped after a step and resumed, the next step is the one that
would have come, bit for bit."""

import jax
import numpy as np
import pytest
import tiny_coco
import tiny_maps
from tiny_training import variables_of

from knet_jax.config.files import load_config
from knet_jax.config.validation import validate
from knet_jax.data import pipeline
from knet_jax.matching import LossWeights
from knet_jax.model import UPDATE_CHANNELS, make_model
from knet_jax.saved.checkpoints import Checkpoints
from knet_jax.tasks import TASKS
from knet_jax.training import optim, train_step

EMA, REMAT = "--config.train.ema_decay=0.9", "--config.model.backbone.remat=True"

ROWS = [
    ("coco_panoptic:r101_dcn", EMA, REMAT),
    ("coco_instance:swin_t,bf16", REMAT),
    ("ade20k_semantic:psp,bf16", EMA),
    ("ade20k_semantic:deeplabv3,baseline",),
    ("cityscapes_semantic:uper", EMA),
    ("folder_semantic:tiny_swin", REMAT),
]
"""A config with its variants, and flags: one of every dataset, backbone and neck."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """By dataset, `config.data` of a few pictures of each."""
    folder = tmp_path_factory.mktemp("data")
    coco = tiny_coco.write_instances(tiny_coco.write(folder / "coco"))
    datasets = {
        "ade20k": {"root": tiny_maps.write_ade20k(folder / "ade20k")},
        "cityscapes": {"root": tiny_maps.write_cityscapes(folder / "cityscapes")},
        "coco": {"root": coco},
        "folder": {"root": tiny_maps.write_folder(folder / "folder")},
        "shapes": {"root": "", "num_train": 8, "num_val": 4, "image_side": (64, 96)},
    }
    shared = {"data_dir": str(folder / "prepared"), "num_workers": 0}
    return {name: shared | keys | {"root": str(keys["root"])} for name, keys in datasets.items()}


def shrink(config, data):
    """Changes a config: a few narrow layers, 64 pixels, the given `config.data`."""
    sizes = {
        "canvas": (64, 64),
        "short_side": (40, 64),
        "long_side": 64,
        "max_things": 3,
        "scale": (96, 64),
        "crop": (64, 64),
    }
    sizes = {key: value for key, value in sizes.items() if key in config.data}
    config.data.update(sizes | data)
    model = config.model
    model.update(
        {
            "num_stages": min(1, model.num_stages),
            "channels": max(8, model.channels // 32),
            "num_heads": 2,
            "ffn_channels": 16,
            "num_proposals": -(-model.num_proposals // 8),
        }
    )
    if model.auxiliary_channels:
        model.auxiliary_channels = 8
    if model.backbone.get("name") == "swin":
        # Two blocks of a stage, the second with shifted windows.
        model.backbone.update({"channels": 8, "depths": (2, 1, 1, 1), "num_heads": (1, 1, 2, 2)})
    else:
        model.backbone.update({"depths": (1, 1, 1, 1), "width": 8})
    config.optim.warmup_steps = 0
    # In two parts, unless statistics are those of a part.
    config.train.update({"batch_size": 2, "microbatch": 2 if "batch" in norms_of(model) else 1})


def norms_of(model):
    """The norms that `config.model` names."""
    return {model[part].get("norm") for part in ("backbone", "neck") if part in model}


@pytest.mark.slow
@pytest.mark.parametrize("spec", ROWS, ids=" ".join)
def test_a_step_after_resuming_is_the_step_that_would_have_come(spec, data, tmp_path, monkeypatch):
    # 512 channels, 16 here, are updated in halves of 256.
    monkeypatch.setattr("knet_jax.model.UPDATE_CHANNELS", UPDATE_CHANNELS // 32)
    name, *overrides = spec
    config = load_config(name, overrides)
    shrink(config, data[config.data.dataset])
    split = pipeline.load_split(config.data, config.data.train_split, config.task)
    categories, size = split.categories, config.train.batch_size
    num_things = categories.num_things if config.model.num_proposals else 0
    config.model.update({"num_things": num_things, "num_stuff": len(categories.names) - num_things})
    validate(config)

    model, devices = make_model(**config.model), jax.devices()[:1]
    variables = jax.device_get(variables_of(model))
    params = variables["params"]
    optimizer, _ = optim.make_optimizer(config.optim, params, 10, size)
    ema = config.train.ema_decay
    start = train_step.TrainState(
        np.int32(0),
        params,
        variables.get("batch_stats", {}),
        jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), jax.eval_shape(optimizer.init, params)),
        jax.tree.map(np.copy, params) if ema else None,
    )
    template = jax.eval_shape(lambda: start)
    take_step = train_step.make_train_step(
        devices,
        model=model,
        task=TASKS[config.task],
        optimizer=optimizer,
        trainable=optim.trainable(config.optim.groups, params),
        weights=LossWeights(**config.loss),
        seed=config.seed,
        ema_decay=ema,
    )

    def batches(seen):
        stream = pipeline.train_batches(split, config.data, size, config.seed, seen)
        num_parts = size // config.train.microbatch
        return (train_step.to_devices(batch, devices, num_parts) for batch, _ in stream)

    stream = batches(0)
    first, _ = take_step(train_step.replicate(start, devices), next(stream))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, first, {"examples_seen": size})
    whole = jax.device_get(take_step(first, next(stream)))

    with Checkpoints(tmp_path) as checkpoints:
        saved, record = checkpoints.restore_latest(template)
    stream = batches(record["progress"]["examples_seen"])
    before = jax.device_get(saved)
    resumed = jax.device_get(take_step(train_step.replicate(saved, devices), next(stream)))

    jax.tree.map(np.testing.assert_array_equal, resumed, whole)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(whole))
    # Whatever is kept goes on from what was saved.
    for name, kept, after in zip(before._fields, before, whole[0]):
        moved = any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (kept, after))))
        still = {"ema": not ema, "batch_stats": "batch" not in norms_of(config.model)}
        assert moved != still.get(name, False), name
