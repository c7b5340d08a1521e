import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from tiny_parts import ASPP, FCN, FPN, PSP, AuxiliaryHead, SemanticFPN, UPer

from knet_jax.nn import layers
from knet_jax.nn.necks import append_coordinates, average_pool


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


@pytest.fixture(scope="module")
def pyramid(levels):
    """FPN of 16 channels: its maps and its parameters, no longer as initialized."""
    model = FPN(16)
    return model, perturbed(jax.jit(model.init)(jax.random.key(0), levels))


def perturbed(variables):
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda x: x + jnp.asarray(0.1 * rng.standard_normal(x.shape), x.dtype), variables
    )


def initialize(model, x):
    return jax.jit(model.init, static_argnames="train")(jax.random.key(0), x, train=False)


def test_fpn_adds_coarser_levels_from_the_top_down(levels, pyramid):
    model, variables = pyramid
    parameters = variables["params"]
    laterals = [apply_conv(x, parameters[f"lateral{i}"]) for i, x in enumerate(levels)]
    for i in (2, 1, 0):
        laterals[i] = laterals[i] + laterals[i + 1].repeat(2, 1).repeat(2, 2)
    maps = jax.jit(model.apply)(variables, levels)
    assert len(maps) == 4
    for i, (ours, lateral) in enumerate(zip(maps, laterals)):
        wanted = apply_conv(lateral, parameters[f"output{i}"])
        np.testing.assert_allclose(ours, wanted, rtol=1e-3, atol=1e-3)


def test_semantic_fpn_sums_towers_at_stride_8(levels):
    check_semantic_fpn(levels, SemanticFPN(16), sine=True, coordinates=False)


@pytest.mark.parametrize("sine, coordinates", [(True, True), (False, True), (False, False)])
def test_positions_are_those_that_are_asked_for(levels, sine, coordinates):
    """Table 4: encoding added, coordinates appended, both or neither."""
    model = SemanticFPN(16, sine=sine, coordinates=coordinates)
    check_semantic_fpn(levels, model, sine, coordinates)


def check_semantic_fpn(levels, model, sine, coordinates):
    variables = perturbed(initialize(model, levels))
    ours = jax.jit(model.apply, static_argnames="train")(variables, levels, train=False)
    parameters = variables["params"]
    p2, p3, p4, p5 = FPN(16).apply({"params": parameters["fpn"]}, levels)

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


def test_maps_keep_the_type_of_the_network(levels):
    low = tuple(x.astype(jnp.bfloat16) for x in levels)
    features, variables = jax.eval_shape(
        lambda *x: SemanticFPN(32, dtype="bfloat16").init_with_output(*x, train=True),
        jax.random.key(0),
        low,
    )
    assert {x.dtype for x in features} == {jnp.dtype("bfloat16")}
    assert {x.shape for x in features} == {(2, 8, 12, 32)}
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


def test_initial_weights(levels):
    parameters = initialize(SemanticFPN(64), levels)["params"]
    np.testing.assert_allclose(parameters["level2_conv0"]["conv"]["kernel"].std(), 0.01, rtol=0.05)
    kernel = parameters["fpn"]["output0"]["kernel"]
    np.testing.assert_allclose(kernel.std(), np.sqrt(2 / (2 * 9 * 64)), rtol=0.05)


def test_coordinates_are_columns_then_rows_from_minus_one_to_one():
    x = append_coordinates(jnp.zeros((2, 3, 5, 1)))
    assert x.shape == (2, 3, 5, 3)
    for one in x:
        assert one[1, :, 1].tolist() == [-1, -0.5, 0, 0.5, 1]
        assert one[:, 2, 2].tolist() == [-1, 0, 1]
        assert (one[:, :, 1] == one[:1, :, 1]).all() and (one[:, :, 2] == one[:, :1, 2]).all()


# Pooling.


@pytest.mark.parametrize("height, width", [(6, 6), (7, 10), (4, 5), (1, 3), (16, 13)])
@pytest.mark.parametrize("size", [1, 2, 3, 6])
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
    variables = perturbed(initialize(model, levels))
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


