"""Assignments equal to those of scipy, whose row is our row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from knet_jax.nn.assignment import NONE, assign

M, N = 9, 12
solve = jax.jit(assign)


def costs(kind, shape, seed):
    """Costs [*shape, M, N], of which all but the first kind have equal sums or nearly equal ones."""
    draw = np.random.default_rng(seed)
    random = draw.normal(size=(*shape, M, N))
    return {
        "random": random,
        "few values": draw.integers(0, 3, (*shape, M, N)),
        "twins": np.repeat(random[..., ::3], 3, -1),
        "rows and columns": random[..., :1] + random[..., :1, :] + 1e-6 * random,
        "equal": np.zeros((*shape, M, N)),
        "large and small": random * 10.0 ** draw.integers(-6, 7, (*shape, M, N)),
    }[kind].astype(np.float32)


@pytest.mark.parametrize(
    "kind", ["random", "few values", "twins", "rows and columns", "equal", "large and small"]
)
def test_equals_scipy_equal_costs_included(kind):
    cost = costs(kind, (50, 4), 0)
    takes_part = np.random.default_rng(1).random((4, M)) < [[1], [0.7], [0.3], [0]]
    wanted = np.full((50, 4, N), NONE)
    for index in np.ndindex(50, 4):
        (rows,) = np.nonzero(takes_part[index[1]])
        row, column = linear_sum_assignment(cost[index][rows])
        wanted[*index, column] = rows[row]
    found = solve(cost, takes_part)
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, wanted)


def test_as_many_rows_as_columns():
    cost = costs("few values", (50,), 2)[:, :, :M]
    found = np.asarray(solve(cost, np.ones((50, M), bool)))
    for one, rows in zip(cost, found):
        assert one[rows, np.arange(M)].sum() == one[linear_sum_assignment(one)].sum()
        assert sorted(rows) == [*range(M)]
