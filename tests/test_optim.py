from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict
from tiny_model import MODEL

from knet_jax.model import make_model, variable_shapes
from knet_jax.saved import checkpoint_record
from knet_jax.system.errors import UserError
from knet_jax.training import optim

GROUPS = (
    ("frozen", r"backbone/stem/.*", 0.0, 0.0),
    ("backbone", r"backbone/.*", 0.25, 1.0),
    ("norms", r".*/scale", 1.0, 0.0),
    ("head", r".*", 1.0, 1.0),
)
FACTORS = {  # lr and weight decay, by hand
    "backbone/stem/kernel": (0.0, 0.0),
    "backbone/layer2/kernel": (0.25, 1.0),
    "head/kernel": (1.0, 1.0),
    "head/scale": (1.0, 0.0),
}


def make_config(**changes):
    config = ConfigDict(
        {
            "lr": 1e-2,
            "scale_lr": False,
            "reference_batch": 16,
            "weight_decay": 0.05,
            "clip_norm": 1.0,
            "warmup_steps": 4,
            "warmup_factor": 0.001,
            "decay_at": (6,),
            "decay_factor": 10.0,
            "unit": "step",
            "groups": GROUPS,
        }
    )
    config.update(changes)
    return config


def make_params(seed=0):
    draw = np.random.default_rng(seed).standard_normal
    return {
        "backbone": {"stem": {"kernel": draw((3, 4))}, "layer2": {"kernel": draw((4, 5))}},
        "head": {"kernel": draw((5, 2)), "scale": draw(5)},
    }


def numpy_adamw(params, grads, config):
    """The reference's optimizer in double precision: flat dicts, one of gradients a step."""
    params = {k: v.copy() for k, v in params.items()}
    m = {k: np.zeros_like(v) for k, v in params.items()}
    v = {k: np.zeros_like(p) for k, p in params.items()}
    for t, grad in enumerate(grads):
        trained = [k for k in params if FACTORS[k][0]]
        norm = np.sqrt(sum(np.sum(grad[k] ** 2) for k in trained))
        rate = config.lr * 0.1 ** sum(t >= at for at in config.decay_at)
        if t < config.warmup_steps:
            rate *= 1 - (1 - t / config.warmup_steps) * (1 - config.warmup_factor)
        for k in trained:
            lr, wd = rate * FACTORS[k][0], config.weight_decay * FACTORS[k][1]
            g = grad[k] * min(1.0, config.clip_norm / (norm + 1e-6))
            m[k] = 0.9 * m[k] + 0.1 * g
            v[k] = 0.999 * v[k] + 0.001 * g**2
            params[k] *= 1 - lr * wd
            params[k] -= (
                lr
                * m[k]
                / (1 - 0.9 ** (t + 1))
                / (np.sqrt(v[k]) / np.sqrt(1 - 0.999 ** (t + 1)) + 1e-8)
            )
    return params


def flat(tree):
    return dict(zip(checkpoint_record.leaf_paths(tree), map(np.asarray, jax.tree.leaves(tree))))


def test_eight_steps_equal_a_second_adamw_in_double_precision():
    config = make_config()
    with jax.enable_x64(True):
        params = jax.tree.map(jnp.asarray, make_params())
        # Large and small gradients, so that some steps are clipped and some are not.
        grads = [make_params(i + 1) for i in range(8)]
        grads = [jax.tree.map(lambda g, i=i: 0.3**i * g, grad) for i, grad in enumerate(grads)]
        tx, _ = optim.make_optimizer(config, params, 1, 16)
        state, update = tx.init(params), jax.jit(tx.update)
        expected = numpy_adamw(flat(params), [flat(g) for g in grads], config)
        frozen = np.asarray(params["backbone"]["stem"]["kernel"]).tobytes()
        for grad in grads:
            updates, state = update(jax.tree.map(jnp.asarray, grad), state, params)
            params = optax.apply_updates(params, updates)
        for path, value in flat(params).items():
            np.testing.assert_allclose(value, expected[path], rtol=1e-9, err_msg=path)
        assert np.asarray(params["backbone"]["stem"]["kernel"]).tobytes() == frozen


