import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from devices import call
from flax import traverse_util
from ml_collections import ConfigDict
from tiny_model import MODEL, make_batch

from knet_jax import optim, training
from knet_jax.knet import make_model
from knet_jax.matching import Weights
from knet_jax.structs import EMPTY, Categories, PanopticTargets

SMALL = MODEL | {"num_stages": 1}


def model_of(norm):
    return make_model(**SMALL | {"backbone": SMALL["backbone"] | {"norm": norm}})


def variables_of(model):
    """Parameters (small scales too) and statistics that are all different from their first values."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: x + jnp.asarray(0.05 * np.abs(rng.standard_normal(x.shape)), x.dtype),
        training.init_variables(model, 0),
    )


def make_step(model, variables, devices, optimizer, groups=(("all", ".*", 1.0, 1.0),)):
    """(variables, batch, parts) -> state and metrics after a first step, on the host."""
    params = variables["params"]
    step = training.make_train_step(
        devices,
        model=model,
        optimizer=optimizer,
        trainable=optim.trainable(groups, params),
        weights=Weights(),
    )

    def first_step(variables, batch, num_parts=1):
        variables = jax.tree.map(jnp.array, variables)  # a copy: the step's is donated
        state = training.TrainState(
            jnp.zeros((), jnp.int32),
            variables["params"],
            variables.get("batch_stats", {}),
            optimizer.init(variables["params"]),
        )
        parts = training.to_devices(batch, devices, num_parts)
        return jax.device_get(step(training.replicate(state, devices), parts))

    return first_step


# Devices and parts. Statistics of the whole batch need a single part.
DIVISIONS = {
    "group": [(1, 1), (1, 2), (1, 4), (4, 1)],
    "frozen_batch": [(1, 1), (2, 2)],
    "batch": [(1, 1), (2, 1), (4, 1)],
}


def worker(norm, folder):
    """A step on some divisions of a batch of four, in a process with four devices."""
    model = model_of(norm)
    variables, batch = variables_of(model), make_batch(4)
    for num_devices, num_parts in DIVISIONS[norm]:
        devices = jax.devices()[:num_devices]
        step = make_step(model, variables, devices, optax.sgd(1.0))
        state, metrics = step(variables, batch, num_parts)
        arrays = traverse_util.flatten_dict(
            {"params": state.params, "batch_stats": state.batch_stats, "metrics": metrics}, sep="|"
        )
        np.savez(f"{folder}/{num_devices}x{num_parts}.npz", **arrays)


@pytest.mark.slow
@pytest.mark.parametrize("norm", DIVISIONS)
def test_devices_and_parts_do_not_change_a_step(norm, tmp_path):
    call("test_training", "worker", norm, tmp_path, num_devices=4)
    results = {path.stem: dict(np.load(path)) for path in tmp_path.glob("*.npz")}
    assert len(results) == len(DIVISIONS[norm])
    alone = results.pop("1x1")
    start = traverse_util.flatten_dict(jax.device_get(variables_of(model_of(norm))), sep="|")
    gradients = {k: abs(alone[k] - start[k]).max() for k in alone if k.startswith("params")}
    assert max(gradients.values()) > 1e-2
    statistics = [k for k in alone if k.startswith("batch_stats")]
    assert bool(statistics) == (norm != "group")
    for name in statistics:
        assert (alone[name] != start[name]).any() == (norm == "batch"), name
    for division, result in results.items():
        assert result.keys() == alone.keys()
        for name, value in alone.items():
            # Gradients that are zero but for rounding exist: keys of attention have no bias.
            scale = max(gradients.get(name, 0), 1e-3) if name in gradients else abs(value).max()
            np.testing.assert_allclose(
                result[name],
                value,
                rtol=1e-4,
                atol=2e-3 * scale + 1e-6,
                err_msg=f"{division} {name}",
            )


# One device.


GROUPS = (
    ("frozen", r"backbone/(stem|layer1)_.*", 0.0, 0.0),
    ("backbone", r"backbone/.*", 0.25, 1.0),
    ("head", ".*", 1.0, 1.0),
)


@pytest.fixture(scope="module")
def variables():
    return variables_of(model_of("group"))


@pytest.fixture(scope="module")
def step(variables):
    """A first step of the project's own optimizer, the stem and a stage frozen."""
    config = ConfigDict(
        {
            "lr": 1e-3,
            "scale_lr": False,
            "reference_batch": 4,
            "weight_decay": 0.05,
            "clip_norm": 1.0,
            "warmup_steps": 0,
            "warmup_factor": 1.0,
            "decay_at": (),
            "decay_factor": 10.0,
            "unit": "step",
            "groups": GROUPS,
        }
    )
    optimizer, _ = optim.make_optimizer(config, variables["params"], 1, 4)
    return make_step(model_of("group"), variables, jax.devices()[:1], optimizer, GROUPS)


