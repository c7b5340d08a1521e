from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plain import plain_probabilities

from knet_jax.inference.fusion import GROUP, predict_panoptic
from knet_jax.inference.resampling import ResultCanvas
from knet_jax.structs import EMPTY, Pass, Stage

THINGS, STUFF = 3, 2


# A second implementation, as the reference does it: one picture, whole maps, double precision.


def plain_fuse(masks, logits, size, original_size, num_things, low, share):
    """[(label, score, mask)] best first, and the values [n, H, W] of which every pixel takes the best."""
    probs = plain_probabilities(masks, size, original_size)
    classes = 1 / (1 + np.exp(-np.asarray(logits, float)))
    n, k = classes.shape
    num_proposals = n - (k - num_things)
    scores, labels = np.empty(n), np.empty(n, int)
    for i in range(n):
        if i < num_proposals:
            labels[i] = classes[i, :num_things].argmax()
        else:
            labels[i] = num_things + i - num_proposals
        scores[i] = classes[i, labels[i]]
    values = scores[:, None, None] * probs
    owner = values.argmax(0)
    segments = []
    for i in np.argsort(-scores, kind="stable"):
        mine = owner == i
        area = (probs[i] >= 0.5).sum()
        if i < num_proposals and scores[i] < low:
            continue
        if not mine.any() or not area or mine.sum() / area < share:
            continue
        segments.append((labels[i], scores[i], mine))
    return segments, values


@partial(jax.jit, static_argnames=("num_things", "canvas"))
def ours_fuse(masks, logits, size, original_size, low, share, *, num_things, canvas):
    seen = Pass(Stage(None, masks, logits), size, None, None)
    return predict_panoptic(
        [seen],
        original_size,
        canvas=canvas,
        num_things=num_things,
        instance_threshold=low,
        overlap_threshold=share,
    )


def run(masks, logits, size, original_size, low=0.3, share=0.6, num_things=THINGS, canvas=None):
    size, original_size = np.asarray(size, np.int32), np.asarray(original_size, np.int32)
    canvas = canvas or ResultCanvas.of(size, original_size)
    masks, logits = jnp.asarray(masks, jnp.float32), jnp.asarray(logits, jnp.float32)
    thresholds = float(low), float(share)
    fused = ours_fuse(
        masks, logits, size, original_size, *thresholds, num_things=num_things, canvas=canvas
    )
    return jax.tree.map(np.asarray, fused)


def check(masks, logits, size, original_size, low=0.3, share=0.6, num_things=THINGS, canvas=None):
    """Compares every picture of a batch with the second implementation; returns ours."""
    fused = run(masks, logits, size, original_size, low, share, num_things, canvas)
    for i, (height, width) in enumerate(original_size):
        ids = fused.ids[i]
        assert not ids[height:].any() and not ids[:, width:].any()
        kept = int((fused.labels[i] != EMPTY).sum())
        assert (fused.labels[i, :kept] >= 0).all() and (fused.labels[i, kept:] == EMPTY).all()
        assert (fused.scores[i, kept:] == 0).all()
        assert (np.diff(fused.scores[i, :kept]) <= 0).all()
        if not height:
            assert kept == 0
            continue
        ids = ids[:height, :width]
        assert set(np.unique(ids)) - {0} == set(range(1, kept + 1))

        segments, values = plain_fuse(
            masks[i], logits[i], size[i], original_size[i], num_things, low, share
        )
        best = np.sort(np.concatenate([values, -np.ones_like(values)]), axis=0)
        unsure = best[-1] - best[-2] < 1e-6 * (1 + best[-1])  # rounding may decide here
        assert kept == len(segments), f"{unsure.sum()} pixels are unsure"
        for j, (label, score, mask) in enumerate(segments):
            assert fused.labels[i, j] == label
            np.testing.assert_allclose(fused.scores[i, j], score, rtol=1e-5)
            its_logit = logits[i][fused.kernels[i, j], label]
            np.testing.assert_allclose(1 / (1 + np.exp(-its_logit)), score, rtol=1e-5)
            wrong = ((ids == 1 + j) != mask) & ~unsure
            assert not wrong.any(), f"segment {j}: {wrong.sum()} pixels of {mask.sum()} differ"
    return fused


