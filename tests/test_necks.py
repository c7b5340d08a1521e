import jax
import jax.numpy as jnp
import numpy as np
import pytest

from knet_jax import layers
from knet_jax.necks import FPN, SemanticFPN


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
    model = SemanticFPN(16)
    variables = perturbed(jax.jit(model.init)(jax.random.key(0), levels))
    ours = jax.jit(model.apply)(variables, levels)
    parameters = variables["params"]
    p2, p3, p4, p5 = FPN(16).apply({"params": parameters["fpn"]}, levels)

    def tower(x, *names, stride=1):
        for i, name in enumerate(names):
            x = apply_block(x, parameters[name], stride)
            if i < len(names) - 1:
                x = resize(x, 2)
        return x

    p5 = p5 + layers.sine_encoding(*p5.shape[1:], jnp.float32)
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
        SemanticFPN(32, "bfloat16").init_with_output, jax.random.key(0), low
    )
    assert {x.dtype for x in features} == {jnp.dtype("bfloat16")}
    assert {x.shape for x in features} == {(2, 8, 12, 32)}
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


def test_initial_weights(levels):
    parameters = jax.jit(SemanticFPN(64).init)(jax.random.key(0), levels)["params"]
    np.testing.assert_allclose(parameters["level2_conv0"]["conv"]["kernel"].std(), 0.01, rtol=0.05)
    kernel = parameters["fpn"]["output0"]["kernel"]
    np.testing.assert_allclose(kernel.std(), np.sqrt(2 / (2 * 9 * 64)), rtol=0.05)
