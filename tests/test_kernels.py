from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import random

from knet_jax.kernels import (
    AdaptiveUpdate,
    ClassKernels,
    InitialKernels,
    Interaction,
    KernelUpdate,
    claim_hard,
    claim_soft,
    draw,
    gather,
    sum_update,
)
from knet_jax.structs import Features, Stage

B, N, H, W, C, K = 2, 5, 6, 7, 16, 4


ADAPTIVE, INTERACTION = partial(AdaptiveUpdate, C), partial(Interaction, 2, 32)


def make_update(num_classes=K, claim=claim_hard, update=ADAPTIVE, interaction=INTERACTION):
    return KernelUpdate(num_classes, claim, update, interaction)


@pytest.fixture(scope="module")
def update():
    """A jitted KernelUpdate: (variables, feats, stage) -> stage, and its variables."""
    return initialized(make_update())


def initialized(model):
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


# Claiming, gathering and drawing.


def test_hard_claims_are_pixels_of_more_than_one_half(feats):
    masks = np.array(random(B, N, H, W, seed=1))
    masks[0, 0] = 0  # exactly one half is not claimed
    masks[0, 1] = 1e-30
    masks[0, 2] = -1e-30
    claims = claim_hard(jnp.asarray(masks))
    np.testing.assert_array_equal(claims, masks > 0)
    pooled, area = gather(claims, feats)
    wanted = np.einsum("bnhw,bhwc->bnc", masks > 0, feats)
    np.testing.assert_allclose(pooled, wanted, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(area[..., 0], (masks > 0).sum((2, 3)))
    assert area[0, :3, 0].tolist() == [0, H * W, 0]


def test_soft_claims_share_every_pixel_among_the_kernels(feats):
    masks = random(B, N, H, W, seed=1, scale=3)
    claims = claim_soft(masks)
    wanted = np.exp(masks) / np.exp(masks).sum(1, keepdims=True)
    np.testing.assert_allclose(claims, wanted, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(claims.sum(1), 1, rtol=1e-5)
    pooled, area = gather(claims, feats)
    # So the kernels together gather the whole map.
    np.testing.assert_allclose(pooled.sum(1), feats.sum((1, 2)), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(area.sum(1), H * W, rtol=1e-5)


@pytest.mark.parametrize("claim", [claim_hard, claim_soft])
def test_masks_get_a_gradient_from_soft_claims_only(feats, claim):
    masks, weights = random(B, N, H, W), random(B, N, C, seed=4)

    def loss(masks, feats):
        return (gather(claim(masks), feats)[0] * weights).sum()

    to_masks, to_feats = jax.grad(loss, (0, 1))(masks, feats)
    wanted = np.einsum("bnhw,bnc->bhwc", claim(masks), weights)
    np.testing.assert_allclose(to_feats, wanted, rtol=1e-4, atol=1e-4)
    if claim is claim_hard:
        assert not to_masks.any()
    else:  # p (v - sum of p v), the derivative of a softmax
        p, v = np.asarray(claim(masks)), np.einsum("bnc,bhwc->bnhw", weights, feats)
        wanted = p * (v - (p * v).sum(1, keepdims=True))
        np.testing.assert_allclose(to_masks, wanted, rtol=1e-3, atol=1e-4)


def test_sums_over_thousands_of_pixels_do_not_drown_in_bfloat16():
    claims = claim_hard(jnp.ones((1, 1, 60, 90)))
    pooled, area = gather(claims, jnp.ones((1, 60, 90, 2), jnp.bfloat16))
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
    return jax.jit(model.init_with_output, static_argnames="train")(
        jax.random.key(0), features, train=False
    )


def test_stage_0_is_proposals_then_stuff(features):
    (feats, stage, dense), variables = initial(N, 3, 2, features)
    parameters = variables["params"]
    assert feats.shape == (B, H, W, C) and dense.shape == (B, 5, H, W)
    assert stage.kernels.shape == (B, N + 2, C) and stage.masks.shape == (B, N + 2, H, W)
    assert stage.logits is None
    np.testing.assert_array_equal(stage.masks[:, N:], dense[:, 3:])
    for kernels in stage.kernels[:, N:]:  # stuff rows of the classifier, nothing gathered
        np.testing.assert_array_equal(kernels, parameters["class_kernels"][3:])
    pooled, area = gather(claim_hard(stage.masks[:, :N]), feats)
    assert (area > 0).all()
    wanted = parameters["proposals"] + pooled
    np.testing.assert_allclose(stage.kernels[:, :N], wanted, rtol=1e-4, atol=1e-4)
    assert abs(jax.nn.sigmoid(dense).mean() - 0.01) < 0.005  # the prior


def test_first_masks_are_drawn_on_localization_and_classes_on_semantic(features):
    (_, stage, dense), variables = initial(N, 3, 2, features)
    parameters = variables["params"]

    def other(name):
        changed = features._replace(**{name: getattr(features, name) + random(B, H, W, 8, seed=9)})
        return InitialKernels(N, 3, 2, C).apply({"params": parameters}, changed, train=False)

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
        {"params": variables["params"] | same}, features, train=False
    )
    np.testing.assert_allclose(stage.kernels, with_stuff.kernels[:, :N], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(stage.masks, with_stuff.masks[:, :N], rtol=1e-5, atol=1e-5)


def test_no_gradient_passes_the_gathering_of_stage_0(features):
    _, variables = initial(N, 3, 2, features)
    weights = random(B, N, C, seed=6)

    @jax.jit
    @jax.grad
    def gradient(params):
        _, stage, _ = InitialKernels(N, 3, 2, C).apply({"params": params}, features, train=False)
        return (stage.kernels[:, :N] * weights).sum()

    grads = gradient(variables["params"])
    # Kernels are proposals + pooled: the first part alone gives this.
    np.testing.assert_allclose(grads["proposals"], weights.sum(0), rtol=1e-5, atol=1e-5)
    assert abs(grads["semantic"]["conv"]["kernel"]).max() > 0
    assert not grads["class_kernels"].any()


# Kernels of classes.


@pytest.fixture(scope="module")
def classes(feats):
    """A jitted ClassKernels of half the channels dropped, and its variables, no longer zero."""
    model = ClassKernels(K, dropout=0.5)
    variables = model.init(jax.random.key(0), feats, False)
    assert not variables["params"]["class_bias"].any()
    params = {"class_kernels": random(K, C, seed=5), "class_bias": random(K, seed=6)}
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, variables["params"])
    return jax.jit(model.apply, static_argnames="train"), {"params": params}


def classify(params, feats):
    masks = np.einsum("nc,bhwc->bnhw", params["class_kernels"], feats)
    return masks + params["class_bias"][:, None, None]


def test_kernels_of_classes_are_the_rows_of_a_classifier(classes, feats):
    apply, variables = classes
    same, stage, dense = apply(variables, feats, train=False)
    params = variables["params"]
    np.testing.assert_array_equal(same, feats)
    assert dense is None and stage.logits is None
    assert stage.kernels.shape == (B, K, C)
    for kernels in stage.kernels:  # of every picture, without the bias
        np.testing.assert_array_equal(kernels, params["class_kernels"])
    np.testing.assert_allclose(stage.masks, classify(params, feats), rtol=1e-4, atol=1e-4)


def test_dropout_takes_whole_channels_from_the_classifier_only(classes, feats):
    apply, variables = classes
    params = variables["params"]
    same, stage, _ = apply(variables, feats, train=True, rngs={"dropout": jax.random.key(3)})
    np.testing.assert_array_equal(same, feats)  # what the kernels are updated with
    np.testing.assert_array_equal(stage.kernels[0], params["class_kernels"])
    # Which channels were kept is solved for: masks are linear in them.
    seen = []
    for masks, one in zip(np.asarray(stage.masks, float), np.asarray(feats, float)):
        columns = np.einsum("nc,hwc->nhwc", params["class_kernels"], one).reshape(-1, C)
        target = (masks - np.asarray(params["class_bias"])[:, None, None]).reshape(-1)
        seen.append(np.linalg.lstsq(columns, target, rcond=None)[0])
    seen = np.array(seen)
    np.testing.assert_allclose(seen, np.round(seen / 2) * 2, atol=1e-3)  # 0, or 1 / (1 - 0.5)
    assert set(np.round(seen.ravel())) == {0, 2}
    assert (seen[0].round() != seen[1].round()).any()  # each picture loses others
    _, plain, _ = apply(variables, feats, train=False)
    assert abs(plain.masks - stage.masks).max() > 0.1


def test_kernels_of_classes_get_gradients_from_masks_and_updates(classes, feats):
    apply, variables = classes

    def loss(params, part):
        return (getattr(apply({"params": params}, feats, train=False)[1], part) ** 2).sum()

    for part, bias_counts in ("kernels", False), ("masks", True):
        grads = jax.grad(loss)(variables["params"], part)
        assert abs(grads["class_kernels"]).max() > 0
        assert grads["class_bias"].any() == bias_counts


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
    model = make_update()
    out, _ = jax.jit(model.init_with_output)(jax.random.key(0), feats, stage)
    assert out.logits.shape == (B, N, K)
    assert jax.nn.sigmoid(out.logits).mean() < 0.1


# Its other forms.


def test_an_update_without_classes_has_masks_alone(feats, stage):
    apply, variables = initialized(make_update(num_classes=0))
    out = apply(variables, feats, stage)
    assert out.logits is None and "class_head" not in variables["params"]
    assert out.masks.shape == (B, N, H, W) and out.kernels.shape == (B, N, C)


def test_claims_decide_what_an_update_gathers(feats, stage):
    """Soft claims of masks that are sure are those that each pixel's best kernel makes."""
    best = jax.nn.one_hot(stage.masks.argmax(1), N, axis=1)
    sure = stage._replace(masks=200 * best - 100)
    hard, variables = initialized(make_update(claim=claim_hard))
    soft = jax.jit(make_update(claim=claim_soft).apply)
    for a, b in zip(hard(variables, feats, sure), soft(variables, feats, sure)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    plain, shared = hard(variables, feats, stage), soft(variables, feats, stage)
    assert abs(plain.kernels - shared.kernels).max() > 0.01


def test_wide_kernels_are_updated_in_halves():
    """A module of 8 channels on kernels of 16: as if the halves were kernels of their own."""
    model = AdaptiveUpdate(C // 2, "float32")
    kernels, pooled = random(B, N, C), random(B, N, C, seed=1)
    variables = jax.jit(model.init)(jax.random.key(0), kernels, pooled)
    assert variables["params"]["output"]["kernel"].shape == (C // 2, C // 2)
    ours = model.apply(variables, kernels, pooled)
    halves = [
        model.apply(variables, kernels[..., part], pooled[..., part])
        for part in (slice(None, C // 2), slice(C // 2, None))
    ]
    assert ours.shape == (B, N, C)
    np.testing.assert_allclose(ours, jnp.concatenate(halves, axis=-1), rtol=1e-5, atol=1e-6)
    assert abs(halves[0] - halves[1]).max() > 0.1


def test_without_gates_kernels_and_their_pixels_are_added(feats, stage):
    apply, variables = initialized(make_update(update=sum_update, interaction=None))
    params = variables["params"]
    assert params.keys() == {"transform_kernel", "transform_bias", "mask_head", "class_head"}
    transformed = feats @ params["transform_kernel"] + params["transform_bias"]
    wanted = stage.kernels + gather(claim_hard(stage.masks), transformed)[0]
    out = apply(variables, feats, stage)
    np.testing.assert_allclose(out.kernels, wanted, rtol=1e-4, atol=1e-3)


def test_without_interaction_every_kernel_is_alone(feats, stage):
    """What one kernel is changes no other one; with attention it does."""
    other = stage._replace(
        kernels=stage.kernels.at[:, 0].add(1.0), masks=stage.masks.at[:, 0].multiply(-1)
    )
    for interaction, alone in (None, True), (INTERACTION, False):
        apply, variables = initialized(make_update(interaction=interaction))
        assert ("interaction" in variables["params"]) != alone
        before, after = (apply(variables, feats, s) for s in (stage, other))
        for a, b in zip(before, after):
            assert abs(a[:, 0] - b[:, 0]).max() > 1e-3
            assert (abs(a[:, 1:] - b[:, 1:]).max() < 1e-5) == alone
