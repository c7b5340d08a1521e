from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
from tiny_model import MODEL, MODELS, NUM_PROPOSALS, NUM_STUFF, NUM_THINGS, make_batch

from knet_jax.knet import MEAN, STD, normalize
from knet_jax.model import make_model


def shapes(model, b, height, width, dtype="float32"):
    """Shapes of the output and of the variables, without a single number."""
    image = jax.ShapeDtypeStruct((b, height, width, 3), dtype)
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    return jax.eval_shape(partial(model.init_with_output, train=True), keys, image)


def check_shapes(output, model, b, height, width):
    """`model` is `config.model`."""
    n, k = model["num_proposals"] + model["num_stuff"], model["num_things"] + model["num_stuff"]
    neck = model.get("neck", {"name": "semantic_fpn"})["name"]
    stride = {"semantic_fpn": 8, "uper": 4}.get(neck, model["backbone"].get("output_stride", 32))
    h, w = height // stride, width // stride
    assert len(output.stages) == model["num_stages"] + 1
    if model["num_proposals"]:
        assert output.dense.shape == (b, k, h, w)
    elif model.get("auxiliary_channels"):
        stride = min(16, model["backbone"].get("output_stride", 32))
        assert output.dense.shape == (b, k, height // stride, width // stride)
    else:
        assert output.dense is None
    for s, stage in enumerate(output.stages):
        assert stage.kernels.shape == (b, n, model["channels"])
        assert stage.masks.shape == (b, n, h, w)
        judged = s > 0 and model["num_proposals"]
        assert stage.logits.shape == (b, n, k) if judged else stage.logits is None
    # Whatever the type of the maps, what is thresholded, ranked and summed is wide.
    assert {x.dtype for x in jax.tree.leaves(output)} == {jnp.dtype("float32")}


def test_any_counts_and_widths():
    wide = {"num_proposals": 300, "num_things": 365, "num_stuff": 7, "channels": 48, "num_heads": 4}
    for model in (
        MODEL | wide | {"num_stages": 1},
        MODELS["instance"] | {"num_stages": 3, "num_proposals": 1, "num_things": 1},
        MODELS["semantic"] | {"num_stages": 0},
    ):
        output, variables = shapes(make_model(**model), 3, 96, 64)
        check_shapes(output, model, 3, 96, 64)
        stages = {name for name in variables["params"] if name.startswith("stage")}
        assert stages == {f"stage{s + 1}" for s in range(model["num_stages"])}


def test_kernels_are_updated_in_parts_of_256_or_as_a_whole():
    for channels, width in (24, 24), (256, 256), (384, 384), (512, 256):
        model = make_model(**MODEL | {"channels": channels, "num_stages": 1})
        _, variables = shapes(model, 1, 64, 64)
        kernel = variables["params"]["stage1"]["update"]["output"]["kernel"]
        assert kernel.shape == (width, width)


# Decoders of semantic segmentation.


def test_every_decoder_makes_maps_for_the_kernels():
    for neck in ("fcn", "psp", "aspp", "uper"):
        model = MODELS["semantic"] | {"neck": {"name": neck}}
        output, variables = shapes(make_model(**model), 2, 128, 96)
        check_shapes(output, model, 2, 128, 96)
        assert "class_head" not in variables["params"]["stage1"]


# Types and memory, by shapes alone.


@pytest.mark.parametrize("task", ["panoptic", "semantic"])
def test_maps_are_bfloat16_and_all_else_is_wide(task):
    model = make_model(**MODELS[task], dtype="bfloat16")

    def is_map(module, method):
        return method == "__call__" and module.name in ("backbone", "neck")

    image = jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.bfloat16)
    output, state = jax.eval_shape(
        partial(model.init_with_output, capture_intermediates=is_map), jax.random.key(0), image
    )
    maps = state.pop("intermediates")
    assert maps.keys() == {"backbone", "neck"}
    assert {x.dtype for x in jax.tree.leaves(maps)} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in jax.tree.leaves((output, state))} == {jnp.dtype("float32")}


CONVNEXT = {"name": "convnext", "channels": 8, "depths": (2, 1, 1, 1)}
SWIN = {"name": "swin", "channels": 8, "depths": (2, 1, 1, 1), "num_heads": (1, 1, 1, 1)}


@pytest.mark.slow
def test_remat_computes_every_block_anew_for_the_gradient():
    def num_blocks(backbone, remat):
        model = make_model(**MODEL | {"num_stages": 1, "backbone": backbone | {"remat": remat}})
        _, variables = shapes(model, 1, 64, 64)

        def loss(params, image):
            output = model.apply(variables | {"params": params}, image, train=True)
            return output.stages[-1].masks.sum()

        image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
        trace = str(jax.make_jaxpr(jax.grad(loss))(variables["params"], image))
        return trace.count("policy=None")  # of `sparing` blocks a policy says what is kept

    for backbone in MODEL["backbone"], SWIN, CONVNEXT:
        assert num_blocks(backbone, False) == 0
        assert num_blocks(backbone, True) == sum(backbone["depths"])


# Numbers of a tiny network.


@pytest.fixture(scope="module")
def network():
    """A jitted (variables, image) -> Output, its variables, and an image."""
    model = make_model(**MODEL)
    batch = make_batch(2)
    return (
        jax.jit(model.apply),
        tiny_model.init(model),
        normalize(batch.image, batch.size, "float32"),
    )


def test_output_has_the_sizes_and_order_of_the_config(network):
    apply, variables, image = network
    output = apply(variables, image)
    check_shapes(output, MODEL, 2, 64, 64)
    first = output.stages[0]
    np.testing.assert_array_equal(first.masks[:, NUM_PROPOSALS:], output.dense[:, NUM_THINGS:])
    assert first.masks.shape[1] == NUM_PROPOSALS + NUM_STUFF
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(output))


def test_every_stage_has_parameters_of_its_own(network):
    apply, variables, image = network
    params = variables["params"]
    changed = params | {"stage2": jax.tree.map(lambda x: x + 0.1, params["stage2"])}
    before, after = (apply({"params": p}, image).stages for p in (params, changed))
    for s in (0, 1):
        jax.tree.map(np.testing.assert_array_equal, before[s], after[s])
    assert abs(before[2].logits - after[2].logits).max() > 0.01


def test_pictures_of_a_batch_do_not_mix(network):
    apply, variables, image = network
    forward, backward = apply(variables, image), apply(variables, image[::-1])
    for a, b in zip(jax.tree.leaves(forward), jax.tree.leaves(backward)):
        np.testing.assert_allclose(a, b[::-1], rtol=1e-3, atol=1e-3 * float(abs(b).max()))


# Pixels.


def test_normalize_standardizes_and_pads_with_zeros():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (3, 6, 8, 3)).astype(np.uint8)
    size = np.array([[6, 8], [4, 5], [0, 0]], np.int32)
    x = np.asarray(normalize(jnp.asarray(image), jnp.asarray(size), "float32"))
    wanted = (image - np.array(MEAN)) / np.array(STD)
    for i, (height, width) in enumerate(size):
        inside = x[i, :height, :width]
        np.testing.assert_allclose(inside, wanted[i, :height, :width], rtol=1e-5, atol=1e-5)
        assert not x[i, height:].any() and not x[i, :, width:].any()
    assert normalize(jnp.asarray(image), jnp.asarray(size), "bfloat16").dtype == jnp.bfloat16
