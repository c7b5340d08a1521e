import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import random

from knet_jax.kernels import InitialKernels, KernelUpdate, draw, gather
from knet_jax.structs import Features, Stage

B, N, H, W, C, K = 2, 5, 6, 7, 16, 4


@pytest.fixture(scope="module")
def update():
    """A jitted KernelUpdate: (variables, feats, stage) -> stage, and its variables."""
    model = KernelUpdate(K, C, num_heads=2, ffn_channels=32)
    stage = Stage(random(B, N, C), random(B, N, H, W, seed=1), None)
    variables = jax.jit(model.init)(jax.random.key(0), random(B, H, W, C, seed=2), stage)
    variables["params"]["transform_bias"] = random(C, seed=3)
    return jax.jit(model.apply), variables


@pytest.fixture(scope="module")
def stage():
    return Stage(random(B, N, C), random(B, N, H, W, seed=1), None)


@pytest.fixture(scope="module")
def feats():
    return random(B, H, W, C, seed=2)


# Gathering and drawing.


def test_gather_sums_pixels_of_more_than_one_half(feats):
    masks = np.array(random(B, N, H, W, seed=1))
    masks[0, 0] = 0  # exactly one half is not claimed
    masks[0, 1] = 1e-30
    masks[0, 2] = -1e-30
    pooled, area = gather(jnp.asarray(masks), feats)
    claimed = masks > 0
    np.testing.assert_allclose(
        pooled, np.einsum("bnhw,bhwc->bnc", claimed, feats), rtol=1e-4, atol=1e-4
    )
    np.testing.assert_array_equal(area[..., 0], claimed.sum((2, 3)))
    assert area[0, :3, 0].tolist() == [0, H * W, 0]


def test_gather_has_no_gradient_to_masks(feats):
    masks = random(B, N, H, W)
    weights = random(B, N, C, seed=4)
    to_masks, to_feats = jax.grad(lambda *x: (gather(*x)[0] * weights).sum(), (0, 1))(masks, feats)
    assert not to_masks.any()
    wanted = np.einsum("bnhw,bnc->bhwc", masks > 0, weights)
    np.testing.assert_allclose(to_feats, wanted, rtol=1e-4, atol=1e-4)


def test_sums_over_thousands_of_pixels_do_not_drown_in_bfloat16():
    pooled, area = gather(jnp.ones((1, 1, 60, 90)), jnp.ones((1, 60, 90, 2), jnp.bfloat16))
    assert pooled.dtype == area.dtype == jnp.float32
    assert pooled.ravel().tolist() == [5400.0, 5400.0]
    assert area.item() == 5400


def test_draw_is_a_1x1_convolution(feats):
    kernels = random(B, N, C, seed=5)
    wanted = np.einsum("bnc,bhwc->bnhw", kernels, feats)
    np.testing.assert_allclose(draw(kernels, feats), wanted, rtol=1e-4, atol=1e-4)
    shared = np.einsum("nc,bhwc->bnhw", kernels[0], feats)
    np.testing.assert_allclose(draw(kernels[0], feats), shared, rtol=1e-4, atol=1e-4)


# The initial kernels.


@pytest.fixture(scope="module")
def features():
    return Features(random(B, H, W, 8), random(B, H, W, 8, seed=1))


def initial(num_proposals, num_things, num_stuff, features):
    model = InitialKernels(num_proposals, num_things, num_stuff, C)
    return jax.jit(model.init_with_output)(jax.random.key(0), features)


def test_stage_0_is_proposals_then_stuff(features):
    (feats, stage, dense), variables = initial(N, 3, 2, features)
    parameters = variables["params"]
    assert feats.shape == (B, H, W, C) and dense.shape == (B, 5, H, W)
    assert stage.kernels.shape == (B, N + 2, C) and stage.masks.shape == (B, N + 2, H, W)
    assert stage.logits is None
    np.testing.assert_array_equal(stage.masks[:, N:], dense[:, 3:])
    for kernels in stage.kernels[:, N:]:  # stuff rows of the classifier, nothing gathered
        np.testing.assert_array_equal(kernels, parameters["class_kernels"][3:])
    pooled, area = gather(stage.masks[:, :N], feats)
    assert (area > 0).all()
    wanted = parameters["proposals"] + pooled
    np.testing.assert_allclose(stage.kernels[:, :N], wanted, rtol=1e-4, atol=1e-4)
    assert abs(jax.nn.sigmoid(dense).mean() - 0.01) < 0.005  # the prior


