from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
from devices import call
from tiny_training import variables_of

import knet_jax.inference.forward
from knet_jax.config.files import load_config
from knet_jax.data import pipeline
from knet_jax.inference.forward import lookahead
from knet_jax.inference.fusion import Fused, read_panoptic
from knet_jax.metrics import panoptic
from knet_jax.model import make_model
from knet_jax.segmentation.drawing import panel
from knet_jax.segmentation.segments import SegmentInfo
from knet_jax.structs import EMPTY, Stage
from knet_jax.tasks import TASKS
from knet_jax.training import evaluation
from knet_jax.training.evaluation import Evaluator, Gallery

CONFIG = Path(__file__).parents[1] / "configs" / "shapes_panoptic.py"
SLOTS = 16


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
    config.model.update({"num_things": 5, "num_stuff": 4, "num_stages": 1})
    return config


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The config and the validation split of eight shapes."""
    config = make_config(tmp_path_factory.mktemp("data"))
    return config, pipeline.load_split(config.data, "val", "panoptic")


@pytest.fixture
def oracle(data, monkeypatch):
    """A network and a fusion that know the truth."""
    config, split = data
    side = (128, 128)

    def look_up(ids):
        fused = Fused(
            np.zeros((len(ids), *side), np.int16),
            np.full((len(ids), SLOTS), EMPTY, np.int32),
            np.zeros((len(ids), SLOTS), np.float32),
        )
        for i, index in enumerate(np.asarray(ids)):
            if index != EMPTY:
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
        b = len(seen.size)
        shapes = Fused(
            jax.ShapeDtypeStruct((b, *side), jnp.int16),
            jax.ShapeDtypeStruct((b, SLOTS), jnp.int32),
            jax.ShapeDtypeStruct((b, SLOTS), jnp.float32),
        )
        return jax.pure_callback(look_up, shapes, seen.stage.kernels)

    def run_network(variables, batch, *, model, stage):
        assert stage == -1
        b, height, width, _ = batch.image.shape
        return Stage(batch.id, jnp.zeros((b, 1, height // 8, width // 8)), None)

    rows = {"panoptic": TASKS["panoptic"]._replace(predict=predict)}
    monkeypatch.setattr(evaluation, "TASKS", rows)
    monkeypatch.setattr(knet_jax.inference.forward, "run_network", run_network)
    return lambda limit=None: Evaluator(
        make_model(**config.model), split, config, jax.devices()[:1], limit
    )


def test_perfect_predictions_score_100(data, oracle):
    """Twice, since an evaluator works again and again, and with pictures of the first few."""
    _, split = data
    evaluator, seen, gallery = oracle(), [], Gallery(split, 2, len(split))
    evaluator.evaluate({}, gallery.add)
    counts = evaluator.evaluate({}, seen.extend)
    summary = panoptic.summarize(counts, split.categories)
    assert {summary[name] for name in ("PQ", "SQ", "RQ", "PQ_things", "PQ_stuff")} == {100.0}
    wanted = [s for i in range(len(split)) for s in split.truth(i).segments if not s.iscrowd]
    assert counts.tp.sum() == len(wanted) and not counts.fp.any() and not counts.fn.any()
    assert sorted(prediction.index for prediction in seen) == list(range(8))
    for prediction in seen:
        assert prediction.prediction.ids.shape == tuple(split.sizes[prediction.index])
        np.testing.assert_array_equal(prediction.truth.ids, split.truth(prediction.index).ids)

    rows = gallery.rows()
    assert [row.title for row in rows] == [split.file_name(i) for i in (0, 7)]
    np.testing.assert_array_equal(rows[0].image, split.image(0))
    drawn = panel(rows, split.categories)
    assert drawn.dtype == np.uint8 and drawn.ndim == 3 and drawn.shape[2] == 3


def test_limit_takes_the_first_pictures(oracle):
    for limit, count in ((1, 1), (50, 8)):
        indices = [prediction.index for prediction in oracle(limit).predictions({})]
        assert sorted(indices) == list(range(count))


def test_panoptic_map_leaves_out_padding_and_empty_places():
    ids = np.zeros((2, 8, 9), np.int16)
    ids[1, :5, :4], ids[1, :5, 4:6] = 1, 2
    labels = np.array([[EMPTY] * 3, [7, 2, EMPTY]], np.int32)
    scores = np.array([[0, 0, 0], [0.75, 0.5, 0]], np.float32)
    empty, one = (Fused(*(x[i] for x in (ids, labels, scores))) for i in (0, 1))
    result = read_panoptic(one, np.array([5, 6]))
    assert result.ids.shape == (5, 6) and result.ids.dtype == np.int32
    assert result.segments == (SegmentInfo(1, 7, score=0.75), SegmentInfo(2, 2, score=0.5))
    assert read_panoptic(empty, np.array([8, 9])).segments == ()


def test_lookahead_is_one_item_ahead():
    drawn = []

    def items():
        for i in range(3):
            drawn.append(i)
            yield i

    assert [(item, drawn[-1]) for item in lookahead(items())] == [(0, 1), (1, 2), (2, 2)]
    assert list(lookahead(range(0))) == []


def worker(data_dir, out):
    """Predictions of a network on one and on two devices."""
    config = make_config(data_dir)
    split = pipeline.load_split(config.data, "val", "panoptic")
    model = make_model(**config.model)
    variables = variables_of(model)
    config.eval.batch_size = 4
    arrays = {}
    for num_devices in (1, 2):
        evaluator = Evaluator(model, split, config, jax.devices()[:num_devices], 7)
        seen = []
        counts = evaluator.evaluate(variables, seen.extend)
        for one in seen:
            arrays[f"{num_devices}/{one.index}"] = one.prediction.ids
        arrays[f"{num_devices}/order"] = np.array([one.index for one in seen])
        arrays[f"{num_devices}/fn"] = counts.fn + counts.tp
    np.savez(out, **arrays)


@pytest.mark.slow
def test_two_devices_equal_one(data, tmp_path):
    config, _ = data
    call("test_evaluation", "worker", config.data.data_dir, tmp_path / "out.npz", num_devices=2)
    arrays = dict(np.load(tmp_path / "out.npz"))
    for name in ("order", "fn"):
        np.testing.assert_array_equal(arrays[f"1/{name}"], arrays[f"2/{name}"])
    assert sorted(arrays["1/order"]) == list(range(7)) and arrays["1/fn"].sum() > 7
    maps = [(arrays[f"1/{i}"], arrays[f"2/{i}"]) for i in range(7)]
    assert any(len(np.unique(one)) > 1 for one, _ in maps)
    for one, two in maps:
        assert (one != two).mean() < 1e-3