@pytest.fixture(scope="module")
def trained(step, variables):
    """The parameters before a step, the state after it, its metrics."""
    return jax.device_get(variables["params"]), *step(variables, make_batch(4))


def test_frozen_parameters_stay_and_all_others_move(trained):
    before, state, _ = trained
    assert state.step == 1
    before, after = (traverse_util.flatten_dict(p, sep="/") for p in (before, state.params))
    frozen = {name for name in before if name.startswith(("backbone/stem_", "backbone/layer1_"))}
    assert len(frozen) > 5
    for name in before:
        moved = (before[name] != after[name]).any()
        assert moved == (name not in frozen), name


def test_metrics_are_the_terms_their_sum_and_measures(trained):
    _, _, metrics = trained
    terms = {name for name in metrics if name.startswith("loss/") and name != "loss/total"}
    assert len(terms) == 8
    total = sum(metrics[name] for name in terms)
    np.testing.assert_allclose(metrics["loss/total"], total, rtol=1e-5)
    assert metrics["grad_norm"] > 0 and 0 <= metrics["matched"] <= 1
    assert metrics.keys() - terms == {"loss/total", "grad_norm", "matched"}


def test_pictures_without_targets_and_padding_give_finite_steps(step, variables):
    batch = make_batch(4)
    empty = batch._replace(
        image=np.zeros_like(batch.image),
        targets=PanopticTargets(
            np.zeros_like(batch.targets.segment_map), np.full_like(batch.targets.labels, EMPTY)
        ),
        size=np.zeros_like(batch.size),
        id=np.full_like(batch.id, EMPTY),
    )
    state, metrics = step(variables, empty)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((state, metrics)))
    assert metrics["matched"] == 0


def test_a_diverged_network_reaches_the_check_of_the_loss(step, variables):
    broken = {"params": jax.tree.map(lambda x: x * jnp.nan, variables["params"])}
    _, metrics = step(broken, make_batch(4))
    assert not np.isfinite(metrics["loss/total"])


def test_initialization_is_a_function_of_the_seed():
    model = model_of("frozen_batch")
    same, again, other = (training.init_variables(model, seed) for seed in (3, 3, 4))
    jax.tree.map(np.testing.assert_array_equal, same, again)
    kernels = [v["params"]["backbone"]["stem_conv"]["kernel"] for v in (same, other)]
    assert (kernels[0] != kernels[1]).all()
    statistics = same["batch_stats"]["backbone"]["stem_norm"]
    assert (statistics["mean"] == 0).all() and (statistics["var"] == 1).all()


def test_parts_hold_every_picture_once():
    batch = make_batch(4)._replace(id=np.arange(4, dtype=np.int32))
    parts = training.to_devices(batch, jax.devices()[:1], 2)
    assert [part.id.shape for part in parts] == [(1, 2), (1, 2)]
    assert sorted(np.concatenate([part.id.ravel() for part in parts]).tolist()) == [0, 1, 2, 3]
    for part in parts:
        for row, index in enumerate(np.asarray(part.id[0])):
            np.testing.assert_array_equal(part.image[0, row], batch.image[index])
            np.testing.assert_array_equal(part.targets.labels[0, row], batch.targets.labels[index])


def test_other_class_counts_are_told_with_the_key_and_the_remedy():
    categories = Categories(("cat", "dog", "sky"), (3, 5, 7), 2)
    config = ConfigDict({"model": {"num_things": 2, "num_stuff": 1}})
    training.check_categories(config, categories)
    for name, wrong, right in ("num_things", 80, 2), ("num_stuff", 53, 1):
        changed = ConfigDict(config.to_dict())
        changed.model[name] = wrong
        with pytest.raises(ValueError) as error:
            training.check_categories(changed, categories)
        message = str(error.value)
        assert f"config.model.{name} is {wrong}" in message
        assert f"--config.model.{name}={right}" in message and "\n" not in message
