"""Opening a model: which checkpoint of it, and what is wrong where there is none."""

import jax
import numpy as np
import pytest
import tiny_runs
from safetensors.numpy import save_file
from tiny_weights import assert_equal, fill

import knet_jax.saved.models
from knet_jax.config.files import load_config, save_config
from knet_jax.model import make_model, variable_shapes
from knet_jax.saved.checkpoints import Checkpoints
from knet_jax.saved.convert import export_weights
from knet_jax.saved.models import load_init_weights, open_model
from knet_jax.saved.parameter_names import to_reference
from knet_jax.saved.weight_files import MODEL_KEY
from knet_jax.segmentation.segments import Categories

CONFIG = str(tiny_runs.CONFIGS / "shapes_panoptic.py:tiny")
OVERRIDES = [*tiny_runs.OVERRIDES, *tiny_runs.OF_TASKS["panoptic"]]
CATEGORIES = Categories(tuple("abcdefghi"), tuple(range(11, 20)), 5)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Step 0 without an average, and steps 1 to 3, whose parameters are multiplied by the step and
    their averages by ten times as much; the second has the best PQ, the first that of the average."""
    folder = tmp_path_factory.mktemp("run")
    config = load_config(CONFIG, [*OVERRIDES, "--config.train.ema_decay=0.9"])
    save_config(config, folder)
    network = make_model(**config.model)
    params = fill(variable_shapes(network))["params"]
    model, progress = config.model.to_dict(), {"categories": CATEGORIES._asdict()}
    with Checkpoints(folder / "checkpoints", keep=4, model=model) as checkpoints:
        checkpoints.save(0, {"params": params}, progress)
        for step, (score, of_average) in enumerate(((10, 30), (20, 20), (15, 10)), 1):
            state = {
                part: jax.tree.map(lambda x, v=value: v * x, params)
                for part, value in (("params", step), ("ema", 10 * step))
            }
            checkpoints.save(step, state, progress)
            checkpoints.add_scores(step, {"val/PQ": score, "val_ema/PQ": of_average})
    return folder


def test_the_checkpoint_that_is_asked_for(workdir):
    [first] = jax.tree.leaves(open_model(workdir, checkpoint=1).variables)[:1]
    for options, step, value in (
        ({}, 2, 2),
        ({"checkpoint": "latest"}, 3, 3),
        ({"checkpoint": "1"}, 1, 1),
        ({"ema": True}, 1, 10),
        ({"ema": True, "checkpoint": 3}, 3, 30),
    ):
        run = open_model(workdir, **options)
        assert (
            run.step == step and run.categories == CATEGORIES and set(run.variables) == {"params"}
        )
        np.testing.assert_array_equal(jax.tree.leaves(run.variables)[0], np.float32(value) * first)


def test_only_a_network_of_another_config_is_traced(workdir, monkeypatch):
    """To know its shapes by tracing takes longer than to read the weights."""
    with pytest.raises(ValueError, match=r"config\.model\.ffn_channels is 32 in it, 12 here"):
        open_model(workdir, overrides=["--config.model.ffn_channels=12"])
    monkeypatch.delattr(knet_jax.saved.models, "variable_shapes")
    run = open_model(workdir, dtype="bfloat16", overrides=["--config.eval.overlap_threshold=0.1"])
    assert run.model.backbone.dtype == run.config.model.dtype == "bfloat16"
    assert run.config.eval.overlap_threshold == 0.1
    assert open_model(workdir).model.backbone.dtype == "float32"


def test_the_file_of_a_model_is_the_model(workdir, tmp_path):
    path = tmp_path / "a.safetensors"
    export_weights(workdir, path, "latest", ema=True)
    changes = {"overrides": ["--config.eval.overlap_threshold=0.1"], "dtype": "bfloat16"}
    folder, file = open_model(workdir, "latest", True, **changes), open_model(path, **changes)
    assert_equal(file.variables, folder.variables)
    assert file.config == folder.config and file.categories == CATEGORIES and file.step == 3
    assert file.config.eval.overlap_threshold == 0.1 and file.model.backbone.dtype == "bfloat16"
    for options in ({"ema": True}, {"checkpoint": 3}):
        with pytest.raises(ValueError, match=r"a\.safetensors is a file and holds one set of wei"):
            open_model(path, **options)


def test_a_checkpoint_of_others_opens_with_a_config(workdir, tmp_path):
    folder = open_model(workdir)
    tensors = to_reference(folder.variables)
    path = tmp_path / "a.npz"
    np.savez(path, **tensors)
    file = open_model(path, config=CONFIG, overrides=OVERRIDES)
    assert_equal(file.variables, folder.variables)
    assert file.step == 0 and file.config.task == "panoptic" and file.categories.num_things == 5
    with pytest.raises(ValueError, match="holds weights and no config; knet_jax.load takes its co"):
        open_model(path)
    with pytest.raises(ValueError, match="is for a file of weights; .* has its own config"):
        open_model(workdir, config=CONFIG)
    np.savez(path, **{key: x for key, x in tensors.items() if key.startswith("backbone.")})
    with pytest.raises(ValueError, match="it holds a backbone only; python -m knet_jax.convert"):
        open_model(path, config=CONFIG, overrides=OVERRIDES)


def test_training_starts_from_the_folder_of_a_model(workdir):
    wanted = open_model(workdir).variables
    fresh = jax.tree.map(lambda x: -x, wanted)
    loaded, origin = load_init_weights(workdir, fresh)
    assert_equal(loaded, wanted)
    assert origin == f"network of step 2 from {workdir}"
    fresh["params"]["initial"]["class_bias"] = np.zeros(133, np.float32)
    with pytest.raises(
        ValueError, match=r"init_weights: .*class_bias is \(9,\) in it, \(133,\) he"
    ):
        load_init_weights(workdir, fresh)


def test_what_cannot_be_is_named(workdir, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.json").write_text((workdir / "config.json").read_text())
    with Checkpoints(empty / "checkpoints"):
        pass
    table = [
        (workdir, {"checkpoint": "good"}, r"=good; accepted: best, latest, or a step of \[0, 1, 2"),
        (workdir, {"checkpoint": None}, "^checkpoint=None; accepted: best, latest"),
        (workdir, {"checkpoint": 7}, "no checkpoint of step 7"),
        (workdir, {"checkpoint": 0, "ema": True}, "^ema=True: step 0 of .* has no average"),
        (workdir, {"dtype": "float16"}, "dtype is 'float16'; accepted: float32, bfloat16"),
        (workdir, {"dtype": np.float16}, "dtype is .*; accepted: float32, bfloat16"),
        (workdir, {"overrides": "--config.model.channels=8"}, "^overrides is '--conf.*a list"),
        (tmp_path, {}, "is no model"),
        (workdir / "config.json", {}, r"config\.json: accepted are \.npz, \.safetensors, .* files"),
        (tmp_path / "gone.safetensors", {}, r"gone\.safetensors: there is no such file"),
        (empty, {}, "no checkpoints in"),
    ]
    for path, options, words in table:
        with pytest.raises(ValueError, match=words):
            open_model(path, **options)
    for text in ("{}", "[1]", "words", '{"config": {}, "categories": 3}'):
        save_file({"a": np.zeros(3, np.float32)}, tmp_path / "a.safetensors", {MODEL_KEY: text})
        with pytest.raises(ValueError, match=r"a\.safetensors: the file cannot be read: "):
            open_model(tmp_path / "a.safetensors")
