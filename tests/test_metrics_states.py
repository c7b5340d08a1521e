"""Counts of pictures that several processes have seen."""

import numpy as np
import pytest

from knet_jax.metrics import instance, panoptic, semantic
from knet_jax.metrics.counts import Tally
from knet_jax.segmentation import rle
from knet_jax.segmentation.segments import Categories, Instance
from knet_jax.system import processes

LARGE = 2**40 + 1
"""Neither an int32 nor a float32 can hold it."""


def counts_of(picture: int) -> dict:
    """Counts of every metric for one picture; the lengths of AP's differ."""
    counts = (np.full(3, LARGE + picture),) * 3
    mask = rle.encode(np.ones((4, 5), np.uint8))
    found = (Instance(mask, 1, 0.1),) * (1 + 2 * picture)
    return {
        panoptic: panoptic.PQCounts(1 / np.array([3.0, 7.0, 3.0 + picture]), *counts),
        semantic: semantic.PixelCounts(*counts),
        instance: instance.count((Instance(mask, 1),), found, 3, image_id=LARGE - picture),
    }


@pytest.mark.parametrize("metric", [panoptic, semantic, instance])
def test_counts_do_not_depend_on_who_saw_which_picture(metric, monkeypatch):
    """Sums of floats depend on their order; that of the pictures is the same whatever came first."""
    pictures = {i: counts_of(i)[metric] for i in range(7)}
    monkeypatch.setattr(metric, "count", lambda truth, *_: truth)
    tally = Tally(metric, Categories(("cat", "dog", "sky"), (1, 2, 3), 2))
    for i, counts in pictures.items():
        tally.add(i, counts, None, i)
    alone = tally.total()
    for shares in (((3, 1, 0, 6, 2, 5, 4),), ((4, 2, 0, 6), (5, 3, 1)), ((), tuple(range(7)))):
        told = [{i: pictures[i] for i in share} for share in shares]
        monkeypatch.setattr(processes, "exchange", lambda _, told=told: told)
        for a, b in zip(tally.total(), alone, strict=True):
            np.testing.assert_array_equal(a, b)
            assert a.dtype == b.dtype and a.shape == b.shape