def test_first_masks_are_drawn_on_localization_and_classes_on_semantic(features):
    (_, stage, dense), variables = initial(N, 3, 2, features)
    parameters = variables["params"]

    def other(name):
        changed = features._replace(**{name: getattr(features, name) + random(B, H, W, 8, seed=9)})
        return InitialKernels(N, 3, 2, C).apply({"params": parameters}, changed)

    _, moved, same = other("localization")
    np.testing.assert_allclose(same, dense, rtol=1e-5, atol=1e-5)
    assert abs(moved.masks[:, :N] - stage.masks[:, :N]).max() > 1e-3
    _, still, changed = other("semantic")
    np.testing.assert_allclose(still.masks[:, :N], stage.masks[:, :N], rtol=1e-5, atol=1e-5)
    assert abs(changed - dense).max() > 1e-4


def test_panoptic_without_stuff_has_the_instance_form(features):
    (_, stage, dense), variables = initial(N, 3, 0, features)
    assert stage.kernels.shape == (B, N, C) and stage.masks.shape == (B, N, H, W)
    assert dense.shape == (B, 3, H, W)
    # The proposals do not depend on the number of classes.
    (_, with_stuff, _), more = initial(N, 3, 2, features)
    same = {name: more["params"][name] for name in ("localization", "semantic", "proposals")}
    (_, stage, _) = InitialKernels(N, 3, 0, C).apply(
        {"params": variables["params"] | same}, features
    )
    np.testing.assert_allclose(stage.kernels, with_stuff.kernels[:, :N], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(stage.masks, with_stuff.masks[:, :N], rtol=1e-5, atol=1e-5)


def test_no_gradient_passes_the_gathering_of_stage_0(features):
    _, variables = initial(N, 3, 2, features)
    weights = random(B, N, C, seed=6)

    @jax.jit
    @jax.grad
    def gradient(params):
        _, stage, _ = InitialKernels(N, 3, 2, C).apply({"params": params}, features)
        return (stage.kernels[:, :N] * weights).sum()

    grads = gradient(variables["params"])
    # Kernels are proposals + pooled: the first part alone gives this.
    np.testing.assert_allclose(grads["proposals"], weights.sum(0), rtol=1e-5, atol=1e-5)
    assert abs(grads["semantic"]["conv"]["kernel"]).max() > 0
    assert not grads["class_kernels"].any()


# The update.


def reference_update(parameters, feats, stage):
    """The kernel update of the paper, on explicitly transformed features, in numpy."""
    p = jax.tree.map(np.asarray, parameters)

    def dense(x, q):
        return x @ q["kernel"] + q.get("bias", 0)

    def norm(x, q):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * q["scale"] + q["bias"]

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    feats = np.asarray(feats) @ p["transform_kernel"] + p["transform_bias"]
    pooled = np.einsum("bnhw,bhwc->bnc", np.asarray(stage.masks) > 0, feats)

    q = p["update"]
    pixel_in, pixel_out = np.split(dense(pooled, q["from_pixels"]), 2, axis=-1)
    kernel_in, kernel_out = np.split(dense(np.asarray(stage.kernels), q["from_kernel"]), 2, axis=-1)
    gate = kernel_in * pixel_in
    kernel_gate = sigmoid(norm(dense(gate, q["kernel_gate"]), q["kernel_gate_norm"]))
    pixel_gate = sigmoid(norm(dense(gate, q["pixel_gate"]), q["pixel_gate_norm"]))
    x = pixel_gate * norm(pixel_out, q["pixel_norm"])
    x = x + kernel_gate * norm(kernel_out, q["kernel_norm"])
    x = np.maximum(norm(dense(x, q["output"]), q["output_norm"]), 0)

    q = p["interaction"]
    query, key, value = (
        np.einsum("bnc,chd->bhnd", x, q["attention"][name]["kernel"])
        + q["attention"][name]["bias"][:, None]
        for name in ("query", "key", "value")
    )
    score = np.exp(np.einsum("bhnd,bhmd->bhnm", query, key) / np.sqrt(query.shape[-1]))
    score /= score.sum(-1, keepdims=True)
    mixed = np.einsum("bhnm,bhmd->bnhd", score, value)
    out = q["attention"]["out"]
    x = norm(
        x + np.einsum("bnhd,hdc->bnc", mixed, out["kernel"]) + out["bias"], q["attention_norm"]
    )
    hidden = np.maximum(dense(x, q["ffn_hidden"]), 0)
    kernels = norm(x + dense(hidden, q["ffn_output"]), q["ffn_norm"])

    def head(q):
        return dense(np.maximum(norm(dense(kernels, q["hidden"]), q["norm"]), 0), q["output"])

    masks = np.einsum("bnc,bhwc->bnhw", head(p["mask_head"]), feats)
    return Stage(kernels, masks, head(p["class_head"]))


def test_update_equals_the_paper_on_transformed_features(update, feats, stage):
    apply, variables = update
    ours = apply(variables, feats, stage)
    wanted = reference_update(variables["params"], feats, stage)
    for name in Stage._fields:
        np.testing.assert_allclose(
            getattr(ours, name), getattr(wanted, name), rtol=1e-3, atol=1e-3, err_msg=name
        )


def test_gradients_equal_those_on_transformed_features(update, feats, stage):
    """The transposed convolution must not hide the gradient of its weights."""
    apply, variables = update
    weights = random(B, N, H, W, seed=7)

    def transformed(params, feats):
        feats = feats @ params["transform_kernel"] + params["transform_bias"]
        plain = params | {"transform_kernel": jnp.eye(C), "transform_bias": jnp.zeros(C)}
        return (apply({"params": plain}, feats, stage).masks * weights).sum()

    def ours(params, feats):
        return (apply({"params": params}, feats, stage).masks * weights).sum()

    one, two = (
        jax.jit(jax.grad(f, (0, 1)))(variables["params"], feats) for f in (ours, transformed)
    )
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two)):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-4 * float(abs(b).max()) + 1e-5)
    assert abs(one[0]["transform_bias"]).max() > 0


