"""The train step: what it changes, what it reports, and what does not change it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from devices import call
from flax import traverse_util
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh, PartitionSpec
from ml_collections import ConfigDict
from tiny_model import MODELS, WEIGHTS, make_batch
from tiny_training import config_of, share_programs, variables_of

from knet_jax.data import pipeline
from knet_jax.matching import LossWeights
from knet_jax.model import init_variables, make_model, variable_shapes
from knet_jax.segmentation import class_lists
from knet_jax.segmentation.segments import Categories
from knet_jax.structs import EMPTY
from knet_jax.tasks import TASKS
from knet_jax.training import optim, train_step
from knet_jax.training.train_step import Parts, TrainState, explain_change

DEVICE = jax.devices()[:1]


def model_of(norm, task="panoptic", **changes):
    """The network of a task after one update, with a norm for all of it that has a choice."""
    model = MODELS[task] | {"num_stages": 1} | changes
    for name in {"backbone", "neck"} & model.keys():
        model[name] = model[name] | {"norm": norm}
    return make_model(**model)


def run_step(step, state, batch, devices=DEVICE, num_parts=1):
    """State and metrics after a step, on the host; the state before it stays as it is."""
    state = train_step.replicate(jax.tree.map(jnp.array, state), devices)
    return jax.device_get(step(state, train_step.to_devices(batch, devices, num_parts)))


def first_state(variables, optimizer, step=0):
    params, batch_stats = variables["params"], variables.get("batch_stats", {})
    return TrainState(jnp.asarray(step), params, batch_stats, optimizer.init(params))


# One device, with the stem and the backbone frozen.


@pytest.fixture(scope="module")
def untried(tmp_path_factory):
    """A tiny run's config, what makes its step, its first state, and a batch of it."""
    config = config_of("panoptic", tmp_path_factory.mktemp("data"))
    split = pipeline.load_split(config.data, "train", "panoptic")
    batch = next(pipeline.train_batches(split, config.data, 4, 0, 0))
    model = make_model(**config.model)
    variables = variables_of(model)
    params = variables["params"]
    optimizer, _ = optim.make_optimizer(config.optim, params, 1, 4)
    make_step = partial(
        train_step.make_train_step,
        DEVICE,
        model=model,
        task=TASKS["panoptic"],
        optimizer=optimizer,
        trainable=optim.trainable(config.optim.groups, params),
        weights=LossWeights(**config.loss),
        seed=config.seed,
        ema_decay=config.train.ema_decay,
    )
    state = first_state(variables, optimizer)._replace(ema=params)
    return config, make_step, jax.device_get(state), batch


@pytest.fixture(scope="module")
def trainer(untried):
    """The same with the step itself."""
    config, make_step, state, batch = untried
    with pytest.MonkeyPatch.context() as monkeypatch:
        share_programs(monkeypatch)
        step = train_step.make_train_step(*make_step.args, **make_step.keywords)
        run_step(step, state, batch)  # compiles with the patches in place
    return config, step, state, batch


@pytest.mark.parametrize("task", MODELS)
def test_the_losses_of_a_bfloat16_network_get_its_masks_in_bfloat16(task):
    seen = []

    def loss(output, targets, counts, weights):
        seen.extend(stage.masks.dtype for stage in output.stages)
        seen.extend([output.dense.dtype] if output.dense is not None else [])
        return TASKS[task].loss(output, targets, counts, weights)

    model = make_model(**MODELS[task], dtype="bfloat16")
    batch = make_batch(task=task)
    targets = TASKS[task].unpack(batch.targets)
    compute = partial(
        train_step.compute_loss, model=model, task=TASKS[task]._replace(loss=loss), weights=WEIGHTS
    )
    variables = variable_shapes(model)
    image = jax.ShapeDtypeStruct(batch.image.shape, jnp.bfloat16)
    total, _ = jax.eval_shape(
        compute,
        variables["params"],
        variables.get("batch_stats", {}),
        image,
        targets,
        TASKS[task].count(targets),
        jax.random.key(0),
    )
    assert set(seen) == {jnp.dtype("bfloat16")} and total.dtype == jnp.float32


def test_a_step_is_kept_on_disk(untried, tmp_path):
    """So a run that goes on compiles nothing anew."""
    _, make_step, state, batch = untried
    places = {
        "jax_compilation_cache_dir": str(tmp_path),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in places}
    kept = []
    try:
        for name, value in places.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        for _ in range(2):
            run_step(make_step(), state, batch)
            kept.append({path.name for path in tmp_path.glob("*-cache")})
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
    assert kept[0] == kept[1] and len(kept[0]) >= 5  # counts, zeros, keys, gradient, update