def blobs(rng, n, h, w, sharp=8.0):
    """Masks with something to win: smooth bumps of different sizes, some almost everywhere."""
    y, x = np.mgrid[:h, :w]
    masks = np.empty((n, h, w), np.float32)
    for i in range(n):
        cy, cx = rng.uniform(0, h), rng.uniform(0, w)
        ry, rx = rng.uniform(0.5, 1 + h / 2), rng.uniform(0.5, 1 + w / 2)
        masks[i] = sharp * (1 - ((y - cy) / ry) ** 2 - ((x - cx) / rx) ** 2)
    return np.maximum(masks, -30) + rng.normal(0, 0.3, (n, h, w)).astype(np.float32)


def case(seed, b=1, n=10, h=8, w=12, num_things=THINGS, num_stuff=STUFF, level=1.5):
    rng = np.random.default_rng(seed)
    masks = np.stack([blobs(rng, n, h, w) for _ in range(b)])
    logits = rng.normal(0, level, (b, n, num_things + num_stuff)).astype(np.float32)
    return masks, logits


# Many sizes. The input is 64 x 96.

SIZES = [
    ((64, 96), (64, 96)),  # nothing changes
    ((64, 96), (128, 192)),  # exactly doubled
    ((64, 96), (32, 48)),  # exactly halved
    ((61, 93), (61, 93)),  # cropped
    ((64, 85), (97, 129)),
    ((33, 96), (50, 146)),
    ((64, 49), (480, 367)),
    ((64, 96), (7, 11)),
    ((64, 96), (1, 1)),
    ((64, 1), (300, 5)),
    ((29, 96), (300, 1000)),
    ((2, 96), (20, 1000)),
    ((1, 1), (1, 1)),
    ((1, 96), (3, 500)),
    ((64, 96), (65, 97)),
    ((47, 71), (639, 9)),  # no picture is resized like this; the code must not mind
    ((64, 96), (5, 700)),
    ((0, 0), (0, 0)),  # an empty place of a batch
]


def test_equals_the_reference_at_any_size():
    sizes, original_sizes = zip(*SIZES)
    masks, logits = case(0, len(SIZES))
    canvas = ResultCanvas(640, 1024, 128)
    assert ResultCanvas.of(np.array(sizes), np.array(original_sizes)) == canvas
    check(masks, logits, sizes, original_sizes, share=0.3)
    check(masks, logits, sizes, original_sizes, low=0.0, share=0.0)


