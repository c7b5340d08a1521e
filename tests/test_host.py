import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from knet_jax.nn.host_call import host_call


def cumulate(x, y):
    assert isinstance(x, np.ndarray) and isinstance(y, np.ndarray)
    return np.cumsum(x, axis=1, dtype=np.float32) + y


def call(x, y):
    return host_call(cumulate, x.shape, x.dtype, x, y)


def test_results_are_those_of_the_function():
    x, y = jnp.arange(6.0).reshape(2, 3), jnp.float32(2)
    wanted = np.cumsum(np.arange(6.0).reshape(2, 3), axis=1) + 2
    for run in (call, jax.jit(call), jax.jit(jax.jit(call))):
        result = run(x, y)
        assert result.dtype == jnp.float32
        np.testing.assert_array_equal(result, wanted)
    np.testing.assert_array_equal(jax.pmap(call)(x[None], y[None])[0], wanted)


def test_what_is_not_differentiated_may_depend_on_it():
    def loss(x):
        weight = call(jax.lax.stop_gradient(x), jnp.float32(1))
        return (weight * x).sum()

    x = jnp.arange(6.0).reshape(2, 3)
    np.testing.assert_array_equal(jax.jit(jax.grad(loss))(x), call(x, jnp.float32(1)))


def test_an_error_of_the_function_is_told():
    def fails(x):
        raise ValueError("no solution")

    with pytest.raises(Exception, match="no solution"):
        jax.block_until_ready(jax.jit(lambda x: host_call(fails, (), x.dtype, x))(jnp.zeros(3)))


MATCHING = """
import os, sys
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # before jax counts the cores
import jax, jax.numpy as jnp, numpy as np
from knet_jax.matching import match
assert jax.local_device_count() == int(sys.argv[1])

def run(x, y):
    cost = jnp.einsum("bnp,bmp->bnm", x, y)
    cost = jnp.stack([cost, 2 * cost, cost + 1])
    slots = match(cost, jnp.zeros(y.shape[:2], jnp.int32))
    return (slots * x.sum(-1)).sum() + cost.sum()

x = np.random.default_rng(0).normal(size=(jax.local_device_count(), 2, 100, 4096))
for _ in range(5):
    total = jax.pmap(run)(x, x)
    jnp.exp2(total[0]).block_until_ready()
print(np.asarray(total).shape)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
@pytest.mark.parametrize("num_devices", [1, 4])
def test_one_core_solves_large_assignments(num_devices):
    """Large arguments, and no thread that could copy them."""
    variables = {name: value for name, value in os.environ.items() if name != "NPROC"} | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={num_devices}",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    command = [sys.executable, "-c", MATCHING, str(num_devices)]
    done = subprocess.run(
        command, env=variables, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.stdout.strip() == f"({num_devices},)", done.stderr[-2000:]
