from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plain import plain_probabilities, to_picture

from knet_jax.inference.postprocess import (
    Instances,
    predict_instances,
    predict_labels,
    read_instances,
)
from knet_jax.inference.resampling import ResultCanvas
from knet_jax.segmentation import rle
from knet_jax.structs import EMPTY, Pass, Stage

# The input is 64 x 96. Pictures that are larger, smaller, cropped, one pixel wide.
SIZES = [
    ((64, 96), (64, 96)),
    ((61, 93), (61, 93)),
    ((64, 85), (97, 129)),
    ((33, 96), (50, 146)),
    ((64, 49), (300, 230)),
    ((64, 96), (7, 11)),
    ((1, 96), (3, 250)),
    ((64, 1), (200, 5)),
]


def make_pass(masks, logits, size, inside, mirrored=None):
    """A pass over pictures on a canvas of the height and width `inside`."""
    masks, size = jnp.asarray(masks, jnp.float32), np.asarray(size, np.int32)
    mirrored = np.zeros(len(size), bool) if mirrored is None else np.array(mirrored)
    return Pass(Stage(None, masks, logits), size, np.array([inside] * len(size)), mirrored)


def run(predict, passes, original_size, canvas=None, **options):
    original_size = np.asarray(original_size, np.int32)
    canvas = canvas or ResultCanvas.of(np.max([seen.size for seen in passes], 0), original_size)
    predict = jax.jit(partial(predict, canvas=canvas, **options))
    return jax.device_get(predict(passes, original_size))


def ours_instances(masks, logits, size, original_size, num_results=100, threshold=0.0):
    seen = make_pass(masks, jnp.asarray(logits, jnp.float32), size, (64, 96))
    options = {"num_results": num_results, "instance_threshold": threshold}
    return run(predict_instances, [seen], original_size, **options)


def unpack(bits, original_size):
    """The masks [r, H, W] of a picture."""
    height, width = original_size
    return np.unpackbits(bits, axis=2).transpose(0, 2, 1)[:, :height, :width].astype(bool)


def plain_instances(masks, logits, size, original_size, num_results):
    """[(score, label, kernel)], best first, and the probabilities of all masks."""
    scores = 1 / (1 + np.exp(-np.asarray(logits, float)))
    pairs = [(scores[n, k], k, n) for n, k in np.ndindex(scores.shape)]
    pairs.sort(key=lambda pair: -pair[0])
    return pairs[:num_results], plain_probabilities(masks, size, original_size)


def check_instances(masks, logits, size, original_size, num_results=100):
    """Compares every picture of a batch with the second implementation; returns ours."""
    best = ours_instances(masks, logits, size, original_size, num_results)
    for i, original in enumerate(original_size):
        wanted, probs = plain_instances(masks[i], logits[i], size[i], original, num_results)
        assert len(best.scores[i]) == len(wanted)
        scores, labels, kernels = (np.array(column) for column in zip(*wanted))
        np.testing.assert_allclose(best.scores[i], scores, rtol=1e-5)
        np.testing.assert_array_equal(best.labels[i], labels)
        np.testing.assert_array_equal(best.kernels[i], kernels)
        ours = unpack(best.bits[i], original)
        unsure = abs(probs[kernels] - 0.5) < 1e-5  # rounding may decide here
        assert unsure.mean() < 0.01
        assert not ((ours != (probs[kernels] > 0.5)) & ~unsure).any()
    return best


def case(seed, b, n, k, h=8, w=12):
    rng = np.random.default_rng(seed)
    masks = rng.normal(0, 4, (b, n, h, w)).astype(np.float32)
    return masks, rng.normal(0, 2, (b, n, k)).astype(np.float32)


# Instances.


