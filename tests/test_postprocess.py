from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plain import plain_probabilities, to_picture

from knet_jax.inference.postprocess import best_instances, label_maps
from knet_jax.inference.resampling import Canvas
from knet_jax.structs import Pass, Stage

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


def ours_instances(masks, logits, size, original_size, num_results=100, canvas=None, threshold=0.0):
    size, original_size = np.asarray(size, np.int32), np.asarray(original_size, np.int32)
    run = partial(
        best_instances,
        canvas=canvas or Canvas.of(size, original_size),
        num_results=num_results,
        threshold=threshold,
    )
    masks, logits = jnp.asarray(masks, jnp.float32), jnp.asarray(logits, jnp.float32)
    return jax.device_get(jax.jit(run)(masks, logits, size, original_size))


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


def check_instances(masks, logits, size, original_size, num_results=100, canvas=None):
    """Compares every picture of a batch with the second implementation; returns ours."""
    best = ours_instances(masks, logits, size, original_size, num_results, canvas)
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
    assert Canvas.of(np.array(sizes), np.array(original_sizes))[:2] == (384, 256)
    best = check_instances(masks, logits, sizes, original_sizes)
    assert best.bits.shape == (len(SIZES), 18, 256, 384 // 8)
    assert best.labels.dtype == best.kernels.dtype == np.int32


@pytest.mark.parametrize("num_results", [1, 7, 12])
def test_only_the_best_are_kept(num_results):
    masks, logits = case(1, 2, 4, 3)
    args = masks, logits, [(64, 96), (50, 96)], [(80, 120), (100, 190)]
    best = check_instances(*args, num_results=num_results)
    every = ours_instances(*args, num_results=100)  # there are 12
    assert len(every.scores[0]) == 12
    for some, all_ in zip(best, every):
        np.testing.assert_array_equal(some, all_[:, :num_results])


def test_kernels_of_one_class_and_classes_of_one_kernel():
    masks, _ = case(2, 1, 3, 2)
    logits = np.array([[[3.0, 2.0], [2.5, -9.0], [-4.0, -5.0]]])
    best = check_instances(masks, logits, [(64, 96)], [(70, 100)], num_results=4)
    assert best.labels[0].tolist() == [0, 0, 1, 0] and best.kernels[0].tolist() == [0, 1, 0, 2]
    drawn = unpack(best.bits[0], (70, 100))
    np.testing.assert_array_equal(drawn[0], drawn[2])  # the same kernel
    assert (drawn[0] & drawn[1]).any()  # instances may overlap


def test_more_masks_than_are_resampled_together():
    masks, logits = case(3, 1, 21, 1)
    best = check_instances(masks, logits, [(64, 96)], [(64, 96)])
    assert sorted(best.kernels[0]) == list(range(21))


def test_the_hundred_best_of_256_kernels():
    masks, logits = case(7, 1, 256, 20)
    best = check_instances(masks, logits, [(61, 93)], [(97, 131)])
    assert best.kernels.shape == (1, 100) and len(set(best.kernels[0].tolist())) > 50


def test_a_probability_of_one_half_is_not_inside():
    masks = np.zeros((1, 2, 8, 12), np.float32)
    masks[0, 1] = 1e-3
    best = ours_instances(masks, [[[2.0], [1.0]]], [(64, 96)], [(64, 96)])
    drawn = unpack(best.bits[0], (64, 96))
    assert not drawn[0].any() and drawn[1].all()


def test_a_larger_canvas_changes_no_instance():
    masks, logits = case(4, 2, 3, 2)
    args = masks, logits, [(64, 96), (40, 96)], [(100, 120), (54, 128)]
    small = ours_instances(*args)
    large = ours_instances(*args, canvas=Canvas(256, 384, 4))
    for name in ("scores", "labels", "kernels"):
        np.testing.assert_array_equal(getattr(small, name), getattr(large, name))
    for i, original in enumerate(args[3]):
        one, two = (unpack(best.bits[i], original) for best in (small, large))
        np.testing.assert_array_equal(one, two)
        assert 0.1 < one.mean() < 0.9


def test_masks_below_a_threshold_are_left_out():
    """In a batch whose second picture needs more groups than the first."""
    masks, logits = case(5, 2, 20, 3)
    logits[0] -= 2
    args = masks, logits, [(64, 96)] * 2, [(50, 70)] * 2
    every = ours_instances(*args, num_results=30)
    threshold = float(np.median(every.scores[1]))
    some = ours_instances(*args, num_results=30, threshold=threshold)
    for name in ("scores", "labels", "kernels"):
        np.testing.assert_array_equal(getattr(every, name), getattr(some, name))
    good = every.scores >= threshold
    assert good[0].sum() < 8 < good[1].sum() < 30
    np.testing.assert_array_equal(every.bits[good], some.bits[good])
    assert every.bits[:, 24:].any() and not some.bits[:, 24:].any()
    assert not ours_instances(*args, num_results=30, threshold=1.1).bits.any()


def test_padding_pictures_end():
    masks, logits = case(5, 2, 3, 2)
    best = ours_instances(masks, logits, [(64, 96), (0, 0)], [(90, 130), (0, 0)])
    alone = ours_instances(masks[:1], logits[:1], [(64, 96)], [(90, 130)])
    for together, one in zip(best, alone):
        np.testing.assert_array_equal(together[0], one[0])


# Label maps.


def ours_labels(masks, size, original_size, stride, canvas=None):
    size, original_size = np.asarray(size, np.int32), np.asarray(original_size, np.int32)
    canvas = canvas or Canvas.of(size, original_size)
    inside = np.array([stride * np.array(masks.shape[2:])] * len(size), np.int32)
    seen = make_pass(masks, size, inside, np.zeros(len(size), bool))
    return run_label_maps([seen], original_size, canvas)


def make_pass(masks, *rest):
    return Pass(Stage(None, jnp.asarray(masks, jnp.float32), None), *rest)


def run_label_maps(passes, original_size, canvas):
    run = jax.jit(partial(label_maps, canvas=canvas))
    return np.asarray(run(passes, np.asarray(original_size, np.int32)))


@pytest.mark.parametrize("stride", [4, 8])
def test_label_maps_equal_the_reference_at_any_size(stride):
    sizes, original_sizes = zip(*SIZES)
    masks, _ = case(stride, len(SIZES), 7, 1, 64 // stride, 96 // stride)
    maps = ours_labels(masks, sizes, original_sizes, stride)
    assert maps.dtype == np.uint8 and maps.shape == (len(SIZES), 384, 256)
    seen = set()
    for ours, logits, size, (height, width) in zip(maps, masks, sizes, original_sizes):
        full = to_picture(np.asarray(logits, float), (64, 96), size, (height, width))
        best = np.sort(full, axis=0)
        unsure = best[-1] - best[-2] < 1e-4  # rounding may decide here
        wrong = (ours[:height, :width] != 1 + full.argmax(0)) & ~unsure
        assert not wrong.any() and unsure.mean() < 0.01
        seen |= set(ours[:height, :width].ravel().tolist())
    assert seen == set(range(1, 8))


@pytest.mark.parametrize("rows, columns", [(13, 17), (25, 33)])
def test_the_input_need_not_be_a_multiple_of_the_stride(rows, columns):
    """97 x 131 pixels give 13 x 17 at stride 8, and 25 x 33 at stride 4: of 7.5 and 3.9 pixels."""
    inside = np.array([(97, 131)] * 2, np.int32)
    sizes, originals = np.array([(97, 131), (80, 131)], np.int32), [(97, 131), (117, 200)]
    masks = np.random.default_rng(0).normal(0, 4, (2, 5, rows, columns))
    seen = make_pass(masks, sizes, inside, np.zeros(2, bool))
    maps = run_label_maps([seen], originals, Canvas.of(sizes, originals))
    for ours, logits, size, (height, width) in zip(maps, masks, sizes, originals):
        full = to_picture(logits, (97, 131), size, (height, width))
        best = np.sort(full, axis=0)
        unsure = best[-1] - best[-2] < 1e-4
        assert ((ours[:height, :width] == 1 + full.argmax(0)) | unsure).all()
        assert unsure.mean() < 0.01


@pytest.mark.parametrize("num_classes, dtype", [(255, np.uint8), (256, np.uint16)])
def test_no_class_is_too_large_for_the_map(num_classes, dtype):
    """The last class is 1 + (k - 1), and 0 stays free."""
    masks = np.zeros((1, num_classes, 1, 1), np.float32)
    masks[0, -1] = 1
    maps = ours_labels(masks, [(4, 4)], [(4, 4)], 4)
    assert maps.dtype == dtype and (maps == num_classes).all()


def test_the_first_of_equal_classes_wins():
    masks = np.ones((1, 3, 2, 2), np.float32)
    masks[0, 0] = -1
    assert (ours_labels(masks, [(8, 8)], [(5, 9)], 4) == 2).all()


def test_a_larger_canvas_changes_no_label():
    masks, _ = case(6, 2, 4, 1)
    args = masks, [(64, 96), (40, 96)], [(100, 120), (54, 128)], 8
    small, large = ours_labels(*args), ours_labels(*args, canvas=Canvas(256, 384, 4))
    assert large.shape == (2, 256, 384)
    for one, two, (height, width) in zip(small, large, args[2]):
        np.testing.assert_array_equal(one[:height, :width], two[:height, :width])


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
            inside = np.array([(height, width)] * 4, np.int32)
            passes.append(make_pass(masks, np.array(size, np.int32), inside, np.array(turn)))
    canvas = Canvas.of(np.array(sizes[96, 160]), np.array(originals))
    maps = run_label_maps(passes, originals, canvas)
    for i, (height, width) in enumerate(originals):
        mean = 0
        for stage, size, inside, turn in passes:
            masks = np.asarray(stage.masks[i], float)
            full = to_picture(masks, inside[i], size[i], (height, width))
            probs = np.exp(full) / np.exp(full).sum(0)
            mean += (probs[:, :, ::-1] if turn[i] else probs) / len(passes)
        best = np.sort(mean, axis=0)
        unsure = best[-1] - best[-2] < 1e-5
        assert unsure.mean() < 0.01
        assert not ((maps[i, :height, :width] != 1 + mean.argmax(0)) & ~unsure).any()