def test_update_does_not_care_about_the_order_of_kernels(update, feats, stage):
    apply, variables = update
    order = np.random.default_rng(0).permutation(N)
    plain = apply(variables, feats, stage)
    permuted = apply(
        variables,
        feats,
        stage._replace(kernels=stage.kernels[:, order], masks=stage.masks[:, order]),
    )
    for a, b in zip(permuted, plain):
        np.testing.assert_allclose(a, b[:, order], rtol=1e-4, atol=1e-4)


def test_only_the_sign_of_the_masks_before_counts(update, feats, stage):
    apply, variables = update
    scaled = apply(variables, feats, stage._replace(masks=7 * stage.masks))
    jax.tree.map(np.testing.assert_array_equal, scaled, apply(variables, feats, stage))


def test_kernels_stay_wide_where_maps_are_bfloat16(update, feats, stage):
    apply, variables = update
    exact = apply(variables, feats, stage)
    coarse = apply(variables, feats.astype(jnp.bfloat16), stage)
    assert {x.dtype for x in coarse} == {jnp.dtype("float32")}
    for a, b in zip(coarse, exact):
        np.testing.assert_allclose(a, b, atol=0.05 * float(abs(b).max()))


def test_empty_masks_give_finite_kernels_and_gradients(update, feats, stage):
    apply, variables = update
    empty = stage._replace(masks=-jnp.ones_like(stage.masks))

    @jax.jit
    @jax.grad
    def gradient(params):
        return sum((x**2).sum() for x in apply({"params": params}, feats, empty))

    grads = gradient(variables["params"])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_class_head_starts_at_the_prior(feats, stage):
    model = KernelUpdate(K, C, 2, 32)
    out, _ = jax.jit(model.init_with_output)(jax.random.key(0), feats, stage)
    assert out.logits.shape == (B, N, K)
    assert jax.nn.sigmoid(out.logits).mean() < 0.1