@pytest.mark.parametrize("decoder", [FCN, PSP, ASPP, UPer])
def test_decoders_of_any_size_and_type(decoder):
    """Levels whose sides do not divide each other, in bfloat16, with the norm of the recipes."""
    sides = ((23, 17), (12, 9), (6, 5), (3, 3))
    levels = tuple(
        jax.ShapeDtypeStruct((2, *side, 16 * 2**i), jnp.bfloat16) for i, side in enumerate(sides)
    )
    model = decoder(24, dtype="bfloat16")
    x, variables = jax.eval_shape(
        lambda *x: model.init_with_output(*x, train=True), jax.random.key(0), levels
    )
    assert x.shape == (2, *sides[0 if decoder is UPer else -1], 24) and x.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    blocks = len(jax.tree.leaves(variables["params"])) // 3  # kernel, scale, bias
    assert blocks == {FCN: 3, PSP: 5, ASPP: 6, UPer: 3 + 5 + 3 + 1}[decoder]
    assert len(jax.tree.leaves(variables["batch_stats"])) == 2 * blocks


@pytest.mark.parametrize(
    ("decoder", "kernels"),
    [
        (FCN, 9 * 2048 * 512 + 9 * 512 * 512 + 9 * (2048 + 512) * 512),
        (PSP, 4 * 2048 * 512 + 9 * (2048 + 4 * 512) * 512),
        (ASPP, 2 * 2048 * 512 + 3 * 9 * 2048 * 512 + 9 * 5 * 512 * 512),
        (
            UPer,
            (256 + 512 + 1024) * 512
            + (4 * 2048 * 512 + 9 * (2048 + 4 * 512) * 512)
            + 3 * 9 * 512 * 512
            + 9 * 4 * 512 * 512,
        ),
    ],
)
def test_decoders_have_the_weights_of_the_papers(decoder, kernels):
    levels = tuple(jnp.zeros((1, 32 // s, 32 // s, 256 * s)) for s in (1, 2, 4, 8))
    variables = jax.eval_shape(
        lambda *x: decoder().init(*x, train=False), jax.random.key(0), levels
    )
    leaves = jax.tree.leaves(variables["params"])
    assert sum(x.size for x in leaves if len(x.shape) == 4) == kernels
    assert {x.shape for x in leaves if len(x.shape) != 4} == {(512,)}


# The auxiliary head.


def test_auxiliary_head_classifies_pixels(backbone):
    ours, parameters = run_decoder(AuxiliaryHead(5, 16, norm="frozen_batch"), backbone[-2])
    x = decode_block(backbone[-2], parameters["conv"])
    wanted = apply_conv(x, parameters["classifier"]).transpose(0, 3, 1, 2)
    assert ours.shape == (2, 5, 8, 12)
    np.testing.assert_allclose(ours, wanted, rtol=1e-3, atol=1e-3)


def test_logits_of_the_auxiliary_head_are_wide(backbone):
    logits, _ = jax.eval_shape(
        lambda *x: AuxiliaryHead(5, 16, dtype="bfloat16").init_with_output(*x, train=False),
        jax.random.key(0),
        backbone[-2].astype(jnp.bfloat16),
    )
    assert logits.dtype == jnp.float32


def test_auxiliary_head_drops_whole_channels_in_training(backbone):
    model = AuxiliaryHead(5, 16, dropout=0.5, norm="frozen_batch")
    variables = perturbed(initialize(model, backbone[-2]))
    x = np.asarray(decode_block(backbone[-2], joined(variables)["conv"]), float)
    classifier = variables["params"]["classifier"]
    logits = model.apply(variables, backbone[-2], train=True, rngs={"dropout": jax.random.key(1)})
    target = np.asarray(logits, float).transpose(0, 2, 3, 1) - classifier["bias"]
    weights = np.asarray(classifier["kernel"][0, 0], float)
    for one, wanted in zip(x, target):
        columns = np.einsum("hwc,ck->hwkc", one, weights).reshape(-1, 16)
        seen = np.linalg.lstsq(columns, wanted.reshape(-1), rcond=None)[0]
        np.testing.assert_allclose(seen, np.round(seen / 2) * 2, atol=1e-2)
        assert set(np.round(seen)) == {0, 2}
