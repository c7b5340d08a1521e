from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from devices import call
from flax import traverse_util
from jax.sharding import Mesh, PartitionSpec
from ml_collections import ConfigDict
from tiny_model import MODELS, WEIGHTS, make_batch

from knet_jax.model import make_model
from knet_jax.segmentation import class_lists
from knet_jax.segmentation.segments import Categories
from knet_jax.structs import EMPTY, PanopticTargets
from knet_jax.tasks import TASKS
from knet_jax.training import optim, train_step
from knet_jax.training.train_step import Parts, explain_change


def model_of(norm, task="panoptic", **changes):
    """The network of a task after one update, with a norm for all of it that has a choice."""
    model = MODELS[task] | {"num_stages": 1} | changes
    for name in {"backbone", "neck"} & model.keys():
        model[name] = model[name] | {"norm": norm}
    return make_model(**model)


def variables_of(model):
    """Parameters (small scales too) and statistics that are all different from their first values."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: x + jnp.asarray(0.05 * np.abs(rng.standard_normal(x.shape)), x.dtype),
        model.init_variables(model, 0),
    )


ALL = (("all", ".*", 1.0, 1.0),)


def make_step(
    model, variables, devices, optimizer, groups=ALL, task="panoptic", seed=0, ema_decay=0.0
):
    """(state, batch, parts) -> state and metrics after a step, on the host."""
    step = train_step.make_train_step(
        devices,
        model=model,
        task=TASKS[task],
        optimizer=optimizer,
        trainable=optim.trainable(groups, variables["params"]),
        weights=WEIGHTS,
        seed=seed,
        ema_decay=ema_decay,
    )

    def run(state, batch, num_parts=1):
        state = jax.tree.map(jnp.array, state)  # a copy: the step's is donated
        parts = train_step.to_devices(batch, devices, num_parts)
        return jax.device_get(step(train_step.replicate(state, devices), parts))

    return run


def first_state(variables, optimizer, step=0):
    """Before a step of a number."""
    params, batch_stats = variables["params"], variables.get("batch_stats", {})
    return train_step.TrainState(jnp.asarray(step), params, batch_stats, optimizer.init(params))


# Devices and parts. Statistics of the whole batch need a single part.
DIVISIONS = {
    ("panoptic", "group"): [(1, 1), (1, 2), (1, 4), (4, 1)],
    ("panoptic", "frozen_batch"): [(1, 1), (2, 2)],
    ("panoptic", "batch"): [(1, 1), (2, 1), (4, 1)],
    ("instance", "group"): [(1, 1), (2, 2)],
    ("semantic", "group"): [(1, 1), (2, 2)],
    ("semantic", "batch"): [(1, 1), (4, 1)],
}


def worker(task, norm, folder):
    """A step on some divisions of a batch of four, in a process with four devices."""
    model = model_of(norm, task)
    variables, batch = variables_of(model), make_batch(4, task=task)
    for num_devices, num_parts in DIVISIONS[task, norm]:
        devices = jax.devices()[:num_devices]
        optimizer = optax.sgd(1.0)
        step = make_step(model, variables, devices, optimizer, task=task)
        state, metrics = step(first_state(variables, optimizer), batch, num_parts)
        arrays = traverse_util.flatten_dict(
            {"params": state.params, "batch_stats": state.batch_stats, "metrics": metrics}, sep="|"
        )
        np.savez(f"{folder}/{num_devices}x{num_parts}.npz", **arrays)


@pytest.mark.slow
@pytest.mark.parametrize("task, norm", DIVISIONS)
def test_devices_and_parts_do_not_change_a_step(task, norm, tmp_path):
    call("test_training", "worker", task, norm, tmp_path, num_devices=4)
    results = {path.stem: dict(np.load(path)) for path in tmp_path.glob("*.npz")}
    assert len(results) == len(DIVISIONS[task, norm])
    alone = results.pop("1x1")
    variables = jax.device_get(variables_of(model_of(norm, task)))
    start = traverse_util.flatten_dict(variables, sep="|")
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
                atol=1e-2 * scale + 1e-6,
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


EMA_DECAY = 0.2
"""Reached at the third step: before it, (1 + t) / (10 + t) is less."""


@pytest.fixture(scope="module")
def trainer(variables):
    """The project's own optimizer, the stem and a stage frozen, and its step."""
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
    devices = jax.devices()[:1]
    run = make_step(model_of("group"), variables, devices, optimizer, GROUPS, ema_decay=EMA_DECAY)
    return optimizer, run


