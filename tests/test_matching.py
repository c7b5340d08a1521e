import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment
from tiny_model import WEIGHTS, make_segments, random

from knet_jax.matching import match, matching_cost
from knet_jax.structs import EMPTY

R, B, N, M = 3, 4, 7, 5
# Full, partly empty with gaps, one thing, none.
LABELS = np.array([[0, 1, 2, 0, 1], [EMPTY, 2, EMPTY, 0, EMPTY], [EMPTY] * 4 + [1], [EMPTY] * 5])


def solve(cost, labels):
    return np.asarray(jax.jit(match)(jnp.asarray(cost, jnp.float32), jnp.asarray(labels)))


@pytest.fixture
def cost():
    return np.array(random(R, B, N, M))


def test_equals_scipy_on_each_image(cost):
    slots = solve(cost, LABELS)
    assert slots.dtype == np.int32 and slots.shape == (R, B, N)
    for r in range(R):
        for i, labels in enumerate(LABELS):
            columns = [m for m in range(M) if labels[m] != EMPTY]
            wanted = np.full(N, EMPTY)
            for kernel, column in zip(*linear_sum_assignment(cost[r, i][:, columns])):
                wanted[kernel] = columns[column]
            np.testing.assert_array_equal(slots[r, i], wanted)


def test_values_without_meaning_change_nothing(cost):
    wanted = solve(cost, LABELS)
    for rubbish in -1e9, 1e9, np.nan, np.inf:
        spoiled = np.where(LABELS[None, :, None] == EMPTY, rubbish, cost)
        np.testing.assert_array_equal(solve(spoiled, LABELS), wanted)
    for bad in np.nan, np.inf, -np.inf:  # of a network that diverged
        spoiled = cost.copy()
        spoiled[0] = bad
        slots = solve(spoiled, LABELS)
        np.testing.assert_array_equal(slots[1:], wanted[1:])
        assert (slots[0, 0] != EMPTY).sum() == M


def test_nothing_to_match():
    slots = solve(np.zeros((R, B, N, 0)), np.zeros((B, 0), int))
    assert slots.shape == (R, B, N) and (slots == EMPTY).all()


# Costs.


def brute_force(masks, logits, targets, weights):
    """The formulas of the paper, pair by pair."""
    b, n, m = *masks.shape[:2], targets.masks.shape[1]
    cost = np.zeros((b, n, m))
    for i in range(b):
        for k in range(n):
            p = 1 / (1 + np.exp(-masks[i, k].astype(float)))
            for j in range(m):
                t = targets.masks[i, j].astype(float)
                agreement = ((p * t).sum() + ((1 - p) * (1 - t)).sum()) / t.size
                dice = 2 * (p * t).sum() / ((p**2).sum() + 1e-3 + (t**2).sum() + 1e-3)
                cost[i, k, j] = -weights.mask * agreement - weights.dice * dice
                if logits is not None:
                    c = 1 / (1 + np.exp(-float(logits[i, k, targets.labels[i, j]])))
                    positive = -np.log(c + 1e-12) * 0.25 * (1 - c) ** 2
                    negative = -np.log(1 - c + 1e-12) * 0.75 * c**2
                    cost[i, k, j] += weights.label * (positive - negative)
    return cost


def test_cost_equals_the_formulas():
    labels = np.array([[0, 1, 2], [2, EMPTY, 0]])
    targets = make_segments(2, 3, 6, 5, labels)
    masks, full = random(2, 4, 6, 5, scale=3), labels != EMPTY
    for weights in WEIGHTS, WEIGHTS._replace(mask=0.5, dice=3.0, label=1.5):
        for logits in random(2, 4, 3, seed=1, scale=3), None:
            ours = matching_cost(masks, logits, targets, weights)
            wanted = brute_force(*jax.tree.map(np.asarray, (masks, logits, targets)), weights)
            ours, wanted = (np.asarray(c).transpose(0, 2, 1)[full] for c in (ours, wanted))
            np.testing.assert_allclose(ours, wanted, rtol=1e-4, atol=1e-4)


def test_logits_far_from_zero_have_finite_costs():
    targets = make_segments(1, 2, 4, 4, [0, 1])
    for sign in (1, -1):
        masks, logits = sign * jnp.full((1, 3, 4, 4), 1e4), sign * jnp.full((1, 3, 2), 1e4)
        assert np.isfinite(matching_cost(masks, logits, targets, WEIGHTS)).all()


def test_matching_has_no_gradient_and_runs_inside_one():
    targets = make_segments(1, 2, 4, 4, [0, 1])

    def total(masks):
        slots = match(matching_cost(masks, None, targets, WEIGHTS)[None], targets.labels)
        return (masks * (slots[0] != EMPTY)[:, :, None, None]).sum()

    masks = random(1, 3, 4, 4)
    grad = jax.jit(jax.grad(total))(masks)
    assert sorted(grad.sum((2, 3))[0].tolist()) == [0, 16, 16]
