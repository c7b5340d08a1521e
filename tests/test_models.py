"""Opening a model: which checkpoint of it, and what is wrong where there is none."""

import hashlib
import json
import shutil

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
from knet_jax.saved.convert import export_weights, import_weights
from knet_jax.saved.models import load_init_weights, open_model
from knet_jax.saved.parameter_names import to_reference
from knet_jax.saved.weight_files import MODEL_KEY
from knet_jax.segmentation.segments import Categories
from knet_jax.system.errors import UserError

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
    assert run.network.backbone.dtype == run.config.model.dtype == "bfloat16"
    assert run.config.eval.overlap_threshold == 0.1
    assert open_model(workdir).network.backbone.dtype == "float32"


def test_the_file_of_a_model_is_the_model(workdir, tmp_path):
    path = tmp_path / "a.safetensors"
    export_weights(workdir, path, "latest", ema=True)
    changes = {"overrides": ["--config.eval.overlap_threshold=0.1"], "dtype": "bfloat16"}
    folder, file = open_model(workdir, "latest", True, **changes), open_model(path, **changes)
    assert_equal(file.variables, folder.variables)
    assert file.config == folder.config and file.categories == CATEGORIES and file.step == 3
    assert file.config.eval.overlap_threshold == 0.1 and file.network.backbone.dtype == "bfloat16"
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
    with pytest.raises(ValueError, match="it holds a backbone only; knet convert"):
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
        (workdir, {"checkpoint": 0, "ema": True}, "^ema=True: step 0 of .* has no ema"),
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


def test_a_model_of_a_stranger_is_refused_in_one_line(workdir, tmp_path):
    """Whatever stands in it: the config, the classes, the step."""
    config = load_config(CONFIG, OVERRIDES).to_dict()
    classes = CATEGORIES._asdict()
    sound = {"config": config, "categories": classes, "step": 1}
    long = "a" * 10**6

    def with_config(**changes):
        return sound | {"config": config | changes}

    def with_classes(**changes):
        return sound | {"categories": classes | changes}

    for content in (
        sound | {"config": {key: value for key, value in config.items() if key != "eval"}},
        {}, [1], "words", "[" * 10**5, None, sound | {"step": "x"}, sound | {"config": [1]},
        with_config(data=5), with_config(**{"a.b": 1}), with_config(items=3), with_config(__class__="x"),
        with_config(model=config["model"] | {"num_stages": 10**5}),
        with_config(model=config["model"] | {"channels": 10**30}),
        with_config(model=config["model"] | {"backbone": {"name": "os.system"}}),
        with_config(data=config["data"] | {"canvas": [10**9, 10**9]}),
        sound | {"categories": None}, with_classes(names=["a"] * 8), with_classes(names=[5] * 9),
        with_classes(names="abcdefghij"), with_classes(names=[long] * 9),
        with_classes(dataset_ids=["1"] * 9), with_classes(dataset_ids=[1] * 9),
        with_classes(num_things=-1), with_classes(num_things="5"), with_classes(num_things=4),
    ):  # fmt: skip
        text = content if isinstance(content, str) else json.dumps(content)
        save_file({"a": np.zeros(3, np.float32)}, tmp_path / "a.safetensors", {MODEL_KEY: text})
        with pytest.raises(UserError) as caught:
            open_model(tmp_path / "a.safetensors")
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    text = json.dumps(with_config(data=5))
    save_file({"a": np.zeros(3, np.float32)}, tmp_path / "a.safetensors", {MODEL_KEY: text})
    with pytest.raises(UserError, match=r"a\.safetensors: "):
        import_weights(tmp_path / "a.safetensors", None, tmp_path / "other")
    # An expression that never ends is of no use here, and not tried.
    groups = [["all", "(.*)*(.*)*(.*)*x", 1.0, 1.0]]
    changed = config | {"optim": config["optim"] | {"groups": groups}}
    (tmp_path / "config.json").write_text(json.dumps(changed))
    (tmp_path / "checkpoints").symlink_to(workdir / "checkpoints")
    assert open_model(tmp_path).step == 2


def test_a_record_of_a_stranger_is_refused_in_one_line(workdir, tmp_path):
    """Its digest is as it should be: anyone can compute that."""
    shutil.copytree(workdir, tmp_path / "run")
    path = tmp_path / "run/checkpoints/3/record/metadata"
    sound = json.loads(path.read_text())
    arrays = sound["arrays"]
    first = min(path for path in arrays if path.startswith("params"))
    classes = sound["progress"]["categories"]
    for changes in (
        {"arrays": None}, {"arrays": {}}, {"arrays": arrays | {first: {}}}, {"model": [1]},
        {"model": {"a": 1}}, {"progress": None}, {"progress": {}}, {"step": "3"}, {"step": None},
        *({"arrays": arrays | {first: arrays[first] | change}}
          for change in ({"shape": [1 << 50]}, {"shape": "x"}, {"dtype": "object"}, {"dtype": "x"})),
        {"arrays": arrays | {"params/../../x": arrays[first]}},
        {"arrays": arrays | {f"{first}/x": arrays[first]}},
        *({"progress": {"categories": classes | change}}
          for change in ({"names": [5] * 9}, {"names": ["x"]}, {"num_things": 99})),
    ):  # fmt: skip
        record = {key: value for key, value in (sound | changes).items() if key != "digest"}
        text = json.dumps(record, sort_keys=True).encode()
        digest = hashlib.blake2b(text, digest_size=16).hexdigest()
        path.write_text(json.dumps(record | {"digest": digest}))
        with pytest.raises(UserError) as caught:
            open_model(tmp_path / "run", "latest")
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
