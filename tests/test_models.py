"""Opening a model: which checkpoint of it, and what is wrong where there is none."""

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_weights import assert_equal

import knet_jax.saved.checkpoint_record
import knet_jax.saved.models
from knet_jax.config.files import load_config, save_config
from knet_jax.model import init_variables, make_model
from knet_jax.saved.checkpoints import Checkpoints
from knet_jax.saved.convert import export_weights
from knet_jax.saved.models import open_model
from knet_jax.saved.parameter_names import to_reference
from knet_jax.saved.weight_files import MODEL_KEY
from knet_jax.segmentation.segments import Categories

CONFIG = "configs/shapes_panoptic.py:tiny"
CATEGORIES = Categories(tuple("abcdefghi"), tuple(range(11, 20)), 5)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Steps 1 to 3, whose parameters are the step and their averages ten times as much; the second
    has the best PQ, the first the best of the average."""
    folder = tmp_path_factory.mktemp("run")
    config = load_config(CONFIG, ["--config.train.ema_decay=0.9"])
    save_config(config, folder)
    shapes = jax.eval_shape(lambda: init_variables(make_model(**config.model), 0))
    with Checkpoints(folder / "checkpoints", model=config.model.to_dict()) as checkpoints:
        for step, (score, of_average) in enumerate(((10, 30), (20, 20), (15, 10)), 1):
            state = {
                part: jax.tree.map(
                    lambda x, v=value: np.full(x.shape, v, x.dtype), shapes["params"]
                )
                for part, value in (("params", step), ("ema", 10 * step), ("opt_state", -1))
            }
            checkpoints.save(step, state, {"categories": CATEGORIES._asdict()})
            checkpoints.add_scores(step, {"val/PQ": score, "val_ema/PQ": of_average})
    return folder


@pytest.mark.parametrize(
    "options, step, value",
    [
        ({}, 2, 2),
        ({"checkpoint": "latest"}, 3, 3),
        ({"checkpoint": 1}, 1, 1),
        ({"checkpoint": "1"}, 1, 1),
        ({"ema": True}, 1, 10),
        ({"ema": True, "checkpoint": 3}, 3, 30),
    ],
)
def test_the_checkpoint_that_is_asked_for(workdir, options, step, value):
    run = open_model(workdir, **options)
    assert run.step == step and run.categories == CATEGORIES
    assert set(run.variables) == {"params"}
    assert {float(x) for leaf in jax.tree.leaves(run.variables) for x in np.unique(leaf)} == {value}


def test_dtype_and_overrides_change_the_config(workdir):
    run = open_model(workdir, dtype="bfloat16", overrides=["--config.eval.overlap_threshold=0.1"])
    assert run.model.backbone.dtype == run.config.model.dtype == "bfloat16"
    assert run.config.eval.overlap_threshold == 0.1
    assert open_model(workdir).model.backbone.dtype == "float32"


@pytest.mark.parametrize(
    "options, words",
    [
        (
            {"checkpoint": "good"},
            r"checkpoint=good; accepted: best, latest, or a step of \[1, 2, 3\]",
        ),
        ({"checkpoint": 7}, "no checkpoint of step 7"),
        ({"dtype": "float16"}, "config.model.dtype is 'float16'; accepted: float32, bfloat16"),
        ({"ema": True, "overrides": ["--config.train.ema_decay=0.0"]}, "kept no average"),
    ],
)
def test_what_cannot_be_is_named(workdir, options, words):
    with pytest.raises(ValueError, match=words):
        open_model(workdir, **options)


def test_only_a_network_that_is_another_is_traced(workdir, monkeypatch):
    """To know its shapes by tracing takes longer than to read the weights."""

    def refuse(model, seed):
        raise RecursionError

    monkeypatch.setattr(knet_jax.saved.models, "init_variables", refuse)
    assert open_model(workdir, dtype="bfloat16").step == 2
    with pytest.raises(RecursionError):
        open_model(workdir, overrides=["--config.model.ffn_channels=12"])
    monkeypatch.setattr(knet_jax.saved.checkpoint_record, "network_code", lambda: "another")
    with pytest.raises(RecursionError):
        open_model(workdir)


def test_a_network_of_another_config_is_explained(workdir):
    with pytest.raises(ValueError, match="config.model.ffn_channels is .* in it, 12 here"):
        open_model(workdir, overrides=["--config.model.ffn_channels=12"])


# Files.


def test_the_file_of_a_model_is_the_model(workdir, tmp_path):
    path = tmp_path / "a.safetensors"
    export_weights(workdir, path, "latest", ema=True)
    folder, file = open_model(workdir, "latest", ema=True), open_model(path)
    assert_equal(file.variables, folder.variables)
    assert file.config == folder.config and file.categories == CATEGORIES and file.step == 3
    changed = open_model(path, overrides=["--config.eval.overlap_threshold=0.1"], dtype="bfloat16")
    assert changed.config.eval.overlap_threshold == 0.1
    assert changed.model.backbone.dtype == "bfloat16"
    again = tmp_path / "b.safetensors"
    export_weights(path, again)
    assert_equal(load_file(again), load_file(path))
    for options in ({"ema": True}, {"checkpoint": 3}):
        with pytest.raises(
            ValueError, match=r"a\.safetensors is a file and holds one set of weights"
        ):
            open_model(path, **options)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_a_checkpoint_of_others_opens_with_a_config(workdir, tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    folder = open_model(workdir)
    tensors = to_reference(folder.variables)

    def write(tensors):
        tensors = {name: np.ascontiguousarray(x) for name, x in tensors.items()}
        np.savez(path, **tensors) if suffix == ".npz" else save_file(tensors, path)

    write(tensors)
    file = open_model(path, config=CONFIG)
    assert_equal(file.variables, folder.variables)
    assert file.step == 0 and file.config.task == "panoptic" and file.categories.num_things == 5
    with pytest.raises(
        ValueError, match="holds weights and no config; knet_jax.load takes its config"
    ):
        open_model(path)
    with pytest.raises(ValueError, match="is for a file of weights; .* has a config of its own"):
        open_model(workdir, config=CONFIG)
    with pytest.raises(
        ValueError, match="9 classes, but config.model.num_things=4 and num_stuff=4; "
    ):
        counts = ["--config.model.num_things=4", "--config.model.num_stuff=4"]
        open_model(path, config=CONFIG, overrides=counts)
    name = "neck.fpn_convs.1.conv.bias"
    write({key: x for key, x in tensors.items() if key != name})
    with pytest.raises(ValueError, match=rf"a{suffix}: the weights have no tensor {name}"):
        open_model(path, config=CONFIG)
    write({key: x for key, x in tensors.items() if key.startswith("backbone.")})
    with pytest.raises(ValueError, match="it holds a backbone only; python -m knet_jax.convert"):
        open_model(path, config=CONFIG)


@pytest.mark.parametrize("text", ["{}", "[1]", "words", '{"config": {}, "categories": 3}'])
def test_a_file_that_does_not_say_what_it_is(tmp_path, text):
    save_file({"a": np.zeros(3, np.float32)}, tmp_path / "a.safetensors", {MODEL_KEY: text})
    with pytest.raises(ValueError, match=r"a\.safetensors: the file cannot be read: "):
        open_model(tmp_path / "a.safetensors")


# What is refused.


@pytest.mark.parametrize(
    "options, words",
    [
        ({"path": None}, "path is None; accepted: the folder of a model, or a file of weights"),
        ({"checkpoint": None}, "^checkpoint=None; accepted: best, latest"),
        ({"ema": True}, "^ema=True: the run kept no average"),
        ({"overrides": "--config.model.channels=8"}, "^overrides is '--conf.*; accepted: a list"),
        ({"overrides": [("a", 1)]}, "^overrides is .*; accepted: a list"),
        ({"dtype": np.float32}, "^dtype is .*; accepted: 'float32', 'bfloat16', or None"),
        ({"config": 3}, "^config is 3; accepted: 'configs/FILE.py"),
    ],
)
def test_arguments_of_another_kind_are_named(tmp_path, workdir, options, words):
    overrides = ["--config.train.ema_decay=0.0"]
    with pytest.raises(ValueError, match=words):
        open_model(**{"path": workdir, "overrides": overrides} | options)


def test_what_is_no_model_is_named(tmp_path, workdir):
    with pytest.raises(ValueError, match="is no model"):
        open_model(tmp_path)
    with pytest.raises(
        ValueError, match=r"config\.json: accepted are \.npz, \.safetensors, .* files"
    ):
        open_model(workdir / "config.json")
    with pytest.raises(ValueError, match=r"gone\.safetensors: there is no such file"):
        open_model(tmp_path / "gone.safetensors")
    (tmp_path / "config.json").write_text((workdir / "config.json").read_text())
    with pytest.raises(ValueError, match="no checkpoints"):
        open_model(tmp_path)
