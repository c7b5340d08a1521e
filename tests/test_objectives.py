import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plain import resample
from tiny_model import (
    NUM_PROPOSALS,
    NUM_STUFF,
    NUM_THINGS,
    WEIGHTS,
    make_batch,
    make_output,
    part,
    random,
)

from knet_jax import losses
from knet_jax.matching import match, matching_cost
from knet_jax.nn.layers import upsample2x
from knet_jax.objectives import (
    count_labels,
    count_segments,
    kernel_loss,
    match_stages,
    semantic_loss,
    unpack_instances,
    unpack_panoptic,
    unpack_semantic,
)
from knet_jax.structs import (
    EMPTY,
    InstanceTargets,
    Output,
    PanopticTargets,
    SemanticTargets,
    Stage,
)
from knet_jax.tasks import TASKS

N, K = NUM_PROPOSALS + NUM_STUFF, NUM_THINGS + NUM_STUFF
B, H, W = 4, 8, 8  # stride 8 of the pictures of `make_batch`


# Segments from maps.


def test_masks_are_the_mean_of_the_sampled_pixels():
    targets = make_batch(seed=3).targets
    for dtype in np.uint8, np.uint16:
        segment_map = targets.segment_map.astype(dtype)
        things, stuff = jax.jit(unpack_panoptic)(targets._replace(segment_map=segment_map))
        np.testing.assert_array_equal(things.labels, targets.labels)
        np.testing.assert_array_equal(stuff.labels, targets.stuff_labels)
        masks = np.concatenate([things.masks, stuff.masks], axis=1)
        assert masks.dtype == jnp.bfloat16 and masks.shape == (4, 4 + NUM_STUFF, 16, 16)
        for i, s, y, x in np.ndindex(masks.shape):
            pixels = segment_map[i, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2]
            assert masks[i, s, y, x] == (pixels == 1 + s).mean()
        assert set(np.unique(masks)) > {0, 0.25, 0.5, 1}


# Segments from bits.


