"""The linear assignment problem, solved inside a compiled program.

Shortest augmenting paths, as D. F. Crouse, "On implementing 2D rectangular assignment algorithms",
IEEE Transactions on Aerospace and Electronic Systems 52(4), 2016, and as
`scipy.optimize.linear_sum_assignment`, whose choices among equal costs are the same here. A call of
scipy from the program would keep the program out of JAX's cache on disk, and must wait for the
device.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

NONE = -1


def assign(cost: jax.Array, takes_part: jax.Array) -> jax.Array:
    """The assignment of rows to different columns whose sum of costs is least.

    Args:
        cost: finite, [..., m, n] with m <= n; computed in double precision, whatever its own.
        takes_part: bool [..., m], the rows that are assigned.

    Returns:
        int32 [..., n]: the row of each column, or -1.
    """
    m, n = cost.shape[-2:]
    assert m <= n, "more rows than columns"
    if m == 0:
        return jnp.full((*cost.shape[:-2], n), NONE, jnp.int32)
    # All problems go through their rows together, as far as the last row that takes part in any.
    num_rows = jnp.max(takes_part * jnp.arange(1, m + 1, dtype=jnp.int32))
    with jax.enable_x64(True):
        solve = jnp.vectorize(_assign, signature="(m,n),(m),()->(n)")
        return solve(cost.astype(jnp.float64), takes_part, num_rows)


def _assign(cost: jax.Array, takes_part: jax.Array, num_rows: jax.Array) -> jax.Array:
    """`assign`, for one problem. Indices are int32, so that all is as it is outside `enable_x64`."""
    m, n = cost.shape

    def add(row, state):
        u, v, row_of, column_of = state  # prices of rows and columns, and the assignment so far
        least, distance, origin, is_reached, sink = _shortest_path(cost, u, v, row_of, row)
        change = jnp.where(is_reached, least - distance, 0)
        u = u + jnp.where(column_of == NONE, 0, change[column_of])
        u = u.at[row].add(least)

        def turn(state):
            column, row_of, column_of = state
            i = origin[column]
            before = jnp.where(i == row, NONE, column_of[i])
            return before, row_of.at[column].set(i), column_of.at[i].set(column)

        path = sink, row_of, column_of
        _, row_of, column_of = jax.lax.while_loop(lambda s: s[0] != NONE, turn, path)
        return u, v - change, row_of, column_of

    def visit(row, state):
        return jax.lax.cond(takes_part[row], lambda: add(row, state), lambda: state)

    nobody = jnp.full(n, NONE, jnp.int32), jnp.full(m, NONE, jnp.int32)
    state = jnp.zeros(m, cost.dtype), jnp.zeros(n, cost.dtype), *nobody
    return jax.lax.fori_loop(0, num_rows, visit, state)[2]


def _shortest_path(cost, u, v, row_of, row):
    """Dijkstra's search from a row to the nearest column that nobody has.

    Returns:
        Its distance; the distance of every column, the row before it on the way there, and whether
        the search has settled it; and the column.
    """
    n = len(v)

    def settle(state):
        i, least, distance, origin, place, num_left, _ = state
        through = least + cost[i] - u[i] - v
        is_open = place != NONE
        is_nearer = is_open & (through < distance)
        distance = jnp.where(is_nearer, through, distance)
        origin = jnp.where(is_nearer, i, origin)

        # Of the nearest columns the last one in line that nobody has, else the first one in line.
        ahead = jnp.where(is_open, distance, jnp.inf)
        least = ahead.min()
        rank = jnp.where(row_of == NONE, n + place, n - 1 - place)
        rank = jnp.where(is_open & (ahead == least), rank, NONE)
        column = jax.lax.argmax(rank, 0, jnp.int32)

        # The last in line takes the place of the one that leaves it.
        num_left = num_left - 1
        place = jnp.where(place == num_left, place[column], place).at[column].set(NONE)
        i = row_of[column]
        return i, least, distance, origin, place, num_left, jnp.where(i == NONE, column, NONE)

    line = jnp.arange(n - 1, -1, -1, dtype=jnp.int32)
    state = (
        row,
        jnp.zeros((), cost.dtype),
        jnp.full(n, jnp.inf, cost.dtype),
        jnp.full(n, NONE, jnp.int32),
        line,
        jnp.int32(n),
        jnp.int32(NONE),
    )
    _, least, distance, origin, place, _, sink = jax.lax.while_loop(
        lambda state: state[-1] == NONE, settle, state
    )
    return least, distance, origin, place == NONE, sink
