import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import make_segments, part, random

from knet_jax import losses, matching
from knet_jax.objectives import KernelTargets, count_segments
from knet_jax.structs import EMPTY, Segments

B, N, H, W, T, Q = 3, 6, 8, 7, 3, 2  # T thing classes, Q stuff classes and kernels
P = N - Q  # proposals
# Of the kernels: a full image, one without things, one without anything.
LABELS = np.array(
    [[0, EMPTY, 2, 1, 3, EMPTY], [EMPTY, EMPTY, EMPTY, EMPTY, 3, 4], [EMPTY] * 6], np.int32
)


@pytest.fixture(scope="module")
def targets():
    return make_segments(B, N, H, W, LABELS)


@pytest.fixture(scope="module")
def masks():
    return random(B, N, H, W, seed=1, scale=2)


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, float)))


def focal(logit, target):
    p = sigmoid(logit)
    return -0.25 * (1 - p) ** 2 * np.log(p) if target else -0.75 * p**2 * np.log(1 - p)


# Every term against its formula.


def test_mask_loss(masks, targets):
    total = 0
    for i, n in zip(*np.nonzero(LABELS != EMPTY)):
        p, t = sigmoid(masks[i, n]), np.asarray(targets.masks[i, n])
        total += -(t * np.log(p) + (1 - t) * np.log(1 - p)).mean()
    np.testing.assert_allclose(losses.mask_loss(masks, targets, 5), total / 5, rtol=1e-5)


def test_dice_loss(masks, targets):
    total = 0
    for i, n in zip(*np.nonzero(LABELS != EMPTY)):
        p, t = sigmoid(masks[i, n]), np.asarray(targets.masks[i, n])
        total += 1 - 2 * (p * t).sum() / ((p**2).sum() + 1e-3 + (t**2).sum() + 1e-3)
    np.testing.assert_allclose(losses.dice_loss(masks, targets, 5), total / 5, rtol=1e-5)


def owner_of(targets, i, y, x, kernels):
    """The last of some kernels whose target touches a pixel."""
    return next(
        (n for n in reversed(kernels) if LABELS[i, n] != EMPTY and targets.masks[i, n, y, x] > 0),
        None,
    )


def test_rank_loss(masks, targets):
    total, logits = 0, np.asarray(masks, float)
    for i, y, x in np.ndindex(B, H, W):
        owner = owner_of(targets, i, y, x, range(N))
        if owner is not None:
            total += np.log(np.exp(logits[i, :, y, x]).sum()) - logits[i, owner, y, x]
    wanted = total / (B * H * W)
    np.testing.assert_allclose(losses.rank_loss(masks, targets, B), wanted, rtol=1e-5)


def test_pixel_loss(masks):
    owner = np.random.default_rng(0).integers(-1, N, (B, H, W))
    assert EMPTY in owner
    total, logits = 0, np.asarray(masks, float)
    for i, y, x in np.ndindex(B, H, W):
        if owner[i, y, x] != EMPTY:
            z = logits[i, :, y, x]
            total += np.log(np.exp(z).sum()) - z[owner[i, y, x]]
    ours = losses.pixel_loss(masks, jnp.asarray(owner), 5)  # images of the whole step
    np.testing.assert_allclose(ours, total / (5 * H * W), rtol=1e-5)


def test_label_loss(targets):
    logits = random(B, N, T + Q, seed=2, scale=3)
    total = 0
    for i, n, k in np.ndindex(B, N, T + Q):
        judged = k < T if n < P else k == T + n - P
        if judged:
            total += focal(logits[i, n, k], LABELS[i, n] == k)
    wanted = total / 7
    ours = losses.label_loss(logits, jnp.asarray(LABELS), T, 7)
    np.testing.assert_allclose(ours, wanted, rtol=1e-5)


def test_dense_loss(targets):
    dense = random(B, T + Q, H, W, seed=3, scale=3)
    total = 0
    for i, y, x in np.ndindex(B, H, W):
        owner = owner_of(targets, i, y, x, range(P))  # things lie above stuff
        if owner is None:
            owner = owner_of(targets, i, y, x, range(P, N))
        label = None if owner is None else LABELS[i, owner]
        total += sum(focal(dense[i, k, y, x], k == label) for k in range(T + Q))
    ours = losses.dense_loss(dense, targets, P, 11)
    np.testing.assert_allclose(ours, total / 11, rtol=1e-5)