def test_instances_equal_the_reference_at_any_size():
    """All in one batch, so on the canvas of the largest."""
    sizes, original_sizes = zip(*SIZES)
    masks, logits = case(0, len(SIZES), 6, 3)
    assert ResultCanvas.of(np.array(sizes), np.array(original_sizes))[:2] == (384, 256)
    best = check_instances(masks, logits, sizes, original_sizes)
    assert best.bits.shape == (len(SIZES), 18, 256, 384 // 8)
    assert best.labels.dtype == best.kernels.dtype == np.int32
    few = check_instances(masks[:1], logits[:1], sizes[:1], original_sizes[:1], num_results=9)
    assert len(set(few.kernels[0].tolist())) < 9  # of six: some stand for several classes


def test_a_probability_of_one_half_is_not_inside():
    masks = np.zeros((1, 2, 8, 12), np.float32)
    masks[0, 1] = 1e-3
    best = ours_instances(masks, [[[2.0], [1.0]]], [(64, 96)], [(64, 96)])
    drawn = unpack(best.bits[0], (64, 96))
    assert not drawn[0].any() and drawn[1].all()


def test_masks_below_a_threshold_are_left_out():
    """In a batch whose second picture needs more groups than the first."""
    masks, logits = case(5, 2, 20, 3)
    logits[0] -= 2
    args = masks, logits, [(64, 96)] * 2, [(50, 70)] * 2
    every = ours_instances(*args, num_results=30)
    threshold = float(np.median(every.scores[1]))
    some = ours_instances(*args, num_results=30, threshold=threshold)
    for name in ("scores", "kernels"):
        np.testing.assert_array_equal(getattr(every, name), getattr(some, name))
    good = every.scores >= threshold
    np.testing.assert_array_equal(some.labels, np.where(good, every.labels, EMPTY))
    assert good[0].sum() < 8 < good[1].sum() < 30
    np.testing.assert_array_equal(every.bits[good], some.bits[good])
    assert every.bits[:, 24:].any() and not some.bits[:, 24:].any()
    assert not ours_instances(*args, num_results=30, threshold=1.1).bits.any()


def test_instances_share_the_masks_of_their_kernels():
    masks = np.random.default_rng(0).random((3, 9, 14)) < 0.4
    masks[2] = False
    kernels = np.array([2, 0, 2, 1, 0], np.int32)
    # A canvas of 16 x 16 around a picture of 9 x 14; what lies beyond has no meaning.
    padded = np.ones((5, 16, 16), bool)
    padded[:, :14, :9] = masks[kernels].transpose(0, 2, 1)
    scores, labels = np.float32([0.5, 0.25, 0.125, 0.0625, 0.01]), np.array([5, 1, 6, 0, EMPTY])
    found = read_instances(
        Instances(scores, labels, kernels, np.packbits(padded, axis=2)), np.array([9, 14])
    )
    assert [one.label for one in found] == [5, 1, 6, 0]  # the last is below the threshold
    assert [one.score for one in found] == scores[:4].tolist()
    for one, kernel in zip(found, kernels):
        np.testing.assert_array_equal(rle.decode(one.rle), masks[kernel])
        assert one.area == masks[kernel].sum() and not one.iscrowd
    assert found[0].rle is found[2].rle


# Label maps.


def check_labels(ours, scores, rounding=1e-4):
    """Compares a map with the best of the scores [k, H, W] of classes; returns the classes in it."""
    best = np.sort(scores, axis=0)
    unsure = best[-1] - best[-2] < rounding
    assert unsure.mean() < 0.01
    ours = ours[: scores.shape[1], : scores.shape[2]]
    assert ((ours == 1 + scores.argmax(0)) | unsure).all()
    return set(ours.ravel().tolist())


ODD = [((97, 131), (97, 131)), ((80, 131), (117, 200))]
"""Inputs are no multiples of the stride: a mask of 13 x 17 has pixels of 7.5, one of 25 x 33 of 3.9."""


@pytest.mark.parametrize(
    "inside, rows, columns, pictures",
    [
        ((64, 96), 8, 12, SIZES),
        ((64, 96), 16, 24, SIZES),
        ((97, 131), 13, 17, ODD),
        ((97, 131), 25, 33, ODD),
    ],
)
def test_label_maps_equal_the_reference_at_any_size(inside, rows, columns, pictures):
    sizes, original_sizes = zip(*pictures)
    masks, _ = case(rows, len(pictures), 7, 1, rows, columns)
    seen = make_pass(masks, None, sizes, inside)
    maps = run(predict_labels, [seen], original_sizes)
    assert maps.dtype == np.uint8
    found = set()
    for ours, logits, size, original in zip(maps, masks, sizes, original_sizes):
        found |= check_labels(ours, to_picture(np.asarray(logits, float), inside, size, original))
    assert found == set(range(1, 8))


@pytest.mark.parametrize("num_classes, dtype", [(255, np.uint8), (256, np.uint16)])
def test_no_class_is_too_large_for_the_map(num_classes, dtype):
    """The last class is 1 + (k - 1), and 0 stays free."""
    masks = np.zeros((1, num_classes, 1, 1), np.float32)
    masks[0, -1] = 1
    maps = run(predict_labels, [make_pass(masks, None, [(4, 4)], (4, 4))], [(4, 4)])
    assert maps.dtype == dtype and (maps == num_classes).all()


@pytest.mark.parametrize("stride", [4, 8])
def test_label_maps_of_scales_and_mirrored_pictures_average_probabilities(stride):
    """Against the plain way: resize logits, softmax, turn back, mean, argmax."""
    originals = [(97, 129), (50, 146), (7, 11), (3, 250)]
    sizes = {
        (64, 96): [(64, 85), (33, 96), (61, 93), (1, 96)],
        (96, 160): [(96, 128), (50, 146), (90, 140), (2, 144)],
    }
    rng, passes = np.random.default_rng(stride), []
    for (height, width), size in sizes.items():
        for turn in ([False] * 4, [True] * 4, [True, False, True, False]):
            masks = rng.normal(0, 4, (4, 5, height // stride, width // stride))
            passes.append(make_pass(masks, None, size, (height, width), turn))
    maps = run(predict_labels, passes, originals)
    for i, (height, width) in enumerate(originals):
        mean = 0
        for stage, size, inside, turn in passes:
            masks = np.asarray(stage.masks[i], float)
            full = to_picture(masks, inside[i], size[i], (height, width))
            probs = np.exp(full) / np.exp(full).sum(0)
            mean += (probs[:, :, ::-1] if turn[i] else probs) / len(passes)
        check_labels(maps[i], mean, rounding=1e-5)
