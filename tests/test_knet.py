import runpy
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
from flax import traverse_util
from tiny_model import MODEL, MODELS, NUM_PROPOSALS, NUM_STUFF, NUM_THINGS, make_batch

from knet_jax.config.files import load_config
from knet_jax.knet import MEAN, STD, normalize
from knet_jax.model import make_model
from knet_jax.training.optim import trainable

ROOT = Path(__file__).parents[1]
SPECS = [
    f"{path}:{variant}"
    for path in sorted((ROOT / "configs").glob("*.py"))
    for variant in ("", *runpy.run_path(str(path))["VARIANTS"])
]


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


@pytest.mark.slow
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: Path(spec).name)
def test_every_config_at_full_size(spec):
    config = load_config(spec)
    height, width = config.data.canvas if "canvas" in config.data else config.data.crop
    for canvas in {(height, width), (width, height)}:
        output, variables = shapes(make_model(**config.model), 2, *canvas, config.model.dtype)
        check_shapes(output, config.model, 2, *canvas)
        assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    frozen = [
        not kept for kept in jax.tree.leaves(trainable(config.optim.groups, variables["params"]))
    ]
    assert any(frozen) == (config.model.backbone.get("frozen_stages", 0) > 0)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_stages": 1, "num_proposals": 1, "num_things": 1, "num_stuff": 1},
        {
            "num_proposals": 300,
            "num_things": 365,
            "num_stuff": 7,
            "channels": 48,
            "num_heads": 4,
        },
    ],
)
def test_any_counts_and_widths(changes):
    model = MODEL | changes
    output, _ = shapes(make_model(**model), 3, 96, 64)
    check_shapes(output, model, 3, 96, 64)


@pytest.mark.parametrize("num_stages", [0, 1, 3, 7])
@pytest.mark.parametrize("task", MODELS)
def test_any_number_of_updates(task, num_stages):
    model = MODELS[task] | {"num_stages": num_stages}
    output, variables = shapes(make_model(**model), 3, 96, 64)
    check_shapes(output, model, 3, 96, 64)
    stages = {name for name in variables["params"] if name.startswith("stage")}
    assert stages == {f"stage{s + 1}" for s in range(num_stages)}


# Decoders of ADE20K at full width.


@pytest.mark.parametrize("num_stages", [0, 3])
@pytest.mark.parametrize("neck", ["fcn", "psp", "aspp", "uper"])
def test_semantic_networks_at_full_size(neck, num_stages):
    model = {
        "num_proposals": 0,
        "num_things": 0,
        "num_stuff": 150,
        "num_stages": num_stages,
        "channels": 512,
        "auxiliary_channels": 256,
        "neck": {"name": neck},
        "backbone": {},
    }
    output, variables = shapes(make_model(**model), 2, 512, 512)
    check_shapes(output, model, 2, 512, 512)
    # Without a branch for classes, in halves of 256 channels.
    for s in range(1, num_stages + 1):
        stage = variables["params"][f"stage{s}"]
        assert stage.keys() == {
            "transform_kernel",
            "transform_bias",
            "update",
            "interaction",
            "mask_head",
        }
        assert stage["update"]["output"]["kernel"].shape == (256, 256)


@pytest.mark.parametrize(
    "channels, width", [(24, 24), (100, 100), (256, 256), (384, 384), (512, 256), (768, 256)]
)
def test_kernels_are_updated_in_parts_of_256_or_as_a_whole(channels, width):
    model = make_model(**MODEL | {"channels": channels})
    _, variables = shapes(model, 1, 64, 64)
    assert variables["params"]["stage1"]["update"]["output"]["kernel"].shape == (width, width)


def test_what_a_plain_decoder_lacks_are_the_updates():
    """S = 0, the baseline, and S = 3 share every other parameter."""
    each = []
    for num_stages in (0, 3):
        model = MODELS["semantic"] | {"num_stages": num_stages}
        _, variables = shapes(make_model(**model), 1, 64, 64)
        params = traverse_util.flatten_dict(variables["params"], sep="/")
        each.append({k: v.shape for k, v in params.items() if not k.startswith("stage")})
    assert each[0] == each[1]


def test_ablations_are_arguments():
    """Table 4: parameters that are gone."""
    _, variables = shapes(
        make_model(**MODEL | {"adaptive_update": False, "kernel_interaction": False}), 1, 64, 64
    )
    assert variables["params"]["stage1"].keys() == {
        "transform_kernel",
        "transform_bias",
        "class_head",
        "mask_head",
    }
    for neck, channels in (
        ({"name": "semantic_fpn"}, 16),
        ({"name": "semantic_fpn", "sine": False, "coordinates": True}, 18),
    ):
        _, variables = shapes(make_model(**MODEL | {"neck": neck}), 1, 64, 64)
        kernel = variables["params"]["neck"]["level3_conv0"]["conv"]["kernel"]
        assert kernel.shape == (3, 3, channels, 16)


# Types and memory, by shapes alone.


@pytest.mark.parametrize("task", MODELS)
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


SWIN = {"name": "swin", "channels": 8, "depths": (2, 1, 1, 1), "num_heads": (1, 1, 1, 1)}


@pytest.mark.slow
@pytest.mark.parametrize("task", MODELS)
@pytest.mark.parametrize("backbone", [MODEL["backbone"], SWIN], ids=["resnet", "swin"])
def test_remat_computes_every_block_anew_for_the_gradient(task, backbone):
    def num_blocks(remat):
        model = make_model(**MODELS[task] | {"backbone": backbone | {"remat": remat}})
        _, variables = shapes(model, 1, 64, 64)

        def loss(params, image):
            variables_ = variables | {"params": params}
            rngs = {"dropout": jax.random.key(0)}
            output = model.apply(variables_, image, train=True, rngs=rngs)
            return output.stages[-1].masks.sum()

        image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
        trace = str(jax.make_jaxpr(jax.grad(loss))(variables["params"], image))
        return trace.count("differentiated=True")

    assert num_blocks(False) == 0
    assert num_blocks(True) == sum(backbone["depths"])


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


@pytest.mark.slow
@pytest.mark.parametrize("task", ["instance", "semantic"])
def test_outputs_of_the_other_tasks_are_finite(task):
    model, batch = make_model(**MODELS[task]), make_batch(2)
    image = normalize(batch.image, batch.size, "float32")
    output = jax.jit(model.apply)(tiny_model.init(model), image)
    check_shapes(output, MODELS[task], 2, 64, 64)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(output))
    assert min(float(stage.masks.std()) for stage in output.stages) > 1e-3


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


def test_bfloat16_is_close_to_float32(network):
    apply, variables, image = network
    exact = apply(variables, image)
    coarse = jax.jit(make_model(**MODEL, dtype="bfloat16").apply)(
        variables, image.astype(jnp.bfloat16)
    )
    assert {x.dtype for x in jax.tree.leaves(coarse)} == {jnp.dtype("float32")}
    for a, b in zip(jax.tree.leaves(coarse), jax.tree.leaves(exact)):
        # A pixel that flips at the hard threshold moves single kernels by more.
        assert np.median(abs(a - b)) < 0.05 * abs(b).max()
    assert abs(coarse.dense - exact.dense).max() > 0


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