@pytest.fixture(scope="module")
def step(trainer):
    """(variables, batch) -> state and metrics after a first step."""
    optimizer, run = trainer
    return lambda variables, batch: run(first_state(variables, optimizer), batch)


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
            np.zeros_like(batch.targets.segment_map),
            np.full_like(batch.targets.labels, EMPTY),
            np.full_like(batch.targets.stuff_labels, EMPTY),
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


def test_the_average_follows_its_recurrence(trainer, variables):
    """Four steps: the decay grows over the first two and is what was asked for in the others."""
    optimizer, run = trainer
    params = jax.device_get(variables["params"])
    state = first_state(variables, optimizer)._replace(ema=params)
    average, batch = jax.tree.map(np.float64, params), make_batch(4)
    for decay in (1 / 10, 2 / 11, EMA_DECAY, EMA_DECAY):
        state, _ = run(state, batch)
        average = jax.tree.map(
            lambda old, new, decay=decay: decay * old + (1 - decay) * new, average, state.params
        )
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-8), state.ema, average)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.ema)} == {np.dtype("float32")}
    behind = jax.tree.map(lambda new, old: (new != old).any(), state.params, state.ema)
    assert behind == optim.trainable(GROUPS, params)


def test_a_run_that_keeps_no_average_has_none(trained):
    assert trained[1].ema is None


# Dropout.

PICTURE = make_batch(1, task="semantic")
TWICE = jax.tree.map(lambda x: np.concatenate([x, x]), PICTURE)


def semantic_step(dropout, seed=0):
    """(number of the step, batch, parts) -> state and metrics after it."""
    model = model_of("group", "semantic", dropout=dropout, auxiliary_channels=0)
    variables, optimizer = variables_of(model), optax.sgd(0.01)
    run = make_step(model, variables, jax.devices()[:1], optimizer, task="semantic", seed=seed)
    return lambda number, *args: run(first_state(variables, optimizer, number), *args), run


@pytest.fixture(scope="module")
def with_dropout():
    return semantic_step(0.5)


def initial_loss(result):
    """The term that dropout changes; kernels are updated with features that it does not touch."""
    return float(result[1]["loss/initial/mask"])


def test_the_same_seed_and_step_are_the_same_step(with_dropout):
    at, _ = with_dropout
    jax.tree.map(np.testing.assert_array_equal, at(3, TWICE, 2), at(3, TWICE, 2))


@pytest.mark.slow
def test_another_step_or_seed_drops_others(with_dropout):
    at, _ = with_dropout
    other, _ = semantic_step(0.5, seed=1)
    each = [initial_loss(run) for run in (at(0, PICTURE), at(1, PICTURE), other(0, PICTURE))]
    assert len(set(each)) == 3


@pytest.mark.slow
def test_every_part_drops_others(with_dropout):
    """A picture, and the same one in two parts: means over images are equal without dropout."""
    at, _ = with_dropout
    assert initial_loss(at(0, TWICE, 2)) != pytest.approx(initial_loss(at(0, PICTURE)), rel=1e-3)
    at, _ = semantic_step(0.0)
    assert initial_loss(at(0, TWICE, 2)) == pytest.approx(initial_loss(at(0, PICTURE)), rel=1e-5)


@pytest.mark.slow
def test_every_device_drops_others():
    """Two devices as an axis of one: the same picture on both."""
    model = model_of("group", "semantic", dropout=0.5, auxiliary_channels=0)
    params = variables_of(model)["params"]
    parts = jax.tree.map(lambda x: x[:, None], TWICE)
    task, weights = TASKS["semantic"], WEIGHTS

    @jax.jit
    def run(key):
        def one(part):
            counts = train_step.count_targets(part, task=task)
            zeros = jax.tree.map(jnp.zeros_like, params)
            return train_step.accumulate(
                zeros, params, {}, part, counts, key, model=model, task=task, weights=weights
            )[2]

        return jax.vmap(one, axis_name=train_step.AXIS)(parts)

    terms = run(jax.random.key(0)).terms
    assert terms["loss/initial/mask"][0] != terms["loss/initial/mask"][1]


def test_a_step_depends_on_nothing_but_its_state(with_dropout):
    """So a resumed run drops the same channels as one that was never stopped."""
    at, run = with_dropout
    first, _ = at(0, TWICE, 2)
    second = run(first, TWICE, 2)
    run(second[0], TWICE, 2)
    jax.tree.map(np.testing.assert_array_equal, run(first, TWICE, 2), second)
    assert second[0].step == 2 and np.isfinite(second[1]["loss/total"])