def test_a_step_reports_its_terms(trainer):
    _, step, state, batch = trainer
    state, metrics = run_step(step, state, batch)
    assert state.step == 1
    terms = {name for name in metrics if name.startswith("loss/") and name != "loss/total"}
    assert len(terms) == 8
    np.testing.assert_allclose(metrics["loss/total"], sum(map(metrics.get, terms)), rtol=1e-5)
    assert metrics["grad_norm"] > 0 and 0 <= metrics["matched"] <= 1
    assert metrics.keys() - terms == {"loss/total", "grad_norm", "matched"}


def test_pictures_without_targets_and_padding_give_finite_steps(trainer):
    _, step, state, batch = trainer
    empty = batch._replace(
        image=np.zeros_like(batch.image),
        targets=jax.tree.map(
            lambda x: np.zeros_like(x) if x.dtype == np.uint8 else np.full_like(x, EMPTY),
            batch.targets,
        ),
        size=np.zeros_like(batch.size),
        id=np.full_like(batch.id, EMPTY),
    )
    state, metrics = run_step(step, state, empty)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((state, metrics)))
    assert metrics["matched"] == 0


def test_a_diverged_network_reaches_the_check_of_the_loss(trainer):
    _, step, state, batch = trainer
    broken = state._replace(params=jax.tree.map(lambda x: x * np.nan, state.params))
    assert not np.isfinite(run_step(step, broken, batch)[1]["loss/total"])


def test_the_average_follows_what_moves(trainer):
    """What is not frozen. Four steps: the decay grows over the first two and is what was asked for in the others."""
    config, step, state, batch = trainer
    average = jax.tree.map(np.float64, state.params)
    for decay in (1 / 10, 2 / 11, config.train.ema_decay, config.train.ema_decay):
        state, _ = run_step(step, state, batch)
        average = jax.tree.map(
            lambda old, new, decay=decay: decay * old + (1 - decay) * new, average, state.params
        )
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7), state.ema, average)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.ema)} == {np.dtype("float32")}
    behind = jax.tree.map(lambda new, old: (new != old).any(), state.params, state.ema)
    assert behind == optim.trainable(config.optim.groups, state.params)


# Devices and parts. Statistics of the whole batch need a single part.

DIVISIONS = {
    ("panoptic", "frozen_batch"): [(1, 1), (2, 2)],
    ("semantic", "batch"): [(1, 1), (2, 1)],
}


def worker(task, norm, folder):
    """A step on some divisions of a batch of four, in a process with two devices."""
    model, batch, optimizer = model_of(norm, task), make_batch(4, task=task), optax.sgd(1.0)
    variables = variables_of(model)
    for num_devices, num_parts in DIVISIONS[task, norm]:
        devices = jax.devices()[:num_devices]
        step = train_step.make_train_step(
            devices,
            model=model,
            task=TASKS[task],
            optimizer=optimizer,
            trainable=jax.tree.map(lambda _: True, variables["params"]),
            weights=WEIGHTS,
            seed=0,
        )
        state = first_state(variables, optimizer)
        state, metrics = run_step(step, state, batch, devices, num_parts)
        arrays = traverse_util.flatten_dict(
            {"params": state.params, "batch_stats": state.batch_stats, "metrics": metrics}, sep="|"
        )
        np.savez(f"{folder}/{num_devices}x{num_parts}.npz", **arrays)


@pytest.mark.slow
@pytest.mark.parametrize("task, norm", DIVISIONS)
def test_devices_and_parts_do_not_change_a_step(task, norm, tmp_path):
    call("test_training", "worker", task, norm, tmp_path, num_devices=2)
    results = {path.stem: dict(np.load(path)) for path in tmp_path.glob("*.npz")}
    assert len(results) == len(DIVISIONS[task, norm])
    alone = results.pop("1x1")
    variables = jax.device_get(variables_of(model_of(norm, task)))
    start = traverse_util.flatten_dict(variables, sep="|")
    gradients = {k: abs(alone[k] - start[k]).max() for k in alone if k.startswith("params")}
    assert max(gradients.values()) > 1e-2
    statistics = [k for k in alone if k.startswith("batch_stats")]
    assert statistics
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


# Dropout.


