"""States of metrics as bytes, and gathered from several processes."""

import json
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from devices import FOLDER, environment

from knet_jax.metrics import instance, panoptic, semantic
from knet_jax.metrics.counts import from_bytes, gather, to_bytes
from knet_jax.segmentation import rle
from knet_jax.segmentation.segments import Instance

LARGE = 2**40 + 1
"""Neither an int32 nor a float32 can hold it."""


def states_of(process: int) -> dict:
    """A state of every metric, as one of several processes has it; the lengths of AP's differ."""
    counts = (np.full(3, LARGE + process),) * 3
    mask = rle.encode(np.ones((4, 5), np.uint8))
    found = (Instance(mask, 1, 0.1),) * (1 + 2 * process)
    return {
        panoptic: panoptic.PQCounts(np.array([1 / 3, 2.0, process]), *counts),
        semantic: semantic.PixelCounts(*counts),
        instance: instance.count((Instance(mask, 1),), found, 3, image_id=LARGE - process),
    }


def assert_same(first: tuple, second: tuple) -> None:
    assert type(first) is type(second)
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype and a.shape == b.shape


@pytest.mark.parametrize("metric", [panoptic, semantic, instance])
def test_states_travel_as_bytes(metric):
    for state in (states_of(1)[metric], metric.no_counts(3)):
        data = to_bytes(state)
        assert data.dtype == np.uint8 and data.ndim == 1
        assert_same(from_bytes(data, type(state)), state)
        # What arrives can be merged again.
        assert_same(metric.merge(from_bytes(data, type(state)), metric.no_counts(3)), state)


def test_one_process_has_everything():
    state = states_of(0)[panoptic]
    assert gather(state, panoptic.merge) is state


def gather_in_process(process: str, address: str) -> None:
    """Runs in each of two processes: prints its rank if all it gathers is as it should be."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, 2, int(process))
    for metric, state in states_of(int(process)).items():
        wanted = metric.merge(states_of(0)[metric], states_of(1)[metric])
        assert_same(gather(state, metric.merge), wanted)
    print(json.dumps(jax.process_index()))


@pytest.mark.slow
def test_two_processes_gather_exactly():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    code = "import sys, test_metrics_states as t; t.gather_in_process(*sys.argv[1:])"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(process), address],
            env=environment(1) | {"PYTHONPATH": f"{FOLDER}:{FOLDER.parent}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    try:
        for process, running in enumerate(processes):
            out, error = running.communicate(timeout=120)
            assert running.returncode == 0, error[-3000:]
            assert json.loads(out.splitlines()[-1]) == process
    finally:
        for running in processes:
            running.kill()
