import jax
import jax.numpy as jnp
import numpy as np
from tiny_model import NUM_PROPOSALS, NUM_STUFF, NUM_THINGS, make_output

from knet_jax.inference.forward import stage_of
from knet_jax.inference.postprocess import Instances, read_instances, read_labels
from knet_jax.segmentation import rle
from knet_jax.structs import Output, Sizes, Stage


def test_instances_share_the_masks_of_their_kernels():
    masks = np.random.default_rng(0).random((3, 9, 14)) < 0.4
    masks[2] = False
    kernels = np.array([2, 0, 2, 1], np.int32)
    # A canvas of 16 x 16 around a picture of 9 x 14; what lies beyond has no meaning.
    padded = np.ones((4, 16, 16), bool)
    padded[:, :14, :9] = masks[kernels].transpose(0, 2, 1)
    scores = np.array([0.5, 0.25, 0.125, 0.0625], np.float32)
    best = Instances(scores, np.array([5, 1, 6, 0]), kernels, np.packbits(padded, axis=2))
    found = read_instances(best, np.array([9, 14]))
    assert [one.label for one in found] == [5, 1, 6, 0]
    assert [one.score for one in found] == scores.tolist()
    for one, kernel in zip(found, kernels, strict=True):
        np.testing.assert_array_equal(rle.decode(one.rle), masks[kernel])
        assert one.area == masks[kernel].sum() and not one.iscrowd
    assert found[0].rle is found[2].rle


def test_labels_lose_their_padding():
    padded = np.arange(12, dtype=np.uint8).reshape(3, 4)
    assert read_labels(padded, np.array([2, 3])).tolist() == [[0, 1, 2], [4, 5, 6]]


def test_kernels_without_a_class_get_the_mean_of_the_dense_classes_over_their_pixels():
    output = make_output(1)
    sizes = Sizes(NUM_PROPOSALS, NUM_THINGS, NUM_STUFF)
    stage = jax.jit(stage_of, static_argnums=(1, 2))(output, 0, sizes)
    probs = 1 / (1 + np.exp(-np.asarray(output.dense, float)))
    masks = np.asarray(output.stages[0].masks)
    for i, n, k in np.ndindex(2, *stage.logits.shape[1:]):
        wanted = probs[i, k][masks[i, n] > 0].mean()
        np.testing.assert_allclose(jax.nn.sigmoid(stage.logits[i, n, k]), wanted, rtol=1e-4)
    assert stage_of(output, -1, sizes) is output.stages[-1]
    nothing = output._replace(stages=(output.stages[0]._replace(masks=-jnp.ones_like(masks)),))
    assert (jax.nn.sigmoid(stage_of(nothing, 0, sizes).logits) == 0).all()
    semantic = Output((Stage(None, output.stages[0].masks, None),), None)
    assert stage_of(semantic, 0, Sizes(0, 0, NUM_PROPOSALS + NUM_STUFF)).logits is None
