"""Opening a model: which checkpoint of it, and what is wrong where there is none."""

import jax
import numpy as np
import pytest

from knet_jax.checkpoint import Checkpoints
from knet_jax.configuration import load_config, save_config
from knet_jax.knet import make_model
from knet_jax.runs import open_run
from knet_jax.structs import Categories
from knet_jax.training import init_variables

CONFIG = "configs/shapes_panoptic.py:tiny"
CATEGORIES = Categories(tuple("abcdefghi"), tuple(range(11, 20)), 5)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Steps 1 to 3, whose parameters are the step and their averages ten times as much; the second
    has the best PQ, the first the best of the average."""
    folder = tmp_path_factory.mktemp("run")
    config = load_config(CONFIG, ["--config.train.ema_decay=0.9"])
    save_config(config, folder)
    shapes = jax.eval_shape(lambda: init_variables(make_model(**config.model), 0))
    with Checkpoints(folder / "checkpoints") as checkpoints:
        for step, (score, of_average) in enumerate(((10, 30), (20, 20), (15, 10)), 1):
            state = {
                part: jax.tree.map(
                    lambda x, v=value: np.full(x.shape, v, x.dtype), shapes["params"]
                )
                for part, value in (("params", step), ("ema", 10 * step), ("opt_state", -1))
            }
            checkpoints.save(step, state, {"categories": CATEGORIES._asdict()})
            checkpoints.add_scores(step, {"val/PQ": score, "val_ema/PQ": of_average})
    return folder


@pytest.mark.parametrize(
    "options, step, value",
    [
        ({}, 2, 2),
        ({"checkpoint": "latest"}, 3, 3),
        ({"checkpoint": 1}, 1, 1),
        ({"checkpoint": "1"}, 1, 1),
        ({"ema": True}, 1, 10),
        ({"ema": True, "checkpoint": 3}, 3, 30),
    ],
)
def test_the_checkpoint_that_is_asked_for(workdir, options, step, value):
    run = open_run(workdir, **options)
    assert run.step == step and run.categories == CATEGORIES
    assert set(run.variables) == {"params"}
    assert {float(x) for leaf in jax.tree.leaves(run.variables) for x in np.unique(leaf)} == {value}


def test_dtype_and_overrides_change_the_config(workdir):
    run = open_run(workdir, dtype="bfloat16", overrides=["--config.eval.overlap_threshold=0.1"])
    assert run.model.backbone.dtype == run.config.model.dtype == "bfloat16"
    assert run.config.eval.overlap_threshold == 0.1
    assert open_run(workdir).model.backbone.dtype == "float32"


@pytest.mark.parametrize(
    "options, words",
    [
        (
            {"checkpoint": "good"},
            r"checkpoint=good; accepted: best, latest, or a step of \[1, 2, 3\]",
        ),
        ({"checkpoint": 7}, "no checkpoint of step 7"),
        ({"dtype": "float16"}, "config.model.dtype is 'float16'; accepted: float32, bfloat16"),
        ({"ema": True, "overrides": ["--config.train.ema_decay=0.0"]}, "kept no average"),
    ],
)
def test_what_cannot_be_is_named(workdir, options, words):
    with pytest.raises(ValueError, match=words):
        open_run(workdir, **options)


def test_what_is_no_model_is_named(tmp_path, workdir):
    with pytest.raises(ValueError, match="is no model"):
        open_run(tmp_path)
    with pytest.raises(ValueError, match="is a file; accepted: the folder of a model"):
        open_run(workdir / "config.json")
    (tmp_path / "config.json").write_text((workdir / "config.json").read_text())
    with pytest.raises(ValueError, match="no checkpoints"):
        open_run(tmp_path)