def test_frozen_parameters_have_no_state():
    params = jax.tree.map(jnp.asarray, make_params())
    tx, _ = optim.make_optimizer(make_config(), params, 1, 16)
    state = tx.init(params)
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
    shapes = sorted(leaf.shape for leaf in moments)
    assert shapes == sorted(2 * [(4, 5), (5, 2), (5,)])  # m and v of the three trained arrays
    assert not any("stem" in path for path in checkpoint_record.leaf_paths(state))


def test_a_frozen_gradient_neither_clips_nor_spreads():
    params = jax.tree.map(jnp.asarray, make_params())
    tx, _ = optim.make_optimizer(make_config(warmup_steps=0), params, 1, 16)
    grads = jax.tree.map(lambda p: 1e-3 * jnp.ones_like(p), params)
    plain, _ = tx.update(grads, tx.init(params), params)
    grads["backbone"]["stem"]["kernel"] *= jnp.nan
    poisoned, _ = tx.update(grads, tx.init(params), params)
    jax.tree.map(np.testing.assert_array_equal, plain, poisoned)
    mask = optim.trainable(GROUPS, params)
    assert optim.gradient_norm(grads, mask) == pytest.approx(1e-3 * np.sqrt(20 + 10 + 5))


def test_decay_in_epochs_and_within_the_warm_up():
    config = make_config(lr=1.0, unit="epoch", decay_at=(2, 3), warmup_steps=25)
    schedule = optim.make_schedule(config, 10.5, 16)
    warm = lambda t: 1 - (1 - t / 25) * 0.999
    for step, rate in {
        0: 0.001,
        20: warm(20),
        21: warm(21) / 10,
        25: 0.1,
        31: 0.1,
        32: 0.01,
    }.items():
        assert schedule(step) == pytest.approx(rate, rel=1e-5), step
    rates = optim.group_rates(config, schedule, 25)
    assert {k: float(v) for k, v in rates.items()} == pytest.approx(
        {"lr/backbone": 0.025, "lr/norms": 0.1, "lr/head": 0.1}
    )


def test_scaling_to_the_batch_is_said():
    config = make_config(scale_lr=True)
    params = make_params()
    assert optim.make_schedule(config, 1, 8)(5) == pytest.approx(5e-3)
    text = optim.describe(config, params, 1, 100, 8)
    assert "0.005 (0.01 x 8 / 16, scaled to the batch)" in text
    assert "frozen: frozen; 12 parameters in 1 arrays" in text
    assert "/ 10 at 6" in text
    assert "no decay" in optim.describe(config, params, 1, 5, 8)


def test_groups_that_do_not_fit_are_named():
    for groups, message in (
        (GROUPS[:3], "parameter 'head/kernel' is in no group"),
        ((("neck", "neck/.*", 1.0, 1.0), *GROUPS), "'neck' has no parameter"),
        ((GROUPS[3], GROUPS[1]), "'backbone' has no parameter"),
    ):
        with pytest.raises(ValueError, match=message):
            optim.assign_groups(groups, make_params())


def test_no_group_trains_what_is_frozen():
    """The backbone says what it freezes; of the shipped recipes none trains that."""
    frozen = ("frozen", r"backbone/(stem|layer1)_.*", 0.0, 0.0)
    head = ("head", r".*", 1.0, 1.0)
    for stages, groups, words in (
        (0, (head,), None),
        (1, (frozen, head), None),
        (2, (frozen, head), r"'head' trains backbone/layer2_block0/conv1/kernel, which .*freezes"),
        (1, (head,), r"'head' trains backbone/layer1_block0/conv1/kernel"),
    ):
        model = make_model(**MODEL | {"backbone": MODEL["backbone"] | {"frozen_stages": stages}})
        params = variable_shapes(model)["params"]
        with pytest.raises(UserError, match=words) if words else nullcontext():
            optim.check_frozen(groups, params, model.backbone.frozen)
