"""Calling a numpy function from inside a compiled program.

`jax.pure_callback` first turns the arguments into arrays of the CPU's client. Large ones are copied
by its threads, which on the CPU may all be waiting for the callback itself: a process with one core,
or with as many simulated devices as cores, then waits forever (test_host.py). Here the function gets
the numpy arrays of the runtime as they are.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import mlir

_host_call = Primitive("host_call")


def host_call(
    function: Callable[..., np.ndarray], shape: tuple[int, ...], dtype, *args: jax.Array
) -> jax.Array:
    """`function(*args)`, computed on the host, under `jit` and `pmap` too.

    Nothing is differentiated through it: arguments must come out of `jax.lax.stop_gradient`.

    Args:
        function: of read-only numpy arrays, without side effects.
        shape: of the result.
        dtype: of the result.
        args: of the function.
    """
    return _host_call.bind(*args, function=function, shape=shape, dtype=np.dtype(dtype))


@_host_call.def_impl
def _eager(*args, function, shape, dtype):
    return jax.numpy.asarray(function(*map(np.asarray, args)), dtype).reshape(shape)


@_host_call.def_abstract_eval
def _abstract(*_, shape, dtype, **__):
    return ShapedArray(shape, dtype)


def _lower(context, *args, function, **_):
    results, _, _ = mlir.emit_python_callback(
        context,
        lambda *arrays: (function(*arrays),),
        None,
        list(args),
        context.avals_in,
        context.avals_out,
        has_side_effect=False,
        returns_token=False,
    )
    return results


mlir.register_lowering(_host_call, _lower)
