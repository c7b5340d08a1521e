import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import (
    NUM_PROPOSALS,
    NUM_STUFF,
    NUM_THINGS,
    WEIGHTS,
    make_batch,
    make_output,
    random,
)

from knet_jax.matching import match, matching_cost
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
    Sizes,
    Stage,
)
from knet_jax.tasks import TASKS

N, K = NUM_PROPOSALS + NUM_STUFF, NUM_THINGS + NUM_STUFF
SIZES = Sizes(NUM_PROPOSALS, NUM_THINGS, NUM_STUFF)
B, H, W = 4, 8, 8  # stride 8 of the pictures of `make_batch`


# Segments from maps.


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_masks_are_the_mean_of_the_sampled_pixels(dtype):
    targets = make_batch(seed=3).targets
    segment_map = targets.segment_map.astype(dtype)
    things, stuff = jax.jit(unpack_panoptic, static_argnums=1)(
        targets._replace(segment_map=segment_map), SIZES
    )
    m = targets.labels.shape[1] - NUM_STUFF
    assert things.masks.shape == (4, m, 16, 16) and stuff.masks.shape == (4, NUM_STUFF, 16, 16)
    np.testing.assert_array_equal(things.labels, targets.labels[:, :m])
    np.testing.assert_array_equal(stuff.labels, targets.labels[:, m:])
    masks = np.concatenate([things.masks, stuff.masks], axis=1)
    for i, s, y, x in np.ndindex(masks.shape):
        pixels = segment_map[i, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2]
        assert masks[i, s, y, x] == (pixels == 1 + s).mean()
    assert set(np.unique(masks)) > {0, 0.25, 0.5, 1}