def test_bits_are_unpacked_one_by_one():
    packed = np.random.default_rng(0).integers(0, 256, (2, 3, 8, 4)).astype(np.uint8)
    labels = np.array([[2, 0, EMPTY], [1, EMPTY, EMPTY]], np.int32)
    things, stuff = jax.jit(unpack_instances)(InstanceTargets(packed, labels))
    assert things.masks.shape == (2, 3, 4, 16) and things.masks.dtype == jnp.bfloat16
    np.testing.assert_array_equal(things.labels, labels)
    for i, m, y, x in np.ndindex(2, 3, 4, 16):
        count = 0
        for a, e in np.ndindex(2, 2):
            column = 2 * x + e
            count += packed[i, m, 2 * y + a, column // 8] >> (7 - column % 8) & 1
        assert things.masks[i, m, y, x] == count / 4
    assert stuff.masks.shape == (2, 0, 4, 16) and stuff.labels.shape == (2, 0)


# The loss of things and stuff.


judge_kernels = jax.jit(kernel_loss, static_argnames="weights")


def loss_of(output, batch, weights=WEIGHTS, task="panoptic"):
    targets = TASKS[task].unpack(batch.targets)
    return judge_kernels(output, targets, count_segments(targets), weights=weights)


def slots_of(output, batch, task="panoptic"):
    return match_stages(output, TASKS[task].unpack(batch.targets), WEIGHTS)


@pytest.fixture(scope="module")
def batch():
    return make_batch()


INITIAL = {"loss/initial/mask", "loss/initial/dice", "loss/initial/rank", "loss/initial/dense"}


def test_terms_have_the_names_that_are_plotted_and_their_weights(batch):
    for num_stages in (0, 2):
        output = make_output(num_stages)
        judgement = loss_of(output, batch)
        assert set(judgement.terms) == INITIAL | {
            f"loss/stage{s}/{term}"
            for s in range(1, num_stages + 1)
            for term in ("label", "mask", "dice", "rank")
        }
        assert set(judgement.measures) == {"matched"}
        assert all(np.isfinite(v) and v.shape == () for v in jax.tree.leaves(judgement))
        assert slots_of(output, batch).shape == (max(num_stages, 1), B, NUM_PROPOSALS)
    # These are no part of the cost. Without a weight the rank loss, a softmax over all kernels at
    # every pixel, is not computed.
    weights = WEIGHTS._replace(rank=0.0, dense=7.0)
    other = loss_of(output, batch, weights).terms
    assert judgement.terms.keys() - other.keys() == {
        f"loss/{stage}/rank" for stage in ("initial", "stage1", "stage2")
    }
    for name, value in other.items():
        factor = 7 if name.endswith("dense") else 1
        np.testing.assert_allclose(value, factor * judgement.terms[name], rtol=1e-5)


def test_a_stage_is_matched_by_the_stage_before(batch):
    output = make_output(3)
    slots = slots_of(output, batch)
    things, _ = unpack_panoptic(batch.targets)
    for s, stage in enumerate(output.stages[:-1]):
        masks = jax.image.resize(
            stage.masks[:, :NUM_PROPOSALS], (B, NUM_PROPOSALS, 16, 16), "bilinear", antialias=False
        )
        logits = None if s == 0 else stage.logits[:, :NUM_PROPOSALS, :NUM_THINGS]
        cost = matching_cost(masks, logits, things, WEIGHTS)
        wanted = match(cost[None], things.labels)[0]
        np.testing.assert_array_equal(slots[s], wanted)
    assert len({one.tobytes() for one in np.asarray(slots)}) == 3
    # So the last stage's predictions decide nothing, and stuff kernels never do.
    changed = output.stages[-1]._replace(masks=-output.stages[-1].masks)
    same = slots_of(output._replace(stages=(*output.stages[:-1], changed)), batch)
    np.testing.assert_array_equal(same, slots)


def test_a_stage_learns_what_it_was_matched_to(batch):
    output, targets = make_output(2), TASKS["panoptic"].unpack(batch.targets)
    terms, counts = loss_of(output, batch).terms, count_segments(targets)
    slots = slots_of(output, batch)
    for s, slot in ((0, 0), (1, 0), (2, 1)):
        wanted = losses.kernel_targets(*targets, slots[slot])
        masks, total = upsample2x(output.stages[s].masks, axes=(2, 3)), counts.segments
        if s == 0:  # proposals alone
            masks, wanted = part((masks, wanted), 0, NUM_PROPOSALS, axis=1)
            total = counts.things
        else:
            label = losses.label_loss(output.stages[s].logits, wanted.labels, NUM_THINGS, total)
            np.testing.assert_allclose(terms[f"loss/stage{s}/label"], 2 * label, rtol=1e-5)
        mask = losses.mask_loss(masks, wanted, total)
        name = f"stage{s}" if s else "initial"
        np.testing.assert_allclose(terms[f"loss/{name}/mask"], mask, rtol=1e-5)


def test_gradients_reach_every_prediction_that_is_judged(batch):
    output = make_output(2)

    @jax.jit
    def gradient(output):
        return jax.grad(lambda output: sum(loss_of(output, batch).terms.values()))(output)

    grads = gradient(output)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    assert abs(grads.dense).max() > 0
    assert not grads.stages[0].masks[:, NUM_PROPOSALS:].any()
    for stage in grads.stages[1:]:
        assert abs(stage.logits).max() > 0
        assert abs(stage.masks[:, NUM_PROPOSALS:]).max() > 0


def test_matched_is_the_share_of_things_that_are_drawn(batch):
    things, _ = unpack_panoptic(batch.targets)
    count = int((things.labels != EMPTY).sum())
    m = things.labels.shape[1]
    small = things.masks.reshape(B, m, H, 2, W, 2).mean((3, 5))
    masks = jnp.full((B, N, H, W), -20.0).at[:, :m].set(40 * small - 20)
    perfect = Output((Stage(None, masks, None),), random(B, K, H, W))
    matched = loss_of(perfect, batch).measures["matched"]
    assert 2 / 3 <= matched <= 1
    np.testing.assert_allclose(matched * count, np.round(matched * count), atol=1e-5)
    blank = perfect._replace(stages=(Stage(None, jnp.full_like(masks, -20.0), None),))
    assert loss_of(blank, batch).measures["matched"] == 0


def test_a_batch_without_any_segment_is_finite(batch):
    segment_map, *labels = batch.targets
    nothing = PanopticTargets(np.zeros_like(segment_map), *(0 * x + EMPTY for x in labels))
    output, empty = make_output(2), batch._replace(targets=nothing)
    judgement = loss_of(output, empty)
    assert all(np.isfinite(value) for value in jax.tree.leaves(judgement))
    assert judgement.terms["loss/stage2/label"] > 0 and judgement.terms["loss/stage2/mask"] == 0
    assert (slots_of(output, empty) == EMPTY).all() and judgement.measures["matched"] == 0


def test_panoptic_without_stuff_is_instance():
    """The same things once as a map and once as bits: the same segments, matching and terms."""
    slots = 4
    batch = make_batch(slots=slots)
    segment_map, labels, stuff = batch.targets
    segment_map = np.where(segment_map <= slots, segment_map, 0)
    masks = segment_map[:, None] == np.arange(1, 1 + slots)[:, None, None]
    batches = {
        "panoptic": batch._replace(targets=PanopticTargets(segment_map, labels, stuff[:, :0])),
        "instance": batch._replace(targets=InstanceTargets(np.packbits(masks, axis=3), labels)),
    }
    output = make_output(2, n=NUM_PROPOSALS, k=NUM_THINGS)
    results = {
        task: (
            TASKS[task].unpack(one.targets),
            slots_of(output, one, task),
            loss_of(output, one, task=task),
        )
        for task, one in batches.items()
    }
    jax.tree.map(np.testing.assert_array_equal, *results.values())
    assert (results["instance"][1] != EMPTY).any()
    assert min(results["instance"][2].terms.values()) > 0


# Classes of pixels.

LABELS = SemanticTargets(np.random.default_rng(0).integers(0, 5, (2, 32, 48)).astype(np.uint8))


def semantic_output(num_stages, dense, side=8):
    """Masks of 4 classes at stride `side` of a picture of 32 x 48."""
    h, w = 32 // side, 48 // side
    masks = [random(2, 4, h, w, seed=s, scale=2) for s in range(num_stages + 1)]
    stages = tuple(Stage(None, one, None) for one in masks)
    return Output(stages, random(2, 4, h // 2, w // 2, seed=9) if dense else None)


judge_labels = jax.jit(semantic_loss)


def judge(output, targets, weights=WEIGHTS):
    labels = unpack_semantic(targets)
    return judge_labels(output, labels, count_labels(labels), weights=weights)


def full_size(logits, height, width):
    rows = resample(np.asarray(logits, float), 2, height, logits.shape[2] / height)
    return resample(rows, 3, width, logits.shape[3] / width)


def cross_entropy(logits, label_map):
    """Mean over all pixels; ignored ones count with zero."""
    full, total = full_size(logits, *label_map.shape[1:]), 0.0
    for i, y, x in np.ndindex(label_map.shape):
        if label_map[i, y, x]:
            z = full[i, :, y, x]
            total += np.log(np.exp(z).sum()) - z[label_map[i, y, x] - 1]
    return total / label_map.size


def test_labels_are_classes_or_empty():
    label_map = np.array([[[0, 1], [4, 2]]], np.uint8)
    labels = unpack_semantic(SemanticTargets(label_map))
    assert labels.dtype == jnp.int32 and labels.tolist() == [[[EMPTY, 0], [3, 1]]]
    wide = SemanticTargets(np.full((1, 2, 2), 300, np.uint16))
    assert (unpack_semantic(wide) == 299).all()
    counts = count_labels(labels)
    assert (counts.images, counts.pixels, counts.things, counts.segments) == (1, 3, 0, 0)


@pytest.mark.parametrize("num_stages, dense", [(0, False), (2, True)])
def test_semantic_loss_is_the_cross_entropy_at_full_size(num_stages, dense):
    output = semantic_output(num_stages, dense)
    weights = WEIGHTS._replace(mask=2.0, dense=0.4)
    terms = judge(output, LABELS, weights).terms
    wanted = {"loss/initial/mask": 2 * cross_entropy(output.stages[0].masks, LABELS.label_map)}
    for s in range(1, num_stages + 1):
        masks = output.stages[s].masks
        wanted[f"loss/stage{s}/mask"] = 2 * cross_entropy(masks, LABELS.label_map)
    if dense:
        wanted["loss/dense"] = 0.4 * cross_entropy(output.dense, LABELS.label_map)
    assert terms.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(terms[name], value, rtol=1e-5, err_msg=name)


def test_nothing_labelled_is_a_finite_loss_of_zero():
    output = semantic_output(2, True)
    empty = SemanticTargets(np.zeros_like(LABELS.label_map))
    judgement = judge(output, empty)
    assert all(value == 0 for value in jax.tree.leaves(judgement))
    grads = jax.grad(lambda output: sum(judge(output, empty).terms.values()))(output)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(grads))


def test_accuracy_is_that_of_the_last_stage_on_labelled_pixels():
    output = semantic_output(2, True)
    full = full_size(output.stages[-1].masks, 32, 48)
    labelled = LABELS.label_map > 0
    right = (full.argmax(1) + 1 == LABELS.label_map)[labelled]
    assert 0.1 < right.mean() < 0.5
    accuracy = judge(output, LABELS).measures["accuracy"]
    np.testing.assert_allclose(accuracy, right.mean(), atol=2e-4)
    perfect = SemanticTargets(np.where(labelled, full.argmax(1) + 1, 0).astype(np.uint8))
    np.testing.assert_allclose(judge(output, perfect).measures["accuracy"], 1, atol=2e-3)


def test_parts_of_a_semantic_batch_add_up():
    output = semantic_output(2, True)
    labels = unpack_semantic(LABELS)
    whole = count_labels(labels)
    parts = [count_labels(part(labels, i, i + 1)) for i in range(2)]
    assert jax.tree.map(lambda *c: int(sum(c)), *parts) == jax.tree.map(int, whole)
    judged = [
        judge_labels(part(output, i, i + 1), part(labels, i, i + 1), whole, weights=WEIGHTS)
        for i in range(2)
    ]
    added = jax.tree.map(lambda *x: sum(x), *judged)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), added, judge(output, LABELS)
    )