def test_num_found(targets):
    wanted = np.asarray(targets.masks) >= 0.5
    drawn = wanted.copy()
    drawn[0, 0] = ~wanted[0, 0]  # missed
    drawn[0, 2] = False
    pixels = np.argwhere(wanted[0, 2])
    half = pixels[: len(pixels) // 2]  # an IoU of at most one half is not enough
    drawn[(0, 2, *half.T)] = True
    assert losses.num_found(jnp.where(drawn, 1.0, -1.0), targets) == 4
    drawn[(0, 2, *pixels[: len(pixels) // 2 + 1].T)] = True
    assert losses.num_found(jnp.where(drawn, 1.0, -1.0), targets) == 5


# Targets.


def test_kernel_targets_follow_the_matching():
    things = make_segments(2, 3, H, W, [[2, 0, EMPTY], [1, EMPTY, EMPTY]])
    stuff = make_segments(2, Q, H, W, [[3, EMPTY], [3, 4]], seed=5)
    slots = jnp.array([[EMPTY, 1, 0, EMPTY], [EMPTY, EMPTY, EMPTY, 0]])
    targets = losses.kernel_targets(things, stuff, slots)
    assert targets.labels.tolist() == [
        [EMPTY, 0, 2, EMPTY, 3, EMPTY],
        [EMPTY, EMPTY, EMPTY, 1, 3, 4],
    ]
    np.testing.assert_array_equal(targets.masks[0, 1], things.masks[0, 1])
    np.testing.assert_array_equal(targets.masks[0, 2], things.masks[0, 0])
    np.testing.assert_array_equal(targets.masks[1, 3], things.masks[1, 0])
    np.testing.assert_array_equal(targets.masks[:, P:], stuff.masks)
    assert not targets.masks[0, jnp.array([0, 3])].any() and not targets.masks[1, :3].any()


def test_counts():
    things = make_segments(2, 3, H, W, [[2, 0, 1], [1, EMPTY, EMPTY]])
    stuff = make_segments(2, Q, H, W, [[3, EMPTY], [EMPTY, EMPTY]], seed=5)
    counts = count_segments(KernelTargets(things, stuff))
    assert (counts.images, counts.things, counts.segments) == (2, 3 + 1, 4 + 1)
    covered = (np.asarray(things.masks)[0] > 0).any(0) | (np.asarray(stuff.masks)[0, 0] > 0)
    assert counts.pixels == covered.sum() + (np.asarray(things.masks)[1, 0] > 0).sum()


# Properties of all terms.

TERMS = ("mask", "dice", "rank", "label", "dense")


@jax.jit
def every_term(masks, logits, dense, targets, counts):
    return {
        "mask": losses.mask_loss(masks, targets, counts.segments),
        "dice": losses.dice_loss(masks, targets, counts.segments),
        "rank": losses.rank_loss(masks, targets, counts.images),
        "label": losses.label_loss(logits, targets.labels, T, counts.segments),
        "dense": losses.dense_loss(dense, targets, P, counts.pixels),
    }


@jax.jit
def gradients(predictions, targets):
    """Value and gradient of the sum of all terms."""
    counts = count(targets)
    return jax.value_and_grad(lambda p: sum(every_term(*p, targets, counts).values()))(predictions)


def predictions(b=B):
    return random(b, N, H, W), random(b, N, T + Q, seed=1), random(b, T + Q, H, W, seed=2)


def count(targets):
    return count_segments(KernelTargets(part(targets, 0, P, axis=1), part(targets, P, N, axis=1)))


def test_parts_of_a_batch_add_up(targets):
    counts = count(targets)
    per_image = [count(part(targets, i, i + 1)) for i in range(B)]
    assert jax.tree.map(lambda *c: int(sum(c)), *per_image) == jax.tree.map(int, counts)
    whole = every_term(*predictions(), targets, counts)
    parts = [every_term(*part((*predictions(), targets), i, i + 1), counts) for i in range(B)]
    for name in TERMS:
        np.testing.assert_allclose(sum(one[name] for one in parts), whole[name], rtol=1e-5)


def test_terms_are_finite_without_things_without_segments_and_far_from_zero(targets):
    for size, start in (1, 0), (1, 1), (1, 2), (1e2, 0), (1e4, 0):
        scaled = jax.tree.map(lambda x, size=size: size * x, predictions(1))
        value, grads = gradients(scaled, part(targets, start, start + 1))
        assert np.isfinite(value), (size, start)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads)), (size, start)
    # Without a segment only the classes are judged: all are wrong.
    empty = part(targets, 2, 3)
    terms = every_term(*predictions(1), empty, count(empty))
    assert {name for name in TERMS if terms[name] > 0} == {"label", "dense"}


def test_costs_of_bfloat16_masks_are_those_of_the_same_numbers():
    rng = np.random.default_rng(0)
    masks = jnp.asarray(rng.normal(0, 3, (2, 3, 60, 90)), jnp.bfloat16)
    wanted = Segments(jnp.asarray(rng.integers(0, 5, masks.shape) / 4, jnp.bfloat16), None)
    weights = matching.LossWeights(mask=1.0, dice=4.0, label=2.0, rank=0.1, dense=1.0)
    narrow, wide = (
        matching.matching_cost(masks.astype(dtype), None, wanted, weights)
        for dtype in (jnp.bfloat16, jnp.float32)
    )
    assert narrow.dtype == jnp.float32
    np.testing.assert_allclose(narrow, wide, rtol=1e-6)


def test_quarters_in_half_of_the_memory_change_no_loss_and_no_cost():
    rng = np.random.default_rng(0)
    masks = rng.normal(0, 3, (1, 3, 40, 40)).astype(np.float32)
    quarters = (rng.integers(0, 5, masks.shape) / 4).astype(np.float32)
    labels = np.array([[0, 1, 1]], np.int32)
    weights = matching.LossWeights(mask=1.0, dice=4.0, label=2.0, rank=0.1, dense=1.0)

    def judge(dtype):
        wanted = Segments(jnp.asarray(quarters, dtype), labels)
        return (
            losses.mask_loss(masks, wanted, 3),
            losses.dice_loss(masks, wanted, 3),
            matching.matching_cost(masks, None, wanted, weights),
        )

    for narrow, wide in zip(judge(jnp.bfloat16), judge(jnp.float32)):
        np.testing.assert_array_equal(narrow, wide)


@pytest.mark.parametrize("term", ["mask", "dice", "rank", "dense"])
def test_masks_of_bfloat16_are_judged_in_float32(term):
    rng = np.random.default_rng(0)
    masks = jnp.asarray(rng.normal(0, 3, (2, 3, 60, 90)), jnp.bfloat16)
    shares = jnp.asarray(rng.integers(0, 5, masks.shape) / 4, jnp.bfloat16)
    wanted = Segments(shares, np.array([[0, 1, 2], [1, -1, 0]], np.int32))
    judge = {
        "mask": lambda masks: losses.mask_loss(masks, wanted, 5),
        "dice": lambda masks: losses.dice_loss(masks, wanted, 5),
        "rank": lambda masks: losses.rank_loss(masks, wanted, 2),
        "dense": lambda masks: losses.dense_loss(masks, wanted, 2, 10800),
    }[term]
    (narrow, grad), (wide, wide_grad) = (
        jax.value_and_grad(judge)(masks.astype(dtype)) for dtype in (jnp.bfloat16, jnp.float32)
    )
    assert narrow.dtype == wide.dtype and grad.dtype == masks.dtype
    np.testing.assert_allclose(narrow, wide, rtol=1e-6)
    size = np.abs(wide_grad).max()
    np.testing.assert_allclose(grad.astype(float) / size, wide_grad / size, atol=2**-8)


def test_the_gradient_of_softplus_is_the_sigmoid():
    x = np.linspace(-30, 30, 61, dtype=np.float32)
    np.testing.assert_array_equal(losses.softplus(x), jax.nn.softplus(x))
    ours, wanted = (jax.vmap(jax.grad(f))(x) for f in (losses.softplus, jax.nn.softplus))
    np.testing.assert_allclose(ours, wanted, rtol=1e-5)