def sample(masks):
    """The pixels that targets average, as `PanopticTargets` says. [H, W, …] -> [H/2, W/2, …]."""
    height, width = masks.shape[:2]
    sampled = np.zeros((height // 2, width // 2, *masks.shape[2:]), masks.dtype)
    for i, a, j, e in np.ndindex(height // 4, 2, width // 4, 2):
        sampled[2 * i + a, 2 * j + e] = masks[4 * i + 1 + a, 4 * j + 1 + e]
    return sampled


def quarter(mask):
    """A mask at stride 4 as an image library resizes it."""
    h, w = mask.shape[0] // 4, mask.shape[1] // 4
    return jax.image.resize(jnp.asarray(mask, jnp.float32), (h, w), "bilinear", antialias=False)


def test_segments_read_rows_and_columns_as_the_targets_say():
    """Row 2i + a of the map is the image's row 4i + 1 + a: built from an image-sized mask."""
    owner = np.random.default_rng(0).integers(0, 4, (32, 64))
    targets = PanopticTargets(sample(owner)[None].astype(np.uint8), np.array([[0, 1, 2]]))
    things, stuff = unpack_panoptic(targets, Sizes(5, 2, 1))
    for s, mask in enumerate([*things.masks[0], *stuff.masks[0]]):
        np.testing.assert_allclose(mask, quarter(owner == 1 + s), atol=1e-6)


def test_more_than_255_segments_fit():
    targets = PanopticTargets(np.full((1, 4, 4), 299, np.uint16), np.zeros((1, 300), np.int32))
    things, _ = unpack_panoptic(targets, Sizes(300, 80, 0))
    assert np.flatnonzero(things.masks.sum((0, 2, 3))).tolist() == [298]


# Segments from bits.


def test_bits_are_unpacked_one_by_one():
    packed = np.random.default_rng(0).integers(0, 256, (2, 3, 8, 4)).astype(np.uint8)
    labels = np.array([[2, 0, EMPTY], [1, EMPTY, EMPTY]], np.int32)
    things, stuff = jax.jit(unpack_instances, static_argnums=1)(
        InstanceTargets(packed, labels), Sizes(5, 3, 0)
    )
    assert things.masks.shape == (2, 3, 4, 16) and things.masks.dtype == jnp.float32
    np.testing.assert_array_equal(things.labels, labels)
    for i, m, y, x in np.ndindex(2, 3, 4, 16):
        count = 0
        for a, e in np.ndindex(2, 2):
            column = 2 * x + e
            count += packed[i, m, 2 * y + a, column // 8] >> (7 - column % 8) & 1
        assert things.masks[i, m, y, x] == count / 4
    assert stuff.masks.shape == (2, 0, 4, 16) and stuff.labels.shape == (2, 0)


def test_instances_may_overlap():
    masks = np.zeros((32, 64, 2), bool)
    masks[3:20, 5:40, 0] = masks[10:31, 20:63, 1] = True
    packed = np.packbits(sample(masks).transpose(2, 0, 1), axis=2)
    assert packed.shape == (2, 16, 64 // 16)
    things, _ = unpack_instances(InstanceTargets(packed[None], np.array([[0, 0]])), Sizes(5, 1, 0))
    for mask, ours in zip(masks.transpose(2, 0, 1), things.masks[0]):
        np.testing.assert_allclose(ours, quarter(mask), atol=1e-6)
    assert (things.masks[0] == 1).all(0).sum() > 5


@pytest.mark.parametrize("unpack, task", [(TASKS[t].unpack, t) for t in ("panoptic", "instance")])
def test_masks_have_the_type_of_the_network(unpack, task):
    with jax.enable_x64(True):
        things, stuff = unpack(make_batch(task=task).targets, SIZES, "float64")
        assert things.masks.dtype == stuff.masks.dtype == jnp.float64


# The loss of things and stuff.


def loss_of(output, batch, weights=WEIGHTS, sizes=SIZES, task="panoptic"):
    targets = TASKS[task].unpack(batch.targets, sizes)
    counts = count_segments(targets, sizes)
    return jax.jit(kernel_loss, static_argnames=("sizes", "weights"))(
        output, targets, counts, sizes=sizes, weights=weights
    )


def slots_of(output, batch, sizes=SIZES, task="panoptic"):
    targets = TASKS[task].unpack(batch.targets, sizes)
    return match_stages(output, targets.things, sizes, WEIGHTS)


@pytest.fixture(scope="module")
def batch():
    return make_batch()


INITIAL = {"loss/initial/mask", "loss/initial/dice", "loss/initial/rank", "loss/initial/dense"}


@pytest.mark.parametrize("num_stages", [0, 1, 3])
def test_terms_have_the_names_that_are_plotted(batch, num_stages):
    output = make_output(num_stages)
    judgement = loss_of(output, batch)
    wanted = INITIAL | {
        f"loss/stage{s}/{term}"
        for s in range(1, num_stages + 1)
        for term in ("label", "mask", "dice", "rank")
    }
    assert set(judgement.terms) == wanted and set(judgement.measures) == {"matched"}
    for value in jax.tree.leaves(judgement):
        assert np.isfinite(value) and value.shape == ()
    assert slots_of(output, batch).shape == (max(num_stages, 1), B, NUM_PROPOSALS)


def test_weights_multiply_their_terms(batch):
    output = make_output(1)
    plain = loss_of(output, batch).terms
    weights = WEIGHTS._replace(rank=3.0, dense=7.0)  # no part of the cost
    other = loss_of(output, batch, weights).terms
    for name, value in plain.items():
        term = name.rpartition("/")[2]
        factor = getattr(weights, term) / getattr(WEIGHTS, term)
        np.testing.assert_allclose(other[name], factor * value, rtol=1e-5)


def test_without_a_weight_there_is_no_rank_loss(batch):
    """It is a softmax over all kernels at every pixel: not computed in vain."""
    output = make_output(1)
    with_rank = loss_of(output, batch).terms
    without = loss_of(output, batch, WEIGHTS._replace(rank=0.0)).terms
    assert with_rank.keys() - without.keys() == {"loss/initial/rank", "loss/stage1/rank"}
    for name in without:
        np.testing.assert_allclose(without[name], with_rank[name], rtol=1e-6)


def test_a_stage_is_matched_by_the_stage_before(batch):
    output = make_output(3)
    slots = slots_of(output, batch)
    things, _ = unpack_panoptic(batch.targets, SIZES)
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


def test_stage_1_takes_the_matching_of_the_initial_masks(batch):
    output = make_output(2)
    assert (slots_of(output, batch)[0] == slots_of(make_output(0), batch)[0]).all()
    first = output.stages[0]
    output = output._replace(stages=(first, first._replace(logits=output.stages[1].logits)))
    terms = loss_of(output, batch).terms
    # Equal masks and equal matching; the stage has stuff besides.
    assert terms["loss/stage1/mask"] != terms["loss/initial/mask"]
    no_stuff = np.array(batch.targets.labels)
    no_stuff[:, -NUM_STUFF:] = EMPTY
    terms = loss_of(output, batch._replace(targets=batch.targets._replace(labels=no_stuff))).terms
    for term in ("mask", "dice"):
        np.testing.assert_allclose(
            terms[f"loss/stage1/{term}"], terms[f"loss/initial/{term}"], rtol=1e-5
        )


def test_initial_masks_of_stuff_are_not_judged(batch):
    """In the initial stage these are the class logits, which `dense` judges."""
    output = make_output(1)
    first = output.stages[0]
    other = first._replace(masks=first.masks.at[:, NUM_PROPOSALS:].add(5.0))
    terms = loss_of(output, batch).terms
    changed = loss_of(output._replace(stages=(other, output.stages[1])), batch).terms
    assert all(terms[name] == changed[name] for name in terms)


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
    things, _ = unpack_panoptic(batch.targets, SIZES)
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
    nothing = PanopticTargets(
        np.zeros_like(batch.targets.segment_map), np.full_like(batch.targets.labels, EMPTY)
    )
    output, empty = make_output(2), batch._replace(targets=nothing)
    judgement = loss_of(output, empty)
    assert all(np.isfinite(value) for value in jax.tree.leaves(judgement))
    assert judgement.terms["loss/stage2/label"] > 0 and judgement.terms["loss/stage2/mask"] == 0
    assert (slots_of(output, empty) == EMPTY).all() and judgement.measures["matched"] == 0


def test_panoptic_without_stuff_is_instance():
    """The same things once as a map and once as bits: the same segments, matching and terms."""
    sizes = Sizes(NUM_PROPOSALS, NUM_THINGS, 0)
    slots = 4
    batch = make_batch(slots=slots)
    segment_map, labels = batch.targets
    segment_map = np.where(segment_map <= slots, segment_map, 0)
    labels = labels[:, :slots]
    masks = segment_map[:, None] == np.arange(1, 1 + slots)[:, None, None]
    batches = {
        "panoptic": batch._replace(targets=PanopticTargets(segment_map, labels)),
        "instance": batch._replace(targets=InstanceTargets(np.packbits(masks, axis=3), labels)),
    }
    output = make_output(2, n=NUM_PROPOSALS, k=NUM_THINGS)
    results = {
        task: (
            TASKS[task].unpack(one.targets, sizes),
            slots_of(output, one, sizes, task),
            loss_of(output, one, sizes=sizes, task=task),
        )
        for task, one in batches.items()
    }
    jax.tree.map(np.testing.assert_array_equal, *results.values())
    assert (results["instance"][1] != EMPTY).any()
    assert min(results["instance"][2].terms.values()) > 0


# Classes of pixels.

SEMANTIC = Sizes(0, 0, 4)
LABELS = SemanticTargets(np.random.default_rng(0).integers(0, 5, (2, 32, 48)).astype(np.uint8))


def semantic_output(num_stages, dense, side=8):
    """Masks of 4 classes at stride `side` of a picture of 32 x 48."""
    h, w = 32 // side, 48 // side
    masks = [random(2, 4, h, w, seed=s, scale=2) for s in range(num_stages + 1)]
    stages = tuple(Stage(None, one, None) for one in masks)
    return Output(stages, random(2, 4, h // 2, w // 2, seed=9) if dense else None)


def judge(output, targets, weights=WEIGHTS):
    labels = unpack_semantic(targets, SEMANTIC)
    counts = count_labels(labels, SEMANTIC)
    return jax.jit(semantic_loss, static_argnames=("sizes", "weights"))(
        output, labels, counts, sizes=SEMANTIC, weights=weights
    )


def full_size(logits, height, width):
    """Bilinear with half-pixel centers, as matrices."""

    def matrix(large, small):
        weights = np.zeros((large, small))
        for i in range(large):
            source = max((i + 0.5) * small / large - 0.5, 0)
            lower = int(source)
            weights[i, lower] += 1 - (source - lower)
            weights[i, min(lower + 1, small - 1)] += source - lower
        return weights

    rows, columns = matrix(height, logits.shape[2]), matrix(width, logits.shape[3])
    return np.einsum("ih,bkhw,jw->bkij", rows, np.asarray(logits, float), columns)


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
    labels = unpack_semantic(SemanticTargets(label_map), SEMANTIC)
    assert labels.dtype == jnp.int32 and labels.tolist() == [[[EMPTY, 0], [3, 1]]]
    wide = SemanticTargets(np.full((1, 2, 2), 300, np.uint16))
    assert (unpack_semantic(wide, SEMANTIC) == 299).all()
    counts = count_labels(labels, SEMANTIC)
    assert (counts.images, counts.pixels, counts.things, counts.segments) == (1, 3, 0, 0)


@pytest.mark.parametrize("num_stages, dense", [(0, False), (1, True), (3, True)])
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


def test_ignored_pixels_count_in_the_mean():
    output = semantic_output(0, False)
    one = np.zeros_like(LABELS.label_map)
    one[0, 5, 7] = 3
    z = full_size(output.stages[0].masks, 32, 48)[0, :, 5, 7]
    wanted = (np.log(np.exp(z).sum()) - z[2]) / (2 * 32 * 48)
    terms = judge(output, SemanticTargets(one)).terms
    np.testing.assert_allclose(terms["loss/initial/mask"], wanted, rtol=1e-5)


def test_nothing_labelled_is_a_finite_loss_of_zero():
    output = semantic_output(2, True)
    empty = SemanticTargets(np.zeros_like(LABELS.label_map))
    judgement = judge(output, empty)
    assert all(value == 0 for value in jax.tree.leaves(judgement))
    grads = jax.grad(lambda output: sum(judge(output, empty).terms.values()))(output)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(grads))


def test_every_stage_gets_the_gradient_of_its_own_term():
    output = semantic_output(2, True)
    grads = jax.grad(lambda output: sum(judge(output, LABELS).terms.values()))(output)
    for masks in [stage.masks for stage in grads.stages] + [grads.dense]:
        assert np.isfinite(masks).all() and abs(masks).max() > 0
        # The derivative of a softmax: what is taken from one class is given to others.
        np.testing.assert_allclose(masks.sum(1), 0, atol=1e-6)


def test_accuracy_is_that_of_the_last_stage_on_labelled_pixels():
    output = semantic_output(1, False)
    full = full_size(output.stages[-1].masks, 32, 48)
    labelled = LABELS.label_map > 0
    right = (full.argmax(1) + 1 == LABELS.label_map)[labelled]
    assert 0.1 < right.mean() < 0.5
    accuracy = judge(output, LABELS).measures["accuracy"]
    np.testing.assert_allclose(accuracy, right.mean(), atol=2e-4)
    perfect = SemanticTargets(np.where(labelled, full.argmax(1) + 1, 0).astype(np.uint8))
    np.testing.assert_allclose(judge(output, perfect).measures["accuracy"], 1, atol=2e-3)


def test_parts_of_a_semantic_batch_add_up():
    output = semantic_output(1, True)
    labels = unpack_semantic(LABELS, SEMANTIC)
    whole = count_labels(labels, SEMANTIC)
    parts = [count_labels(labels[i : i + 1], SEMANTIC) for i in range(2)]
    assert jax.tree.map(lambda *c: int(sum(c)), *parts) == jax.tree.map(int, whole)
    judged = [
        semantic_loss(
            jax.tree.map(lambda x, i=i: x[i : i + 1], output),
            labels[i : i + 1],
            whole,
            SEMANTIC,
            WEIGHTS,
        )
        for i in range(2)
    ]
    added = jax.tree.map(lambda *x: sum(x), *judged)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), added, judge(output, LABELS)
    )