@pytest.mark.parametrize(
    "shrink", [1 / 8, *(pytest.param(s, marks=pytest.mark.slow) for s in (1 / 2, 8))]
)
def test_tiles_read_all_the_logits_that_they_need(shrink):
    """A map much larger than a tile, at the largest ratios that a canvas is made for."""
    seed, parts = round(8 * shrink), 1 if shrink >= 1 else 4
    rng = np.random.default_rng(seed)
    shape = (3, 4, 40 // parts, 56 // parts)
    masks = rng.normal(0, 4, shape).astype(np.float32)  # no two neighbors alike
    _, logits = case(seed, 3, 4)
    size = np.array([(320, 448), (301, 430), (319, 447)]) // parts
    original_size = np.ceil(size / np.array([1.0, 0.99, 0.7])[:, None] / shrink).astype(int)
    assert ResultCanvas.of(size, original_size).shrink == shrink
    check(masks, logits, size, original_size, low=0.0, share=0.0)


@pytest.mark.parametrize("n", [1, 2 * GROUP + 5])
def test_any_number_of_masks(n):
    """No two neighbors alike, so that nearly every mask can win every tile: none may be skipped."""
    masks = np.random.default_rng(n).normal(0, 4, (2, n, 8, 12)).astype(np.float32)
    _, logits = case(n, 2, n, num_stuff=min(STUFF, n - 1), level=0.1)
    fused = check(masks, logits, [(64, 96), (50, 80)], [(100, 150), (40, 64)], low=0.0, share=0.0)
    assert (fused.labels != EMPTY).sum() > 1.5 * n


def test_the_canvas_changes_nothing():
    canvas = ResultCanvas(128, 384, 32)
    masks, logits = case(4, 2)
    size, original_size = [(64, 96), (51, 96)], [(100, 150), (80, 151)]
    small = run(masks, logits, size, original_size, share=0.2)
    large = run(masks, logits, size, original_size, share=0.2, canvas=canvas)
    assert (small.labels != EMPTY).sum() > 3
    np.testing.assert_array_equal(small.ids[:, :100, :151], large.ids[:, :100, :151])
    np.testing.assert_array_equal(small.labels, large.labels)
    np.testing.assert_array_equal(small.scores, large.scores)


# The rules.

WHOLE = {"size": [(64, 96)], "original_size": [(64, 96)]}


ALL = (slice(None), slice(None))
LEFT = (slice(None), slice(0, 6))
RIGHT = (slice(None), slice(6, 12))
OFF = -30.0


def hand_made(*things, stuff=None):
    """One picture of three proposals and two stuff kernels, each (rows and columns that it draws,
    logit of its class); those that are not given draw nothing. Things are of class 0, stuff of 3."""
    drawn = np.full((1, 5, 8, 12), -20.0, np.float32)
    classes = np.full((1, 5, 5), OFF, np.float32)
    given = [(n, 0, *thing) for n, thing in enumerate(things)] + ([(3, 3, *stuff)] if stuff else [])
    for n, label, region, logit in given:
        drawn[0, n][region] = 20
        classes[0, n, label] = logit
    return drawn, classes


def kept(fused):
    return [label for label in fused.labels[0].tolist() if label != EMPTY]


def test_a_thing_below_the_threshold_keeps_its_pixels_from_others():
    """The reference lets it win and then drops it: what it won stays void."""
    masks, logits = hand_made((LEFT, -1.0), stuff=(ALL, -1.5))  # 0.27 > 0.18
    fused = check(masks, logits, **WHOLE, share=0.3)
    assert kept(fused) == [3]
    assert not fused.ids[0, :64, :40].any() and (fused.ids[0, :64, 56:96] == 1).all()


def test_thresholds_are_inclusive():
    masks, logits = hand_made((LEFT, 0.0), (RIGHT, -1e-3))
    fused = check(masks, logits, **WHOLE, low=0.5)
    assert kept(fused) == [0]  # a score of exactly one half stays
    masks, logits = hand_made((ALL, 2.0), ((slice(None), slice(0, 5)), 3.0))
    owned = (run(masks, logits, **WHOLE, share=0.0).ids[0] == 2).sum()
    left = np.float32(owned / (64 * 96))  # of the lower one, which has all pixels
    assert 0.5 < left < 0.7
    assert kept(run(masks, logits, **WHOLE, share=left)) == [0, 0]
    assert kept(run(masks, logits, **WHOLE, share=np.nextafter(left, np.float32(1)))) == [0]


def test_what_is_covered_too_much_is_dropped_stuff_as_well():
    masks, logits = hand_made((LEFT, 3.0), stuff=(ALL, 1.0))
    assert kept(check(masks, logits, **WHOLE, share=0.4)) == [0, 3]
    assert kept(check(masks, logits, **WHOLE, share=0.6)) == [0]


def test_the_first_of_equals_wins():
    masks, logits = hand_made((ALL, 1.0), (ALL, 1.0), (ALL, 1.0))
    fused = run(masks, logits, **WHOLE)
    assert kept(fused) == [0] and (fused.ids[0, :64, :96] == 1).all()
    # Beyond the first group as well, whatever the order of the visits.
    many = 2 * GROUP + 3
    masks, logits = (np.tile(x[:, :2], (1, many, 1, 1)[: x.ndim]) for x in (masks, logits))
    masks[0, ::2, :, 6:] = -20
    ids = run(masks, logits[..., :1], **WHOLE, num_things=1, share=0.3).ids[0]
    assert (ids[:64, :40] == 1).all() and (ids[:64, 56:96] == 2).all()


def test_one_half_counts_as_area_and_without_area_a_segment_is_dropped():
    masks, logits = hand_made((ALL, 1.0), (LEFT, 3.0))
    masks[0, 0] = 0.0
    # The lower one has all pixels as area, of which half are left.
    assert kept(check(masks, logits, **WHOLE, share=0.7)) == [0]
    assert kept(check(masks, logits, **WHOLE, share=0.3)) == [0, 0]
    masks[0, :2] = -1.0  # win all pixels, with a probability of 0.27
    assert not run(masks, logits, **WHOLE, share=0.0).ids.any()


def test_broken_and_saturated_logits_end():
    """A network that diverged gives a map of something, but the loop over masks must stop."""
    for bad in np.nan, np.inf, -np.inf:
        masks, logits = case(0, 2)
        masks[0, ::2] = bad
        masks[1, 3, 2, 2] = bad
        logits[0, 1] = bad
        fused = run(masks, logits, [(64, 96)] * 2, [(100, 150)] * 2)
        assert fused.ids.shape == (2, 128, 256)
    masks, logits = case(7, 2)
    fused = run(masks, logits - 200, [(64, 96)] * 2, [(100, 150)] * 2, low=0.0, share=0.0)
    assert (fused.ids[:, :100, :150] > 0).any()  # scores of zero: the first of equals wins