@pytest.mark.slow
def test_every_step_seed_part_and_device_drops_others():
    """The first loss term alone depends on dropout: kernels are updated with features before it."""
    model, task, weights = (
        model_of("group", "semantic", dropout=0.5, auxiliary_channels=0),
        TASKS["semantic"],
        WEIGHTS,
    )
    picture = make_batch(1, task="semantic")
    params = variables_of(model)["params"]
    # Two devices as an axis of one: the same picture on both.
    parts = jax.tree.map(lambda x: np.stack([x, x]), picture)

    @jax.jit
    def losses(seed, number, part):
        key = train_step.part_key(seed, number, part)

        def one(part):
            counts = train_step.count_targets(part, task=task)
            zeros = jax.tree.map(jnp.zeros_like, params)
            return train_step.accumulate(
                zeros, params, {}, part, counts, key, model=model, task=task, weights=weights
            )[2]

        return jax.vmap(one, axis_name=train_step.AXIS)(parts).terms["loss/initial/mask"]

    found = [losses(*at) for at in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))]
    assert len({float(value) for pair in found for value in pair}) == 8
    np.testing.assert_array_equal(losses(0, 1, 0), found[2])


@pytest.mark.parametrize(
    "model, affected",
    [
        ({"norm": "group"}, None),
        ({"norm": "frozen_batch"}, None),
        ({"norm": "batch"}, "batch statistics"),
        ({"norm": "group", "task": "semantic", "dropout": 0.0}, None),
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


def test_parts_hold_every_picture_once():
    batch = make_batch(4)._replace(id=np.arange(4, dtype=np.int32))
    parts = train_step.to_devices(batch, DEVICE, 2)
    assert [part.id.shape for part in parts] == [(1, 2), (1, 2)]
    assert sorted(np.concatenate([part.id.ravel() for part in parts]).tolist()) == [0, 1, 2, 3]
    for part in parts:
        for row, index in enumerate(np.asarray(part.id[0])):
            np.testing.assert_array_equal(part.image[0, row], batch.image[index])
            labels = batch.targets.labels[index]
            np.testing.assert_array_equal(part.targets.labels[0, row], labels)


# What a run starts from.


@pytest.mark.slow
def test_gradients_lower_for_gpus():
    """Of classes: the matching of things calls the host, which lowers beside a GPU only."""
    model, task = model_of("batch", "semantic", dtype="bfloat16"), TASKS["semantic"]
    batch = make_batch(2, task="semantic")
    variables = variable_shapes(model)
    counts = jax.eval_shape(lambda: task.count(task.unpack(batch.targets)))
    key = jax.eval_shape(lambda: jax.random.key(0))
    gradients = jax.shard_map(
        partial(train_step.accumulate, model=model, task=task, weights=WEIGHTS),
        mesh=Mesh(np.array(DEVICE), (train_step.AXIS,)),
        in_specs=PartitionSpec(),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    params = variables["params"]
    traced = jax.jit(gradients).trace(params, params, variables["batch_stats"], batch, counts, key)
    assert "convolution" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.slow
def test_initialization_is_a_function_of_the_seed():
    model = model_of("frozen_batch")
    same, again, other = (init_variables(model, seed) for seed in (3, 3, 4))
    jax.tree.map(np.testing.assert_array_equal, same, again)
    kernels = [v["params"]["backbone"]["stem_conv"]["kernel"] for v in (same, other)]
    assert (kernels[0] != kernels[1]).all()
    statistics = same["batch_stats"]["backbone"]["stem_norm"]
    assert (statistics["mean"] == 0).all() and (statistics["var"] == 1).all()


def test_other_class_counts_are_told_with_the_key_and_the_remedy():
    categories = Categories(("cat", "dog", "sky"), (3, 5, 7), 2)
    for counts, wrong, right in (
        ((20, 2, 1), {"num_things": 80}, 2),
        ((20, 2, 1), {"num_stuff": 53}, 1),
        # To a semantic network things are stuff like the rest.
        ((0, 0, 3), {"num_stuff": 150}, 3),
        ((0, 0, 3), {"num_things": 2}, 0),
    ):
        model = dict(zip(("num_proposals", "num_things", "num_stuff"), counts))
        class_lists.check_class_counts(ConfigDict({"model": model}), categories)
        with pytest.raises(ValueError) as error:
            class_lists.check_class_counts(ConfigDict({"model": model | wrong}), categories)
        ((name, value),) = wrong.items()
        message = str(error.value)
        assert f"config.model.{name} is {value}" in message
        assert f"--config.model.{name}={right}" in message and "\n" not in message
