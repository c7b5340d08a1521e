from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import NUM_PROPOSALS, NUM_STUFF, NUM_THINGS, make_output

import knet_jax.inference.forward
from knet_jax.config.files import load_config
from knet_jax.data import pipeline
from knet_jax.inference.forward import stage_of
from knet_jax.inference.multiscale import corners, cut, join
from knet_jax.model import make_model
from knet_jax.structs import Batch, Output, Sizes, Stage
from knet_jax.training.evaluation import Evaluator

CONFIG = Path(__file__).parents[1] / "configs" / "shapes_semantic.py"


def make_batch(height=64, width=96, sizes=((64, 96), (33, 61), (0, 0))):
    rng = np.random.default_rng(0)
    image = rng.integers(1, 255, (len(sizes), height, width, 3)).astype(np.uint8)
    for picture, (rows, columns) in zip(image, sizes):
        picture[rows:], picture[:, columns:] = 0, 0
    sizes = np.array(sizes, np.int32)
    return Batch(image, None, sizes, sizes, np.arange(len(sizes), dtype=np.int32))


def means(image, stride=8):
    """A network without a field of view: minus and plus the mean color of every square."""
    b, height, width, _ = image.shape
    squares = image.reshape(b, height // stride, stride, width // stride, stride, 3)
    color = squares.astype(jnp.float32).mean((2, 4)).transpose(0, 3, 1, 2) / 64
    return jnp.concatenate([color, 4 - color, color * 0 + 2], axis=1)


def test_kernels_without_a_class_get_the_mean_of_the_dense_classes_over_their_pixels():
    output = make_output(1)
    sizes = Sizes(NUM_PROPOSALS, NUM_THINGS, NUM_STUFF)
    stage = jax.jit(stage_of, static_argnums=(1, 2))(output, 0, sizes)
    probs = 1 / (1 + np.exp(-np.asarray(output.dense, float)))
    masks = np.asarray(output.stages[0].masks)
    for i, n, k in np.ndindex(2, *stage.logits.shape[1:]):
        wanted = probs[i, k][masks[i, n] > 0].mean()
        np.testing.assert_allclose(jax.nn.sigmoid(stage.logits[i, n, k]), wanted, rtol=1e-4)
    assert stage_of(output, -1, sizes) is output.stages[-1]
    nothing = output._replace(stages=(output.stages[0]._replace(masks=-jnp.ones_like(masks)),))
    assert (jax.nn.sigmoid(stage_of(nothing, 0, sizes).logits) == 0).all()
    semantic = Output((Stage(None, output.stages[0].masks, None),), None)
    assert stage_of(semantic, 0, Sizes(0, 0, NUM_PROPOSALS + NUM_STUFF)).logits is None


def test_windows_know_how_much_of_the_picture_they_show():
    batch = make_batch()
    where = corners((64, 96), (32, 64), (32, 32))
    assert where == [(0, 0), (0, 32), (32, 0), (32, 32)]
    parts = list(cut(batch, (32, 64), (32, 32)))
    sizes = [part.size[1].tolist() for part in parts]
    assert sizes == [[32, 61], [32, 29], [1, 61], [1, 29]]
    assert all(part.size[2].tolist() == [0, 0] for part in parts)
    np.testing.assert_array_equal(parts[3].image, batch.image[:, 32:, 32:])


def test_overlapping_windows_are_averaged():
    """Every window gives a number of its own; the mean of those above a square is known."""
    canvas, window, step = (64, 96), (32, 64), (32, 32)
    stages = [Stage(None, jnp.full((2, 3, 4, 8), float(i)), None) for i in range(4)]
    masks = np.asarray(join(stages, canvas=canvas, window=window, step=step).masks)
    assert masks.shape == (2, 3, 8, 12)
    wanted = np.repeat([[0, 0.5, 1], [2, 2.5, 3]], 4, axis=1).repeat(4, axis=0)
    np.testing.assert_array_equal(masks, np.broadcast_to(wanted, masks.shape))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A config and eight pictures whose sides are multiples of eight."""
    overrides = [
        f"--config.data.data_dir={tmp_path_factory.mktemp('data')}",
        "--config.data.num_val=8",
        "--config.data.image_side=(64, 96)",
        "--config.data.scale=(96, 96)",
        "--config.data.eval_multiple=32",
        "--config.eval.batch_size=3",
    ]
    config = load_config(f"{CONFIG}:tiny", overrides)
    return config, pipeline.load_split(config.data, "val", "semantic")


def label_maps(data, **options):
    config, split = data
    config = config.copy_and_resolve_references()
    config.eval.update(options)
    evaluator = Evaluator(make_model(**config.model), split, config, jax.devices()[:1])
    return {seen.index: seen.prediction for batch in evaluator.batches({}) for seen in batch}


@pytest.fixture
def plain_network(monkeypatch):
    """Replaces the network, and counts what it was shown."""
    shown = []

    def run_rounds(variables, batch, *, model, stages):
        shown.append(batch.image.shape[1:3])
        return (Stage(None, means(batch.image), None),)

    monkeypatch.setattr(knet_jax.inference.forward, "run_rounds", run_rounds)
    return shown


@pytest.mark.parametrize(
    "options",
    [
        {"scales": (1.0, 1.0, 1.0)},
        {"window": (32, 64), "window_step": (32, 32)},
        {"window": (256, 256), "window_step": (32, 32)},
    ],
    ids=["scales", "windows", "large_window"],
)
def test_evaluation_in_other_ways_is_the_same(data, plain_network, options):
    """Of a network that sees every square alone; the pictures have all sorts of sides."""
    whole = label_maps(data)
    before = len(plain_network)
    other = label_maps(data, **options)
    assert len(plain_network) > before and set(whole) == set(other) == set(range(8))
    for index, labels in whole.items():
        assert labels.shape == tuple(data[1].sizes[index])
        assert (labels != other[index]).mean() < 1e-3
    assert len(np.unique(np.concatenate([labels.ravel() for labels in whole.values()]))) > 3


def test_flips_turn_back_and_scales_differ(data, plain_network):
    whole = label_maps(data)
    flipped = label_maps(data, flip=True)
    scaled = label_maps(data, scales=(0.5, 1.0, 1.5))
    for index, labels in whole.items():
        # Squares are cut elsewhere in a mirrored picture whose width is no multiple of eight.
        wrong = (labels != flipped[index]).mean()
        assert wrong < (0.1 if labels.shape[1] % 8 else 1e-3)
        assert 0 < (labels != scaled[index]).mean() < 0.5
    assert (64, 64) in plain_network  # half of the canvas, up to a multiple of 32
    assert any(max(canvas) > 128 for canvas in plain_network)
