import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import NUM_PROPOSALS, NUM_STUFF, NUM_THINGS, make_batch, random

from knet_jax import losses
from knet_jax.matching import Weights, match, matching_cost
from knet_jax.structs import EMPTY, Batch, Output, PanopticTargets, Stage
from knet_jax.tasks import panoptic_loss, segments

N, K = NUM_PROPOSALS + NUM_STUFF, NUM_THINGS + NUM_STUFF
WEIGHTS = Weights()
B, H, W = 4, 8, 8  # stride 8 of the pictures of `make_batch`


# Segments.


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_segments_are_the_mean_of_the_sampled_pixels(dtype):
    batch = make_batch(seed=3)
    targets = batch.targets
    targets = targets._replace(segment_map=targets.segment_map.astype(dtype))
    batch = batch._replace(targets=targets)
    things, stuff = jax.jit(segments, static_argnums=1)(batch, NUM_STUFF)
    m = batch.targets.labels.shape[1] - NUM_STUFF
    assert things.masks.shape == (4, m, 16, 16) and stuff.masks.shape == (4, NUM_STUFF, 16, 16)
    np.testing.assert_array_equal(things.labels, batch.targets.labels[:, :m])
    np.testing.assert_array_equal(stuff.labels, batch.targets.labels[:, m:])
    masks = np.concatenate([things.masks, stuff.masks], axis=1)
    for i, s, y, x in np.ndindex(masks.shape):
        pixels = batch.targets.segment_map[i, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2]
        assert masks[i, s, y, x] == (pixels == 1 + s).mean()
    assert set(np.unique(masks)) > {0, 0.25, 0.5, 1}


def test_segments_read_rows_and_columns_as_the_batch_says():
    """Row 2i + a of the map is the image's row 4i + 1 + a: built from an image-sized mask."""
    rng = np.random.default_rng(0)
    owner = rng.integers(0, 4, (32, 64))
    sampled = np.zeros((16, 32), np.uint8)
    for i, a, j, e in np.ndindex(8, 2, 16, 2):
        sampled[2 * i + a, 2 * j + e] = owner[4 * i + 1 + a, 4 * j + 1 + e]
    batch = Batch(None, PanopticTargets(sampled[None], np.array([[0, 1, 2]])), None, None, None)
    things, stuff = segments(batch, 1)
    for s, mask in enumerate([*things.masks[0], *stuff.masks[0]]):
        image = jnp.asarray(owner == 1 + s, jnp.float32)
        wanted = jax.image.resize(image, (8, 16), "bilinear", antialias=False)
        np.testing.assert_allclose(mask, wanted, atol=1e-6)


def test_more_than_255_segments_fit():
    segment_map = np.full((1, 4, 4), 299, np.uint16)
    batch = Batch(
        None, PanopticTargets(segment_map, np.zeros((1, 300), np.int32)), None, None, None
    )
    things, _ = segments(batch, 0)
    assert np.flatnonzero(things.masks.sum((0, 2, 3))).tolist() == [298]


# The loss.


def make_output(num_stages, b=B):
    masks = [random(b, N, H, W, seed=s, scale=2) for s in range(num_stages + 1)]
    logits = [None] + [random(b, N, K, seed=10 + s) for s in range(num_stages)]
    stages = tuple(Stage(None, *both) for both in zip(masks, logits))
    return Output(stages, random(b, K, H, W, seed=20))


def loss_of(output, batch, weights=WEIGHTS):
    things, stuff = segments(batch, NUM_STUFF)
    counts = losses.count(things, stuff, NUM_PROPOSALS)
    return jax.jit(panoptic_loss, static_argnames="weights")(
        output, things, stuff, counts, weights=weights
    )


@pytest.fixture(scope="module")
def batch():
    return make_batch()


INITIAL = {"loss/initial/mask", "loss/initial/dice", "loss/initial/rank", "loss/initial/dense"}


@pytest.mark.parametrize("num_stages", [0, 1, 3])
def test_terms_have_the_names_that_are_plotted(batch, num_stages):
    terms, matching = loss_of(make_output(num_stages), batch)
    wanted = INITIAL | {
        f"loss/stage{s}/{term}"
        for s in range(1, num_stages + 1)
        for term in ("label", "mask", "dice", "rank")
    }
    assert set(terms) == wanted
    assert all(np.isfinite(value) and value.shape == () for value in terms.values())
    assert matching.slots.shape == (max(num_stages, 1), B, NUM_PROPOSALS)
    assert matching.found.shape == ()


