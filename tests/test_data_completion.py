"""What a config leaves to the data, and what of it hardly fits them."""

from types import SimpleNamespace

import numpy as np
import pytest
import tiny_runs

from knet_jax.config.files import load_config
from knet_jax.config.validation import validate
from knet_jax.data import recipes
from knet_jax.data.completion import complete, find_doubts
from knet_jax.model import make_model
from knet_jax.segmentation.segments import Categories
from knet_jax.system.errors import UserError


class Pictures(SimpleNamespace):
    """A split of landscape pictures of one size, with three classes."""

    def __init__(self, task, count=300, size=(480, 640)):
        categories = Categories(
            ("a", "b", "c"), (1, 2, 3), {"instance": 3, "panoptic": 2}.get(task, 0)
        )
        sizes, things = np.tile(np.int32([size]), (count, 1)), np.ones(count, int)
        super().__init__(task=task, categories=categories, sizes=sizes, num_things=things)

    def __len__(self):
        return len(self.sizes)


@pytest.mark.parametrize(
    "spec, size, wanted",
    [
        (
            "coco_panoptic:small",
            (480, 640),
            {
                "model.num_things": 2,
                "model.num_stuff": 1,
                "model.backbone.norm": "group",
                "data.short_side": (384, 480),
                "data.long_side": 640,
                "data.canvas": (480, 640),
                "optim.warmup_steps": 95,  # 50 epochs of 300 pictures, eight at a time
                "optim.decay_at": (1267, 1742),
                "train.eval_every": 38,
            },
        ),
        ("coco_instance:small", (3000, 4000), {"data.canvas": (800, 1088), "data.long_side": 1067}),
        ("coco_instance:small", (100, 900), {"data.canvas": (128, 192), "data.long_side": 167}),
        ("coco_instance:small", (20, 20), {"data.canvas": (32, 32), "data.short_side": (16, 20)}),
        (
            "folder_semantic:small",
            (96, 128),
            {
                "model.num_things": 0,
                "model.num_stuff": 3,
                "model.neck.norm": "group",
                "data.scale": (384, 96),
                "data.crop": (96, 96),
            },
        ),
        ("coco_semantic:small", (3000, 4000), {"data.scale": (2048, 512), "data.crop": (512, 512)}),
        ("coco_instance:small,swin_t", (480, 640), {"model.num_things": 3}),
    ],
)
def test_none_follows_from_the_data(spec, size, wanted):
    config = load_config(spec)
    validate(config)
    split = Pictures(config.task, size=size)
    done = complete(config, split)
    for key, value in wanted.items():
        assert done[key] == value, key
    validate(done)
    make_model(**done.model)
    recipes.find(done.task, done.data)
    assert find_doubts(done, split) == []
    assert complete(done, split) == done and config.train.eval_every is None


def test_norms_are_those_of_the_initial_weights(tmp_path):
    split = Pictures("panoptic")
    for weights, norm in (
        ("resnet50.pth", "frozen_batch"),
        (tiny_runs.write(tmp_path / "run", "panoptic"), "group"),
    ):
        config = load_config("coco_panoptic:small", {"init_weights": weights})
        assert complete(config, split).model.backbone.norm == norm
    config = load_config("folder_semantic:small", {"init_weights": "resnet50.pth"})
    config = complete(config, Pictures("semantic"))
    assert (config.model.backbone.norm, config.model.neck.norm) == ("batch", "batch")


def test_what_only_a_training_fills_in_is_named():
    config = load_config("coco_panoptic:small")
    with pytest.raises(
        UserError, match=r"^config.model.backbone.norm is missing; accepted: frozen_"
    ):
        make_model(**config.model)


@pytest.mark.parametrize(
    "spec, size, changes, words",
    [
        (
            "coco_instance",
            (120, 160),
            {"optim.warmup_steps": 300},
            (
                "the warm-up takes 300 steps, and the run 228; --config.optim.warmup_steps=None",
                "pictures of 160x120 are enlarged to 1067x800; --config.data.canvas=None",
                "stay frozen at random values without config.init_weights; --config.model.backb",
            ),
        ),
        (
            "folder_semantic",
            (480, 640),
            {"init_weights": "a.pth"},
            ("80000 steps show each of 300 pictures 4210 times; --config.train.steps=0",),
        ),
        (
            "folder_semantic",
            (480, 640),
            {"init_weights": "a.pth", "train.steps": 2000},
            (
                "would fall first at step 60000, and the run has 2000; --config.optim.decay_at=None",
                "config.train.eval_every is 8000, and the run has 2000 steps; --config.train.eval_",
            ),
        ),
        ("ade20k_semantic", (512, 683), {"init_weights": "a.pth", "train.steps": 80_000}, None),
    ],
)
def test_what_hardly_fits_is_said_with_the_flag_that_mends_it(spec, size, changes, words):
    config = load_config(spec, changes)
    split = Pictures(config.task, 20_210 if words is None else 300, size)
    doubts = find_doubts(complete(config, split), split)
    assert len(doubts) == len(words or ())
    for doubt, beginning in zip(doubts, words or ()):
        assert beginning in doubt
