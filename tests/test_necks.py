import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from tiny_model import made_up
from tiny_parts import ASPP, FCN, PSP, AuxiliaryHead, SemanticFPN, UPer

from knet_jax.nn import layers
from knet_jax.nn.necks import average_pool


@pytest.fixture(scope="module")
def levels():
    rng = np.random.default_rng(0)
    return tuple(
        jnp.asarray(rng.standard_normal((2, 64 // s, 96 // s, 2 * s)), jnp.float32)
        for s in (4, 8, 16, 32)
    )


def apply_conv(x, parameters, stride=1):
    kernel = parameters["kernel"]
    pad = (kernel.shape[0] - 1) // 2
    y = jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), [(pad, pad)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return y + parameters.get("bias", 0)


def apply_block(x, parameters, stride=1):
    """Convolution, GroupNorm of 16 groups (of 16 channels), ReLU, in numpy's words."""
    y = np.asarray(apply_conv(x, parameters["conv"], stride))
    y = (y - y.mean((1, 2), keepdims=True)) / np.sqrt(y.var((1, 2), keepdims=True) + 1e-5)
    return np.maximum(y * parameters["norm"]["scale"] + parameters["norm"]["bias"], 0)


def resize(x, factor):
    b, h, w, c = x.shape
    return jax.image.resize(x, (b, factor * h, factor * w, c), "bilinear", antialias=False)


@pytest.mark.parametrize("sine, coordinates", [(True, False), (False, True)])
def test_semantic_fpn_sums_towers_at_stride_8(levels, sine, coordinates):
    """With the positions that are asked for (Table 4): encoding added, or coordinates appended."""
    check_semantic_fpn(
        levels, SemanticFPN(16, sine=sine, coordinates=coordinates), sine, coordinates
    )


def check_semantic_fpn(levels, model, sine, coordinates):
    variables = made_up(model, levels, train=False)
    ours = jax.jit(model.apply, static_argnames="train")(variables, levels, train=False)
    parameters = variables["params"]
    fpn = parameters["fpn"]
    maps = [apply_conv(x, fpn[f"lateral{i}"]) for i, x in enumerate(levels)]
    for i in (2, 1, 0):
        maps[i] = maps[i] + maps[i + 1].repeat(2, 1).repeat(2, 2)
    p2, p3, p4, p5 = (apply_conv(x, fpn[f"output{i}"]) for i, x in enumerate(maps))

    def tower(x, *names, stride=1):
        for i, name in enumerate(names):
            x = apply_block(x, parameters[name], stride)
            if i < len(names) - 1:
                x = resize(x, 2)
        return x

    if sine:
        p5 = p5 + layers.sine_encoding(*p5.shape[1:], jnp.float32)
    if coordinates:
        y, x = np.meshgrid(np.linspace(-1, 1, 2), np.linspace(-1, 1, 3), indexing="ij")
        place = np.broadcast_to(np.stack([x, y], -1), (2, 2, 3, 2))
        p5 = jnp.concatenate([p5, jnp.asarray(place, jnp.float32)], -1)
    total = (
        tower(p2, "level0_conv0", stride=2)
        + tower(p3, "level1_conv0")
        + tower(p4, "level2_conv0", "level2_conv1")
        + tower(p5, "level3_conv0", "level3_conv1", "level3_conv2")
    )
    assert total.shape == (2, 8, 12, 16)
    for name in ("localization", "semantic"):
        wanted = apply_block(total, parameters[name])
        np.testing.assert_allclose(getattr(ours, name), wanted, rtol=1e-3, atol=1e-3)
    assert len(parameters) == 1 + 1 + 1 + 2 + 3 + 2


# Pooling.


@pytest.mark.parametrize("height, width, size", [(6, 6, 3), (7, 10, 6), (1, 3, 2), (16, 13, 1)])
def test_average_pool_takes_overlapping_cells(height, width, size):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, height, width, 3)).astype(np.float32)
    ours = average_pool(jnp.asarray(x), size)
    assert ours.shape == (2, size, size, 3)

    def cell(i, n):
        return slice(math.floor(i * n / size), math.ceil((i + 1) * n / size))

    for i, j in np.ndindex(size, size):
        wanted = x[:, cell(i, height), cell(j, width)].mean((1, 2))
        np.testing.assert_allclose(ours[:, i, j], wanted, atol=1e-5)


# Decoders of semantic segmentation, with running statistics that are not those of a batch.


@pytest.fixture(scope="module")
def backbone():
    """Levels of strides 4, 8, 16, 32, of 8, 16, 32 and 64 channels."""
    rng = np.random.default_rng(0)
    return tuple(
        jnp.asarray(rng.standard_normal((2, 32 // s, 48 // s, 8 * s)), jnp.float32)
        for s in (1, 2, 4, 8)
    )


def run_decoder(model, levels):
    """What a decoder computes, and its parameters with the statistics among them."""
    variables = made_up(model, levels, train=False)
    apply = jax.jit(model.apply, static_argnames="train")
    return apply(variables, levels, train=False), joined(variables)


def joined(variables):
    """Parameters and running statistics in one tree."""
    flat = [traverse_util.flatten_dict(tree) for tree in variables.values()]
    return traverse_util.unflatten_dict(flat[0] | flat[1])


def decode_block(x, parameters):
    """Convolution, norm by running statistics, ReLU."""
    y, norm = np.asarray(apply_conv(x, parameters["conv"])), parameters["norm"]
    y = (y - norm["mean"]) / np.sqrt(norm["var"] + 1e-5) * norm["scale"] + norm["bias"]
    return np.maximum(y, 0)


def fit(x, like):
    shape = (x.shape[0], *like.shape[1:3], x.shape[3])
    return np.asarray(jax.image.resize(x, shape, "bilinear", antialias=False))


def pyramid_pooling(x, parameters, scales):
    x = np.asarray(x)
    maps = [x]
    for i, scale in enumerate(scales):
        pooled = decode_block(np.asarray(average_pool(x, scale)), parameters[f"pool{i}"])
        maps.append(fit(pooled, x))
    return decode_block(np.concatenate(maps, -1), parameters["bottleneck"])


def test_fcn_is_two_convolutions_beside_a_shortcut(backbone):
    ours, parameters = run_decoder(FCN(16, "frozen_batch"), backbone)
    x = decode_block(decode_block(backbone[-1], parameters["conv0"]), parameters["conv1"])
    wanted = decode_block(np.concatenate([backbone[-1], x], -1), parameters["fuse"])
    assert ours.shape == (2, 4, 6, 16)
    np.testing.assert_allclose(ours, wanted, rtol=1e-3, atol=1e-3)


def test_psp_pools_at_several_scales(backbone):
    ours, parameters = run_decoder(PSP(16, (1, 2, 3), "frozen_batch"), backbone)
    wanted = pyramid_pooling(backbone[-1], parameters, (1, 2, 3))
    assert ours.shape == (2, 4, 6, 16)
    np.testing.assert_allclose(ours, wanted, rtol=1e-3, atol=1e-3)


def test_aspp_convolves_at_several_dilations_after_the_pooled_picture(backbone):
    ours, parameters = run_decoder(ASPP(16, (1, 2, 5), "frozen_batch"), backbone)
    x = np.asarray(backbone[-1])

    def atrous(i, dilation):
        kernel = parameters[f"atrous{i}"]["conv"]["kernel"]
        assert kernel.shape[:2] == ((1, 1) if dilation == 1 else (3, 3))
        # A dilated kernel is a larger one with zeros.
        size = dilation * (kernel.shape[0] - 1) + 1
        large = np.zeros((size, size, *kernel.shape[2:]), np.float32)
        large[::dilation, ::dilation] = kernel
        return decode_block(x, parameters[f"atrous{i}"] | {"conv": {"kernel": large}})

    pooled = decode_block(x.mean((1, 2), keepdims=True), parameters["image_pool"])
    maps = [fit(pooled, x), atrous(0, 1), atrous(1, 2), atrous(2, 5)]
    wanted = decode_block(np.concatenate(maps, -1), parameters["bottleneck"])
    assert ours.shape == (2, 4, 6, 16)
    np.testing.assert_allclose(ours, wanted, rtol=1e-3, atol=1e-3)


def test_uper_is_a_pyramid_on_pyramid_pooling(backbone):
    ours, parameters = run_decoder(UPer(16, (1, 2), "frozen_batch"), backbone)
    maps = [decode_block(x, parameters[f"lateral{i}"]) for i, x in enumerate(backbone[:-1])]
    maps.append(pyramid_pooling(backbone[-1], parameters["psp"], (1, 2)))
    for i in (2, 1, 0):
        maps[i] = maps[i] + fit(maps[i + 1], maps[i])
    outputs = [decode_block(maps[i], parameters[f"output{i}"]) for i in range(3)] + [maps[3]]
    together = np.concatenate([fit(x, maps[0]) for x in outputs], -1)
    wanted = decode_block(together, parameters["pyramid"])
    assert ours.shape == (2, 32, 48, 16)
    np.testing.assert_allclose(ours, wanted, rtol=1e-3, atol=1e-3)


# The auxiliary head.


def test_auxiliary_head_classifies_pixels(backbone):
    ours, parameters = run_decoder(AuxiliaryHead(5, 16, norm="frozen_batch"), backbone[-2])
    x = decode_block(backbone[-2], parameters["conv"])
    wanted = apply_conv(x, parameters["classifier"]).transpose(0, 3, 1, 2)
    assert ours.shape == (2, 5, 8, 12)
    np.testing.assert_allclose(ours, wanted, rtol=1e-3, atol=1e-3)