def test_weights_multiply_their_terms(batch):
    output = make_output(1)
    plain, matching = loss_of(output, batch)
    weights = WEIGHTS._replace(rank=3.0, dense=7.0)  # no part of the cost
    other, same = loss_of(output, batch, weights)
    np.testing.assert_array_equal(matching.slots, same.slots)
    for name, value in plain.items():
        term = name.rpartition("/")[2]
        factor = getattr(weights, term) / getattr(WEIGHTS, term)
        np.testing.assert_allclose(other[name], factor * value, rtol=1e-5)


def test_a_stage_is_matched_by_the_stage_before(batch):
    output = make_output(3)
    _, matching = loss_of(output, batch)
    things, _ = segments(batch, NUM_STUFF)
    for s, stage in enumerate(output.stages[:-1]):
        masks = jax.image.resize(
            stage.masks[:, :NUM_PROPOSALS], (B, NUM_PROPOSALS, 16, 16), "bilinear", antialias=False
        )
        logits = None if s == 0 else stage.logits[:, :NUM_PROPOSALS, :NUM_THINGS]
        cost = matching_cost(masks, logits, things, WEIGHTS)
        wanted = match(cost[None], things.labels)[0]
        np.testing.assert_array_equal(matching.slots[s], wanted)
    assert len({slots.tobytes() for slots in np.asarray(matching.slots)}) == 3
    # So the last stage's predictions decide nothing, and stuff kernels never do.
    changed = output.stages[-1]._replace(masks=-output.stages[-1].masks)
    _, same = loss_of(output._replace(stages=(*output.stages[:-1], changed)), batch)
    np.testing.assert_array_equal(same.slots, matching.slots)


def test_stage_1_takes_the_matching_of_the_initial_masks(batch):
    output = make_output(2)
    assert (loss_of(output, batch)[1].slots[0] == loss_of(make_output(0), batch)[1].slots[0]).all()
    first = output.stages[0]
    output = output._replace(stages=(first, first._replace(logits=output.stages[1].logits)))
    terms, _ = loss_of(output, batch)
    # Equal masks and equal matching; the stage has stuff besides.
    assert terms["loss/stage1/mask"] != terms["loss/initial/mask"]
    no_stuff = np.array(batch.targets.labels)
    no_stuff[:, -NUM_STUFF:] = EMPTY
    terms, _ = loss_of(output, batch._replace(targets=batch.targets._replace(labels=no_stuff)))
    for term in ("mask", "dice"):
        np.testing.assert_allclose(
            terms[f"loss/stage1/{term}"], terms[f"loss/initial/{term}"], rtol=1e-5
        )


def test_initial_masks_of_stuff_are_not_judged(batch):
    """In the initial stage these are the class logits, which `dense` judges."""
    output = make_output(1)
    first = output.stages[0]
    other = first._replace(masks=first.masks.at[:, NUM_PROPOSALS:].add(5.0))
    terms, _ = loss_of(output, batch)
    changed, _ = loss_of(output._replace(stages=(other, output.stages[1])), batch)
    assert all(terms[name] == changed[name] for name in terms)


def test_gradients_reach_every_prediction_that_is_judged(batch):
    output = make_output(2)

    @jax.jit
    def gradient(output):
        return jax.grad(lambda output: sum(loss_of(output, batch)[0].values()))(output)

    grads = gradient(output)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    assert abs(grads.dense).max() > 0
    assert not grads.stages[0].masks[:, NUM_PROPOSALS:].any()
    for stage in grads.stages[1:]:
        assert abs(stage.logits).max() > 0
        assert abs(stage.masks[:, NUM_PROPOSALS:]).max() > 0


def test_found_counts_things_that_are_drawn(batch):
    things, _ = segments(batch, NUM_STUFF)
    count = int((things.labels != EMPTY).sum())
    m = things.labels.shape[1]
    small = things.masks.reshape(B, m, H, 2, W, 2).mean((3, 5))
    masks = jnp.full((B, N, H, W), -20.0).at[:, :m].set(40 * small - 20)
    perfect = Output((Stage(None, masks, None),), random(B, K, H, W))
    found = int(loss_of(perfect, batch)[1].found)
    assert count * 2 // 3 <= found <= count
    blank = perfect._replace(stages=(Stage(None, jnp.full_like(masks, -20.0), None),))
    assert loss_of(blank, batch)[1].found == 0


def test_a_batch_without_any_segment_is_finite(batch):
    empty = batch._replace(
        targets=PanopticTargets(
            np.zeros_like(batch.targets.segment_map), np.full_like(batch.targets.labels, EMPTY)
        )
    )
    terms, matching = loss_of(make_output(2), empty)
    assert all(np.isfinite(value) for value in terms.values())
    assert terms["loss/stage2/label"] > 0 and terms["loss/stage2/mask"] == 0
    assert (matching.slots == EMPTY).all() and matching.found == 0
