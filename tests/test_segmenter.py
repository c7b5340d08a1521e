"""Pictures in, segments out."""

from itertools import chain

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs
from PIL import Image
from tiny_runs import picture

import knet_jax
from knet_jax.app import segmenter
from knet_jax.app.segmenter import Segmenter, as_image
from knet_jax.data import pipeline
from knet_jax.saved.models import open_model
from knet_jax.system.backend import start_backend
from knet_jax.system.errors import UserError
from knet_jax.training.evaluation import Evaluator

SEVERAL_PASSES = (
    "--config.eval.scales=(0.5, 1.0)",
    "--config.eval.flip=True",
    "--config.eval.window=(64, 64)",
    "--config.eval.window_step=(32, 32)",
)


WINDOWS = (
    "--config.eval.window=(64, 96)",
    "--config.eval.window_step=(32, 32)",
    "--config.data.image_side=(96, 128)",
)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


# What it sees.


@pytest.mark.parametrize(
    "task, overrides",
    [
        ("semantic", ("--config.data.image_side=(64, 64)",)),
        slow("panoptic", ("--config.data.eval_multiple=32",)),
        slow("semantic", SEVERAL_PASSES),
        slow("panoptic", WINDOWS),
        slow("instance", WINDOWS),
    ],
)
def test_it_sees_what_an_evaluation_sees(tiny_models, tmp_path, task, overrides):
    data = [f"--config.data.data_dir={tmp_path}", "--config.data.num_val=3"]
    run = open_model(tiny_models[task], overrides=[*data, *overrides])
    split = pipeline.load_split(run.config.data, "val", task)
    evaluator = Evaluator(run.network, split, run.config, jax.devices()[:1], inside=2)
    sees = Segmenter(run)
    threshold = 0.0 if task == "instance" else 0.2
    predictions = list(chain.from_iterable(evaluator.batches(run.variables)))
    assert sorted(prediction.index for prediction in predictions) == [0, 1, 2]
    for index, truth, theirs, earlier, activity in predictions:
        np.testing.assert_equal(truth, split.truth(index))
        assert bool(earlier) == (activity is not None) == (index < 2)  # looked into or not
        ours = sees(split.image(index), threshold).prediction
        if task == "instance":
            assert len(ours) == len(theirs) > 20  # more than a window's
            assert sum(a.rle == b.rle for a, b in zip(ours, theirs)) > 0.9 * len(ours)
        elif task == "panoptic":
            assert len(ours.segments) == len(theirs.segments) > 0
            assert (ours.ids != theirs.ids).mean() < (0.02 if overrides is WINDOWS else 1e-3)
            np.testing.assert_allclose(
                [s.score for s in ours.segments], [s.score for s in theirs.segments], rtol=1e-4
            )
        else:
            assert len(np.unique(ours)) > 1
            assert (ours != theirs).mean() < 2e-3


def test_pictures_share_programs_and_batches(tiny_models, monkeypatch):
    """With a network that sees the class 1 + row of the batch: which pictures come together."""
    traced = []

    def predict(variables, batches, mirrored, original_size, thresholds, *, canvas, **_):
        traced.append((batches[0].image.shape[0], canvas))
        rows = jnp.arange(len(original_size), dtype=jnp.uint8) + 1
        return jnp.broadcast_to(rows[:, None, None], (len(rows), canvas.height, canvas.width))

    monkeypatch.setattr(segmenter, "predict", predict)
    run = open_model(tiny_models["semantic"])
    sees = Segmenter(run)
    for size in ((63, 94), (50, 75), (40, 60), (60, 90)):
        assert sees(picture(*size)).size == size
    assert len(traced) == 1
    sees(picture(94, 63))
    assert len(traced) == 2

    traced.clear()
    sizes = [(60, 90), (90, 60), (50, 75), (33, 44), (60, 90)]
    pictures = [picture(*size, seed) for seed, size in enumerate(sizes)]
    results = Segmenter(run, batch_size=3)(pictures)
    assert [result.size for result in results] == sizes
    assert [result.prediction.max() for result in results] == [1, 1, 2, 1, 2]
    for image, result in zip(pictures, results):
        np.testing.assert_array_equal(result.image, image)
    assert {count for count, _ in traced} == {1, 3}  # one that is alone is not padded
    assert Segmenter(run)([]) == []


