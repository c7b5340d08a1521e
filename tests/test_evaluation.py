from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model

import knet_jax.inference.forward
from knet_jax.analysis.gallery import Gallery
from knet_jax.config.files import load_config
from knet_jax.data import pipeline
from knet_jax.inference.activity import SIDE
from knet_jax.inference.fusion import Fused
from knet_jax.metrics import panoptic
from knet_jax.model import make_model
from knet_jax.segmentation.drawing import panel
from knet_jax.structs import EMPTY, Stage
from knet_jax.tasks import TASKS
from knet_jax.training import evaluation
from knet_jax.training.evaluation import Evaluator

CONFIG = Path(__file__).parents[1] / "configs" / "shapes_panoptic.py"
SLOTS = 16
LAST = 1
"""The number of updates of the network."""


def make_config(data_dir):
    overrides = [
        f"--config.data.data_dir={data_dir}",
        "--config.data.num_val=8",
        "--config.data.image_side=(64, 96)",
        "--config.data.canvas=(64, 96)",
        "--config.data.short_side=(32, 64)",
        "--config.data.long_side=96",
        "--config.eval.batch_size=3",
        "--config.eval.instance_threshold=0.0",
        "--config.eval.overlap_threshold=0.0",
    ]
    config = load_config(str(CONFIG), overrides)
    for key, value in tiny_model.MODEL.items():
        config.model[key] = value
    config.model.update({"num_things": 5, "num_stuff": 4, "num_stages": LAST})
    return config


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The config and the validation split of eight shapes."""
    config = make_config(tmp_path_factory.mktemp("data"))
    return config, pipeline.load_split(config.data, "val", "panoptic")


@pytest.fixture
def oracle(data, monkeypatch):
    """An evaluator of a network and a fusion that know the truth, but before the last round find nothing."""
    config, split = data
    side = (128, 128)

    def look_up(ids):
        fused = Fused(
            np.zeros((len(ids), *side), np.int16),
            np.full((len(ids), SLOTS), EMPTY, np.int32),
            np.zeros((len(ids), SLOTS), np.float32),
            np.zeros((len(ids), SLOTS), np.int32),
        )
        for i, index in enumerate(np.asarray(ids)):
            if index > EMPTY:
                truth = split.truth(index)
                height, width = truth.ids.shape
                real = [segment for segment in truth.segments if not segment.iscrowd]
                for number, segment in enumerate(real):
                    fused.ids[i, :height, :width][truth.ids == segment.id] = 1 + number
                    fused.labels[i, number] = segment.label
                    fused.scores[i, number] = 0.5
        return fused

    def predict(passes, original_size, *, canvas, num_things, **options):
        [seen] = passes
        assert not isinstance(seen.mirrored, bool) and seen.mirrored.shape == (len(seen.size),)
        assert num_things == 5 and (canvas.height, canvas.width) == side
        assert {"instance_threshold", "overlap_threshold"} <= set(options)
        nothing = look_up(np.full(len(seen.size), EMPTY))  # of the same shapes
        return jax.pure_callback(look_up, nothing, seen.stage.kernels)

    def run_rounds(variables, batch, *, model, stages):
        b, height, width, _ = batch.image.shape
        masks = jnp.zeros((b, 1, height // 8, width // 8))
        return tuple(Stage(batch.id - 8 * (LAST - stage), masks, None) for stage in stages)

    rows = {"panoptic": TASKS["panoptic"]._replace(predict=predict)}
    monkeypatch.setattr(evaluation, "TASKS", rows)
    monkeypatch.setattr(knet_jax.inference.forward, "run_rounds", run_rounds)
    return partial(Evaluator, make_model(**config.model), split, config, jax.devices()[:1])


def test_perfect_predictions_score_100(data, oracle):
    """Twice, since an evaluator works again and again, and with pictures of the first few."""
    _, split = data
    seen, gallery = [], Gallery(split, 2, len(split))
    evaluator = oracle()
    evaluator.evaluate({}, gallery.add)
    counts = evaluator.evaluate({}, seen.extend)
    summary = panoptic.summarize(counts, split.categories)
    assert {summary[name] for name in ("PQ", "SQ", "RQ", "PQ_things", "PQ_stuff")} == {100.0}
    wanted = [s for i in range(len(split)) for s in split.truth(i).segments if not s.iscrowd]
    assert counts.tp.sum() == len(wanted) and not counts.fp.any() and not counts.fn.any()
    assert sorted(prediction.index for prediction in seen) == list(range(8))
    for prediction in seen:
        assert not prediction.earlier and prediction.activity is None
        assert prediction.prediction.ids.shape == tuple(split.sizes[prediction.index])
        np.testing.assert_array_equal(prediction.truth.ids, split.truth(prediction.index).ids)

    rows = gallery.rows()
    assert [row.title for row in rows] == [split.file_name(i) for i in (0, 7)]
    np.testing.assert_array_equal(rows[0].image, split.image(0))
    drawn = panel(rows, split.categories)
    assert drawn.dtype == np.uint8 and drawn.ndim == 3 and drawn.shape[2] == 3


def test_the_first_pictures_are_looked_into(data, oracle):
    """The same pass of the network gives their earlier rounds and what the kernels did."""
    _, split = data
    evaluator = oracle(inside=3)
    seen = {one.index: one for batch in evaluator.batches({}) for one in batch}
    assert sorted(seen) == list(range(8))
    for index, one in seen.items():
        real = [segment for segment in split.truth(index).segments if not segment.iscrowd]
        assert len(one.prediction.segments) == len(real) > 0
        if index >= 3:
            assert not one.earlier and one.activity is None
            continue
        [before] = one.earlier
        assert not before.segments and not before.ids.any()
        assert one.activity.maps.shape == (1, SIDE, SIDE)
        assert (
            one.activity.maps == 255
        ).all()  # of a single kernel that shares pixels with no other
