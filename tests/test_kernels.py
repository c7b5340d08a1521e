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
    model = make_update()
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


def test_stage_0_is_proposals_then_stuff(features):
    model = InitialKernels(N, 3, 2, C)
    init = jax.jit(partial(model.init_with_output, train=False, capture_intermediates=True))
    (feats, stage, dense), variables = init(jax.random.key(0), features)
    parameters, maps = variables["params"], variables["intermediates"]
    localization, semantic = (maps[name]["__call__"][0] for name in features._fields)
    np.testing.assert_allclose(feats, localization + semantic, rtol=1e-5)
    drawn = draw(parameters["proposals"], localization)
    np.testing.assert_allclose(stage.masks[:, :N], drawn, rtol=1e-4, atol=1e-4)
    classified = draw(parameters["class_kernels"], semantic)
    classified = classified + parameters["class_bias"][:, None, None]
    np.testing.assert_allclose(dense, classified, rtol=1e-4, atol=1e-4)
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


# The update.


def dense(x, q):
    return x @ q["kernel"] + q.get("bias", 0)


def norm(x, q):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return x * q["scale"] + q["bias"]


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def reference_update(parameters, feats, stage, soft):
    """The kernel update of the paper, on explicitly transformed features, in numpy. What has no
    parameters is left out."""
    p = jax.tree.map(np.asarray, parameters)
    feats = np.asarray(feats) @ p["transform_kernel"] + p["transform_bias"]
    claims = np.exp(stage.masks) / np.exp(stage.masks).sum(1, keepdims=True)
    pooled = np.einsum("bnhw,bhwc->bnc", claims if soft else np.asarray(stage.masks) > 0, feats)
    x = mix_gated(p["update"], pooled, stage) if "update" in p else stage.kernels + pooled
    kernels = interact(p["interaction"], x) if "interaction" in p else x

    def head(q):
        return dense(np.maximum(norm(dense(kernels, q["hidden"]), q["norm"]), 0), q["output"])

    masks = np.einsum("bnc,bhwc->bnhw", head(p["mask_head"]), feats)
    return Stage(kernels, masks, head(p["class_head"]) if "class_head" in p else None)


def mix_gated(q, pooled, stage):
    pixel_in, pixel_out = np.split(dense(pooled, q["from_pixels"]), 2, axis=-1)
    kernel_in, kernel_out = np.split(dense(np.asarray(stage.kernels), q["from_kernel"]), 2, axis=-1)
    gate = kernel_in * pixel_in
    kernel_gate = sigmoid(norm(dense(gate, q["kernel_gate"]), q["kernel_gate_norm"]))
    pixel_gate = sigmoid(norm(dense(gate, q["pixel_gate"]), q["pixel_gate_norm"]))
    x = pixel_gate * norm(pixel_out, q["pixel_norm"])
    x = x + kernel_gate * norm(kernel_out, q["kernel_norm"])
    return np.maximum(norm(dense(x, q["output"]), q["output_norm"]), 0)


def interact(q, x):
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
    return norm(x + dense(hidden, q["ffn_output"]), q["ffn_norm"])


FORMS = {
    "of the paper": {},
    "soft claims": {"claim": claim_soft},
    "without classes": {"num_classes": 0},
    "without gates": {"update": sum_update, "interaction": None},
    "without interaction": {"interaction": None},
}


def test_every_form_of_the_update_equals_its_formulas(update, feats, stage):
    """On explicitly transformed features, with one set of parameters: a form takes what it has."""
    _, variables = update
    for form, changes in FORMS.items():
        model = make_update(**changes)
        shapes = jax.eval_shape(model.init, jax.random.key(0), feats, stage)["params"]
        params = {name: variables["params"][name] for name in shapes}
        assert (len(params) < len(variables["params"])) == form.startswith("without"), form
        ours = jax.jit(model.apply)({"params": params}, feats, stage)
        wanted = reference_update(params, feats, stage, soft="claim" in changes)
        for name, value, theirs in zip(Stage._fields, ours, wanted):
            if theirs is None:
                assert value is None, form
            else:
                np.testing.assert_allclose(value, theirs, rtol=1e-3, atol=1e-3, err_msg=name)


def test_a_new_class_head_starts_at_the_prior(update):
    _, variables = update
    bias = variables["params"]["class_head"]["output"]["bias"]
    np.testing.assert_allclose(jax.nn.sigmoid(bias), 0.01, rtol=1e-5)


def test_empty_masks_give_finite_kernels_and_gradients(update, feats, stage):
    apply, variables = update
    empty = stage._replace(masks=-jnp.ones_like(stage.masks))

    @jax.jit
    @jax.grad
    def gradient(params):
        return sum((x**2).sum() for x in apply({"params": params}, feats, empty))

    grads = gradient(variables["params"])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


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
