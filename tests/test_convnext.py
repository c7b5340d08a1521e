"""ConvNeXt against torchvision's, whose numbers are in data/convnext.npz, and weights of anyone's names.

The file holds torchvision 0.29's `ConvNeXt` of 4, 8, 16 and 32 channels and (1, 1, 2, 1) blocks with random
weights, a picture [1, 64, 96, 3], and LayerNorm of its four levels, each NHWC.
"""

import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny_model import MODEL
from tiny_weights import assert_equal, fill, shapes_of

from knet_jax.nn.convnext import Block, ConvNeXt
from knet_jax.nn.convolution import convolve
from knet_jax.saved.fitting import load_backbone
from knet_jax.saved.parameter_names import to_reference

TORCHVISION = np.load(Path(__file__).parent / "data" / "convnext.npz")
BACKBONE = {"name": "convnext", "channels": 4, "depths": (1, 1, 2, 1)}


@pytest.fixture(scope="module")
def variables():
    return fill(shapes_of(MODEL | {"backbone": BACKBONE}))


def load(folder, tensors, variables):
    path = folder / "weights.safetensors"
    save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, path)
    return load_backbone(path, variables)["params"]["backbone"]


def weights_of_torchvision():
    marked = {k.removeprefix("weights/"): k for k in TORCHVISION if k.startswith("weights/")}
    return {name: TORCHVISION[key] for name, key in marked.items()}


@pytest.mark.parametrize("remat", [False, True])
def test_levels_are_those_of_torchvision(tmp_path, variables, remat):
    params = load(tmp_path, weights_of_torchvision(), variables)
    for i in range(4):
        bias = jnp.zeros_like(params[f"norm{i}"]["bias"])
        params[f"norm{i}"] = {"scale": bias + 1, "bias": bias}
    network = ConvNeXt(4, (1, 1, 2, 1), drop_path=0.1, remat=remat, dtype="float32")
    levels = jax.jit(partial(network.apply, train=False))({"params": params}, TORCHVISION["image"])
    for i, level in enumerate(levels):
        np.testing.assert_allclose(level, TORCHVISION[f"level{i}"], atol=1e-5)


def test_weights_of_anyone(tmp_path, variables):
    """Of OpenMMLab all; of the authors, timm and torchvision all but the norms of levels."""
    ours = to_reference({"params": {"backbone": variables["params"]["backbone"]}})
    ours = {name.removeprefix("backbone."): x for name, x in ours.items()}
    plain = {name: x for name, x in ours.items() if not name.startswith("norm")}

    def renamed(*pairs):
        names = {}
        for name in plain:
            old = name
            for pattern, theirs in pairs:
                name = re.sub(pattern, theirs, name)
            names[name] = plain[old]
        return names | {"head.weight": np.zeros((2, 2), np.float32)}

    authors = renamed(("depthwise_conv", "dwconv"), ("pointwise_conv", "pwconv"))
    timm = renamed(
        (r"downsample_layers\.0", "stem"),
        (r"downsample_layers\.(\d)", r"stages.\1.downsample"),
        (r"stages\.(\d)\.(\d+)\.", r"stages.\1.blocks.\2."),
        ("depthwise_conv", "conv_dw"),
        ("pointwise_conv", "mlp.fc"),
    )
    fresh = jax.tree.map(lambda x: -x, variables)
    for tensors in (ours, authors, timm):
        for name, tree in load(tmp_path, tensors, fresh).items():
            is_new = name.startswith("norm") and tensors is not ours
            kept = fresh if is_new else variables
            assert_equal(tree, kept["params"]["backbone"][name])


@pytest.mark.parametrize("shape", [(2, 9, 5, 3), (1, 3, 2, 4)])
def test_each_channel_is_convolved_for_itself(shape):
    rng = np.random.default_rng(0)
    x, grad = (rng.standard_normal(shape).astype(np.float32) for _ in range(2))
    kernel = rng.standard_normal((7, 7, 1, shape[3])).astype(np.float32)

    def plain(x, kernel):
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            (1, 1),
            ((3, 3), (3, 3)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=shape[3],
        )

    def ours(x, kernel):
        return convolve(x, kernel, (1, 1), ((3, 3), (3, 3)), feature_group_count=shape[3])

    for wanted, found in zip(*(jax.vjp(f, x, kernel) for f in (plain, ours))):
        if callable(found):
            wanted, found = wanted(grad), found(grad)
        jax.tree.map(partial(np.testing.assert_allclose, atol=2e-5), found, wanted)


def test_a_new_block_hardly_changes_its_input():
    x = jax.random.normal(jax.random.key(0), (1, 8, 8, 4))
    y, _ = Block(0.0, "float32").init_with_output(jax.random.key(1), x, train=False)
    assert 0 < abs(y - x).max() < 1e-5


def test_sums_are_wide_where_maps_are_narrow():
    rng = np.random.default_rng(0)
    x, kernel = rng.uniform(0, 1, (1, 9, 9, 4)), rng.uniform(0, 1, (7, 7, 1, 4))
    narrow = [jnp.asarray(array, jnp.bfloat16) for array in (x, kernel)]
    wide = [array.astype(jnp.float32) for array in narrow]
    ours, exact = (
        jax.jit(partial(convolve, strides=(1, 1), padding=((3, 3), (3, 3)), feature_group_count=4))(
            *given
        )
        for given in (narrow, wide)
    )
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_array_equal(ours, exact.astype(jnp.bfloat16))