# What a run starts from.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_lower_for_gpus(dtype):
    """Of classes: the matching of things calls the host, which lowers beside a GPU only."""
    model, task = model_of("batch", "semantic", dtype=dtype), TASKS["semantic"]
    batch = make_batch(2, task="semantic")
    variables = jax.eval_shape(lambda: model.init_variables(model, 0))
    counts = jax.eval_shape(lambda: task.count(task.unpack(batch.targets)))
    key = jax.eval_shape(lambda: jax.random.key(0))
    gradients = jax.shard_map(
        partial(train_step.accumulate, model=model, task=task, weights=WEIGHTS),
        mesh=Mesh(np.array(jax.devices()[:1]), (train_step.AXIS,)),
        in_specs=PartitionSpec(),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    params = variables["params"]
    traced = jax.jit(gradients).trace(params, params, variables["batch_stats"], batch, counts, key)
    assert "convolution" in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_initialization_is_a_function_of_the_seed():
    model = model_of("frozen_batch")
    same, again, other = (model.init_variables(model, seed) for seed in (3, 3, 4))
    jax.tree.map(np.testing.assert_array_equal, same, again)
    kernels = [v["params"]["backbone"]["stem_conv"]["kernel"] for v in (same, other)]
    assert (kernels[0] != kernels[1]).all()
    statistics = same["batch_stats"]["backbone"]["stem_norm"]
    assert (statistics["mean"] == 0).all() and (statistics["var"] == 1).all()


def test_parts_hold_every_picture_once():
    batch = make_batch(4)._replace(id=np.arange(4, dtype=np.int32))
    parts = train_step.to_devices(batch, jax.devices()[:1], 2)
    assert [part.id.shape for part in parts] == [(1, 2), (1, 2)]
    assert sorted(np.concatenate([part.id.ravel() for part in parts]).tolist()) == [0, 1, 2, 3]
    for part in parts:
        for row, index in enumerate(np.asarray(part.id[0])):
            np.testing.assert_array_equal(part.image[0, row], batch.image[index])
            labels = batch.targets.labels[index]
            np.testing.assert_array_equal(part.targets.labels[0, row], labels)


@pytest.mark.parametrize(
    "counts, wrong, right",
    [
        ((20, 2, 1), {"num_things": 80}, 2),
        ((20, 2, 1), {"num_stuff": 53}, 1),
        # To a semantic network things are stuff like the rest.
        ((0, 0, 3), {"num_stuff": 150}, 3),
        ((0, 0, 3), {"num_things": 2}, 0),
    ],
)
def test_other_class_counts_are_told_with_the_key_and_the_remedy(counts, wrong, right):
    categories = Categories(("cat", "dog", "sky"), (3, 5, 7), 2)
    model = dict(zip(("num_proposals", "num_things", "num_stuff"), counts))
    class_lists.check_class_counts(ConfigDict({"model": model}), categories)
    with pytest.raises(ValueError) as error:
        class_lists.check_class_counts(ConfigDict({"model": model | wrong}), categories)
    ((name, value),) = wrong.items()
    message = str(error.value)
    assert f"config.model.{name} is {value}" in message
    assert f"--config.model.{name}={right}" in message and "\n" not in message


@pytest.mark.parametrize(
    "model, affected",
    [
        ({"norm": "group"}, None),
        ({"norm": "frozen_batch"}, None),
        ({"norm": "batch"}, "batch statistics"),
        ({"norm": "group", "task": "semantic", "dropout": 0.0}, None),
        ({"norm": "group", "task": "semantic", "dropout": 0.1}, "dropout"),
        ({"norm": "batch", "task": "semantic", "dropout": 0.1}, "dropout, batch statistics"),
    ],
)
def test_other_parts_are_a_warning_where_the_network_depends_on_them(model, affected):
    model = model_of(**model)
    was = Parts(2, 4)
    assert explain_change(model, was, Parts(2, 4)) is None
    for now in (Parts(1, 4), Parts(2, 2)):
        warning = explain_change(model, was, now)
        if affected is None:
            assert warning is None
        else:
            assert warning.startswith("WARNING: 2 devices of 4 images at a time have become ")
            assert f"{now.num_devices} of {now.num_images}: {affected} will differ" in warning
