import json
import runpy
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
from tiny_model import MODEL, NUM_PROPOSALS, NUM_STUFF, NUM_THINGS, make_batch

from knet_jax.configuration import load_config
from knet_jax.knet import MEAN, STD, make_model, normalize
from knet_jax.optim import trainable

ROOT = Path(__file__).parents[1]
SPECS = [
    f"{path}:{variant}"
    for path in sorted((ROOT / "configs").glob("*.py"))
    for variant in ("", *runpy.run_path(str(path))["VARIANTS"])
]


def shapes(model, b, height, width, dtype):
    image = jax.ShapeDtypeStruct((b, height, width, 3), dtype)
    return jax.eval_shape(partial(model.init_with_output, train=True), jax.random.key(0), image)


def check_shapes(output, model, b, height, width):
    """`model` is `config.model`."""
    n, k = model["num_proposals"] + model["num_stuff"], model["num_things"] + model["num_stuff"]
    h, w = height // 8, width // 8
    assert len(output.stages) == model["num_stages"] + 1
    assert output.dense.shape == (b, k, h, w)
    for s, stage in enumerate(output.stages):
        assert stage.kernels.shape == (b, n, model["channels"])
        assert stage.masks.shape == (b, n, h, w)
        assert stage.logits is None if s == 0 else stage.logits.shape == (b, n, k)
    # Whatever the type of the maps, what is thresholded, ranked and summed is wide.
    assert {x.dtype for x in jax.tree.leaves(output)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: Path(spec).name)
def test_every_config_at_full_size(spec):
    config = load_config(spec)
    height, width = config.data.canvas
    for canvas in {(height, width), (width, height)}:
        output, variables = shapes(make_model(**config.model), 2, *canvas, config.model.dtype)
        check_shapes(output, config.model, 2, *canvas)
        assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    frozen = [
        not kept for kept in jax.tree.leaves(trainable(config.optim.groups, variables["params"]))
    ]
    assert any(frozen) == (config.model.backbone.frozen_stages > 0)


@pytest.mark.parametrize(
    "spec, name",
    [
        ("coco_panoptic.py", "knet_s3_r50_fpn_1x_coco-panoptic"),
        ("coco_panoptic.py:ms3x", "knet_s3_r50_fpn_ms-3x_coco-panoptic"),
        ("coco_panoptic.py:r101,ms3x", "knet_s3_r101_fpn_ms-3x_coco-panoptic"),
    ],
)
def test_as_many_parameters_as_the_reference(fixtures, spec, name):
    wanted = json.loads((fixtures / "model_sizes.json").read_text())["models"][name]
    config = load_config(f"{ROOT}/configs/{spec}")
    _, variables = shapes(make_model(**config.model), 1, 64, 64, "float32")
    params = variables["params"]
    sizes = [x.size for x in jax.tree.leaves(params)]
    kept = jax.tree.leaves(trainable(config.optim.groups, params))
    assert sum(sizes) == wanted["params"]
    assert sum(size for size, keep in zip(sizes, kept) if keep) == wanted["trainable"]


@pytest.mark.parametrize(
    "changes",
    [
        {"num_stages": 0},
        {"num_stages": 1, "num_proposals": 1, "num_things": 1, "num_stuff": 1},
        {"num_stages": 4, "num_stuff": 0},
        {"num_proposals": 300, "num_things": 365, "num_stuff": 7, "channels": 48, "num_heads": 4},
    ],
)
def test_any_counts_and_widths(changes):
    model = MODEL | changes
    output, variables = shapes(make_model(**model), 3, 96, 64, "float32")
    check_shapes(output, model, 3, 96, 64)
    stages = {name for name in variables["params"] if name.startswith("stage")}
    assert stages == {f"stage{s + 1}" for s in range(model["num_stages"])}


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


def test_an_unknown_backbone_is_named():
    message = r"config\.model\.backbone\.name is 'vgg'; accepted: resnet, swin"
    with pytest.raises(ValueError, match=message):
        make_model(**MODEL | {"backbone": {"name": "vgg"}})


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