@pytest.mark.parametrize(
    "task, sizes", [("semantic", [(1, 700)]), slow("panoptic", [(1, 1), (900, 2)])]
)
def test_pictures_of_any_size(segmenters, task, sizes):
    for size in sizes:
        result = segmenters[task](picture(*size))
        assert result.size == size and result.draw().shape == (*size, 3)
        for segment in result.segments:
            assert segment.mask.shape == size and segment.area == segment.mask.sum()


def test_a_stream_reads_only_a_little_ahead(segmenters):
    drawn = []

    def pictures():
        for seed in range(6):
            drawn.append(seed)
            yield picture(seed=seed)

    ahead = []
    for i, result in enumerate(segmenters["panoptic"].stream(pictures())):
        ahead.append(len(drawn) - i)
        assert result.size == (64, 96)
    assert max(ahead) == 2 and len(ahead) == 6


def middle(segments):
    """A score that some are above and some below."""
    return float(np.median([segment.score for segment in segments if segment.is_thing]))


def test_thresholds_change_the_result_and_not_the_program(segmenters):
    sees, image = segmenters["panoptic"], picture()
    by_config = sees(image)
    count = sees._predict._cache_size()
    every = sees(image, threshold=0.0, overlap=0.0)
    strict = sees(image, threshold=1.0, overlap=1.0)
    assert len(every.segments) > len(by_config.segments) > len(strict.segments)
    assert not strict.instances
    threshold = middle(every.segments)
    some = sees(image, threshold=threshold, overlap=0.0)
    assert sees._predict._cache_size() == count
    assert 0 < len(some.instances) < len(every.instances)
    filtered = every.above(threshold)
    np.testing.assert_array_equal(filtered.semantic, some.semantic)
    assert [s.score for s in filtered.segments] == [s.score for s in some.segments]
    assert [s.area for s in filtered.segments] == [s.area for s in some.segments]


def test_thresholds_that_make_no_sense(segmenters):
    for value in (1.5, -0.1, np.nan, "0.5", True, [0.5]):
        for name in ("threshold", "overlap"):
            with pytest.raises(UserError, match=f"^{name} is .*; accepted: a number from 0 to 1"):
                segmenters["panoptic"](picture(8, 8), **{name: value})


# What it takes.


def test_paths_pictures_and_arrays(tmp_path):
    image = picture(40, 60)
    Image.fromarray(image).save(tmp_path / "a.png")
    for given in (
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        Image.open(tmp_path / "a.png"),
        image,
    ):
        np.testing.assert_array_equal(as_image(given), image)
    assert not np.shares_memory(as_image(image), image)  # it may change once it was segmented


def test_what_is_no_picture_is_named(segmenters, tmp_path):
    (tmp_path / "text.jpg").write_text("no picture")
    for name, words in {"text.jpg": "cannot be decoded", "missing.jpg": "No such file"}.items():
        with pytest.raises(UserError, match=f"{tmp_path / name}: .*{words}"):
            segmenters["panoptic"]([tmp_path / name])
    for shape, dtype in (
        ((4, 5), np.uint8),
        ((4, 5, 4), np.uint8),
        ((4, 5, 3), float),
        ((0, 5, 3), np.uint8),
        ((2, 4, 5, 3), np.uint8),
        ((), object),
    ):
        with pytest.raises(UserError, match=r"accepted: uint8 \[H, W, 3\] in RGB"):
            as_image(np.zeros(shape, dtype))


# Opening a model.


def test_load_opens_a_model(tiny_models):
    sees = knet_jax.load(tiny_models["semantic"], checkpoint="latest")
    assert isinstance(sees, knet_jax.Segmenter) and sees.task == "semantic" and sees.step == 1
    assert sees.categories == tiny_runs.categories("semantic") and sees.batch_size == 1
    assert sees.config.model.dtype == "float32"
    half = knet_jax.load(tiny_models["semantic"], dtype="bfloat16", batch_size=2)
    assert half.config.model.dtype == "bfloat16" and half.batch_size == 2
    for size in (0, 2.5, "3", True):
        with pytest.raises(UserError, match=f"batch_size is {size!r}; accepted: a whole number"):
            knet_jax.load(tiny_models["semantic"], batch_size=size)
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        _ = knet_jax.lod


def test_programs_are_kept_where_the_user_keeps_such_things(monkeypatch, tmp_path):
    before = jax.config.jax_compilation_cache_dir
    assert before  # the tests have a folder of their own
    start_backend()
    assert jax.config.jax_compilation_cache_dir == before
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        start_backend()
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "knet_jax" / "programs")
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
