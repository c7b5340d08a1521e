"""A thousand things in a picture, from the records to the numbers."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_training

from knet_jax.data import pipeline, recipes
from knet_jax.data.batches import train_batch
from knet_jax.data.sampler import EpochSampler
from knet_jax.data.sources import shapes
from knet_jax.inference.resampling import ResultCanvas
from knet_jax.knet import normalize
from knet_jax.matching import LossWeights
from knet_jax.model import make_model
from knet_jax.segmentation.result import Result
from knet_jax.structs import Pass, Stage
from knet_jax.tasks import TASKS

SIDE, CELL, COUNT = 96, 3, 1000


def draw(*_):
    """Things of 3 x 3 pixels side by side, and stuff in what is left of the last row of them."""
    rows, columns = np.indices((SIDE, SIDE)) // CELL
    number = rows * (SIDE // CELL) + columns
    slots = np.where(number < COUNT, 2 + number, 1)
    labels = [-1, len(shapes.THINGS), *(i % len(shapes.THINGS) for i in range(COUNT))]
    image = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    ids = 257 * np.arange(len(labels))
    return shapes.Drawing(image, slots, labels, set(), ids)


@pytest.fixture(params=["panoptic", "instance"])
def case(request, monkeypatch, tmp_path):
    """A task, its config and a split of one picture, written to records and read again."""
    monkeypatch.setattr(shapes, "draw", draw)
    changes = {"num_val": 1, "canvas": (192, 192), "short_side": (192, 192), "long_side": 192}
    changes |= {"max_things": COUNT, "flip": 0.0}
    changes = {f"data.{key}": value for key, value in changes.items()}
    changes["model.num_proposals"] = COUNT
    config = tiny_training.config_of(request.param, tmp_path, **changes)
    split = pipeline.load_split(config.data, "val", request.param)
    return TASKS[request.param], config, split


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "case, slots",
    [("panoptic", 300), slow("panoptic", COUNT), slow("instance", COUNT)],
    indirect=["case"],
)
def test_each_has_a_slot_a_kernel_and_a_loss(case, slots):
    task, config, split = case
    config.model.num_proposals = config.data.max_things = slots
    assert split.num_things.tolist() == [COUNT] and len(split.truth(0)) in (2, COUNT)
    recipe = recipes.find(config.task, config.data)
    epochs = EpochSampler(recipe.groups(split), 1, seed=0)
    [batch] = train_batch(split, recipe, epochs, slice(None), 0).batches
    labels = np.bincount(batch.targets.labels[0], minlength=5)
    assert labels[:5].tolist() == [slots // 5] * 5
    if config.task == "panoptic":
        assert batch.targets.segment_map.dtype == np.uint16
        assert {*range(1, 1 + slots)} < set(np.unique(batch.targets.segment_map).tolist())

    model = make_model(**config.model)

    @jax.jit
    def judge(variables, image, size, targets):
        output = model.apply(variables, normalize(image, size, jnp.float32))
        targets = task.unpack(targets)
        shown = (targets.things.masks > 0).any((2, 3)).sum()
        weights = LossWeights(**config.loss)
        return shown, task.loss(output, targets, task.count(targets), weights)

    variables = tiny_training.variables_of(model)
    shown, judgement = judge(variables, batch.image, batch.size, batch.targets)
    assert shown == slots
    assert all(np.isfinite(term) for term in judgement.terms.values())
    assert judgement.measures["matched"] >= 0


def test_each_is_found_and_counts(case):
    """By kernels that know the truth, with the canvas so large that a logit is a pixel."""
    task, config, split = case
    drawing, num_things, num_classes = draw(), len(shapes.THINGS), len(split.categories.names)
    kernels = [*range(2, 2 + COUNT), 1, -1, -1, -1][: COUNT + num_classes - num_things]
    owned = drawing.slots == np.array(kernels)[:, None, None]
    logits = np.full((len(kernels), num_classes), -9.0, np.float32)
    things = np.arange(COUNT)
    logits[things, things % num_things] = np.linspace(
        4, 3, COUNT
    )  # scores differ: there is an order
    stuff = np.arange(num_classes - num_things)
    logits[COUNT + stuff, num_things + stuff] = 2.0
    size, original_size = np.int32([[8 * SIDE, 8 * SIDE]]), np.int32([[SIDE, SIDE]])
    stage = Stage(None, np.float32(np.where(owned, 60, -60))[None], logits[None])
    seen = Pass(stage, size, size, np.zeros(1, bool))
    options = config.eval.to_dict() | {"num_results": COUNT}
    options = task.choose_options(make_model(**config.model).sizes, options)
    predict = partial(task.predict, **options, canvas=ResultCanvas.of(size, original_size))
    found = jax.jit(lambda seen: predict([seen], original_size))(seen)
    prediction = task.read(jax.tree.map(lambda x: np.asarray(x)[0], found), original_size[0])
    result = Result(config.task, split.categories, drawing.image, prediction)
    assert [s.label for s in result.instances] == (things % num_things).tolist()
    assert result.draw().shape == (SIDE, SIDE, 3)

    count = partial(task.metric.count, split.truth(0), prediction, num_classes)
    if config.task == "panoptic":
        summary = task.metric.summarize(count(), split.categories)
        assert summary["PQ_things"] > 99 and summary["RQ"] == 100
        assert len(result.to_coco()["segments_info"]) == COUNT + 1
        return
    half = task.metric.summarize(count(), split.categories)  # of 200 of a class, 100 count
    every = task.metric.summarize(count(max_predictions=COUNT), split.categories)
    assert half["AP50"] < 51 and every["AP50"] == pytest.approx(100)
