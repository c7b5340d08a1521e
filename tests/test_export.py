"""Files that run without this project, and say what it says."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from PIL import Image
from test_train_eval import says

from knet_jax.config.files import load_config, save_config
from knet_jax.data.sources.shapes import draw
from knet_jax.export import model_file
from knet_jax.inference.any_size import Framing
from knet_jax.model import init_variables, make_model
from knet_jax.saved.checkpoints import Checkpoints
from knet_jax.saved.models import Model, open_model
from knet_jax.segmentation.published_classes import find as find_classes
from knet_jax.segmentation.segments import Categories
from knet_jax.system.errors import UserError
from knet_jax.tasks import TASKS

ROOT = Path(__file__).parents[1]
FORMATS = list(model_file.FORMATS)

SMALL = {
    "model.channels": 16,
    "model.ffn_channels": 32,
    "model.num_heads": 2,
    "model.num_stages": 1,
    "model.backbone.width": 8,
}
WHOLE = {
    "model.num_proposals": 12,
    "data.canvas": (64, 96),
    "data.short_side": (64, 64),
    "data.long_side": 96,
    "data.eval_multiple": 32,
}
CHANGES = {
    "panoptic": WHOLE | {"eval.instance_threshold": 0.0, "eval.overlap_threshold": 0.0},
    "instance": WHOLE | {"eval.num_results": 20},
    "semantic": {"data.scale": (96, 64), "data.eval_multiple": 32},
}
"""Of the demos: networks that compile in seconds, with a canvas for each orientation."""


def lively(variables):
    """Weights under which a network sees several segments."""
    rng = np.random.default_rng(3)
    flat = flatten_dict(variables["params"], sep="/")
    flat = {
        name: np.asarray(x) + (0.1 * rng.standard_normal(x.shape)).astype(np.float32)
        for name, x in flat.items()
    }
    return variables | {"params": unflatten_dict(flat, sep="/")}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folder of a run for each task."""
    root = tmp_path_factory.mktemp("models")
    for task in TASKS:
        config = load_config(f"{ROOT}/configs/shapes_{task}.py:tiny")
        config.update_from_flattened_dict(SMALL | CHANGES[task])
        (root / task).mkdir()
        save_config(config, root / task)
        model = make_model(**config.model)
        variables = lively(jax.jit(lambda model=model: init_variables(model, 0))())
        with Checkpoints(root / task / "checkpoints", model=config.model.to_dict()) as checkpoints:
            checkpoints.save(
                1, variables, {"categories": find_classes("shapes", "panoptic")._asdict()}
            )
    return root


# A process in which this project cannot be imported runs the lines of the documentation on every
# file, then on two pictures in one array.
ALONE = """
import sys
sys.modules["knet_jax"] = None
import os, pathlib
import numpy as np

code = sys.argv[1]
for folder in map(pathlib.Path, sys.argv[2:]):
    os.chdir(folder)
    names = {}
    exec(code, names)
    np.savez("alone.npz", **names["results"])
    pair = [np.load("pair.npz")[name] for name in ("image", "size")]
    if "session" in names:
        inputs = dict(zip(("image", "size"), pair))
        results = names["session"].run(None, inputs)
        results = dict(zip(names["metadata"]["outputs"], results))
    else:
        results = names["program"](names["weights"], *pair)
    np.savez("together.npz", **results)
    print(names["metadata"]["task"], [c["name"] for c in names["metadata"]["categories"]][-1])
"""


def documented(name):
    """The lines of Python under a heading of the documentation."""
    text = (ROOT / "docs" / "exporting.md").read_text().split(f"\n## {name}\n")[1]
    return re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]


# Of sizes that are not resized: what a network without training sees depends on every color.
PICTURES = [draw("val", i, (100, 130)).image[:64, :width] for i, width in ((0, 96), (3, 80))]


@pytest.fixture(scope="module")
def expected(folders):
    """What this project says about each picture, by task."""
    results = {}
    for task in TASKS:
        run = open_model(folders / task)
        results[task] = [model_file.expected(run, picture) for picture in PICTURES]
    return results


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_files_run_without_this_project(name, folders, expected, tmp_path):
    if model_file.FORMATS[name].packages:
        pytest.importorskip("onnxruntime")
    shapes = [picture.shape[:2] for picture in PICTURES]
    image = np.full((2, 96, 112, 3), 7, np.uint8)
    for place, picture in zip(image, PICTURES):
        place[: picture.shape[0], : picture.shape[1]] = picture
    places = []
    for task in TASKS:
        places.append(tmp_path / task)
        places[-1].mkdir()
        run = open_model(folders / task)
        path = places[-1] / f"model{model_file.FORMATS[name].suffix}"
        model_file.export(run, path, name, image=PICTURES[0])
        assert [file.name for file in path.parent.iterdir()] == [path.name]
        Image.fromarray(PICTURES[0]).save(places[-1] / "photo.png")
        np.savez(places[-1] / "pair.npz", image=image, size=np.int32(shapes))
    heading = {"stablehlo": "StableHLO", "onnx": "ONNX"}[name]
    code = documented(heading).replace("photo.jpg", "photo.png")
    done = subprocess.run(
        [sys.executable, "-c", ALONE, code, *map(str, places)],
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split("\n")[:-1] == [f"{task} noise" for task in TASKS]
    for task, place in zip(TASKS, places):
        alone = {key: array[0] for key, array in np.load(place / "alone.npz").items()}
        assert model_file.find_masks(expected[task][0])[1].any(1).sum() > 1, task
        assert model_file.agreement(expected[task][0], alone) > 0.98, task
        together = np.load(place / "together.npz")
        for i, (height, width) in enumerate(shapes):
            one = {key: array[i] for key, array in together.items()}
            for key in ("ids", "masks", *(["labels"] if task == "semantic" else [])):
                if key in one:
                    one[key] = one[key][..., :height, :width]
            assert model_file.agreement(expected[task][i], one) > 0.98, (task, i)


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_upright_pictures_have_their_own_canvas(name, folders, tmp_path):
    if model_file.FORMATS[name].packages:
        pytest.importorskip("onnxruntime")
    run = open_model(folders / "panoptic")
    picture = draw("val", 2, (100, 130)).image[:96, :64]
    views = model_file.make_views(model_file.of_two_canvases(run.config))
    assert [view.canvas for view in views] == [(64, 96), (96, 64)]
    path = tmp_path / "model"
    model_file.export(run, path, name, image=picture)
    results = model_file.FORMATS[name].open(path)(picture[None], np.int32([picture.shape[:2]]))
    assert results["ids"].shape == (1, *picture.shape[:2])
    seen = model_file.find_masks({name: array[0] for name, array in results.items()})[1]
    assert seen.any(1).sum() > 1


# Networks that the demos do not have.

OTHERS = {
    "deformable": ("coco_panoptic.py:tiny,tiny_dcn", {}),
    "swin": ("coco_panoptic.py:tiny,tiny_swin", {}),
    "coordinates": ("coco_panoptic.py:tiny", {"model.neck.coordinates": True}),
    "no updates": ("coco_instance.py:tiny", {"model.num_stages": 0}),
    "psp": ("ade20k_semantic.py:psp,tiny", {}),
    "deeplabv3": ("ade20k_semantic.py:deeplabv3,tiny", {}),
    "uper": ("ade20k_semantic.py:uper,tiny", {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", OTHERS)
def test_every_network_has_a_translation(case, tmp_path):
    """To ONNX, which computes what the exported program computes in jax."""
    pytest.importorskip("onnxruntime")
    spec, changes = OTHERS[case]
    config = load_config(f"{ROOT}/configs/{spec}")
    config.update_from_flattened_dict(changes | {"model.dtype": "float32"})
    model = make_model(**config.model)
    variables = lively(jax.jit(lambda: init_variables(model, 0))())
    weights = {k: np.asarray(v) for k, v in flatten_dict(variables, sep="/").items()}
    program = model_file.make_program(config, model, [Framing((64, 96), 64, 96)])
    categories = Categories(("a", "b"), (1, 2), 1)
    run = Model(config, model, variables, categories, 7)
    model_file.write_onnx(
        tmp_path / "model", program, weights, model_file.input_shapes((50, 70), 1), run
    )
    theirs = model_file.open_onnx(tmp_path / "model")
    image, size = model_file.draw_picture((50, 70))[None], np.int32([[50, 70]])
    theirs = {name: array[0] for name, array in theirs(image, size).items()}
    ours = jax.tree.map(lambda x: np.asarray(x)[0], jax.jit(program)(weights, image, size))
    assert ours.keys() == theirs.keys()
    assert model_file.agreement(ours, theirs) > 0.98
    if "scores" in ours:
        np.testing.assert_allclose(ours["scores"], theirs["scores"], atol=1e-3)


def test_a_file_has_the_canvases_of_training_or_that_of_its_size():
    config = load_config(f"{ROOT}/configs/coco_panoptic.py")
    both = model_file.make_views(model_file.of_two_canvases(config))
    assert [view.canvas for view in both] == [(800, 1344), (1344, 800)]
    [one] = model_file.make_views(config, (480, 640))
    assert one.canvas == (800, 1088)
    assert config.data.eval_multiple == 32


# What is refused.


def test_a_file_that_says_something_else_is_not_written(folders, tmp_path, monkeypatch):
    run = open_model(folders / "semantic")
    shape = (48, 64)
    nothing = {"labels": np.full(shape, -1)}
    monkeypatch.setattr(model_file, "expected", lambda run, image: nothing)
    path = tmp_path / "model"
    with pytest.raises(ValueError, match="is not written: .* by 0.0%"):
        model_file.export(run, path, "stablehlo", size=shape, batch=1)
    assert not list(tmp_path.iterdir())


def test_agreement_is_the_overlap_of_segments():
    ids = np.array([[0, 0, 1], [2, 2, 1]])
    ours = {"ids": ids, "labels": np.array([5, 3]), "scores": np.ones(2)}
    assert model_file.agreement(ours, ours) == 1
    assert model_file.agreement(ours, ours | {"labels": np.array([5, 3, -1])}) == 1
    swapped = {"ids": np.array([0, 2, 1])[ids], "labels": np.array([3, 5])}
    assert model_file.agreement(ours, swapped) == 1
    assert model_file.agreement(ours, ours | {"labels": np.array([5, 4])}) == 0.5
    assert model_file.agreement(ours, ours | {"ids": np.minimum(ids, 1)}) == 0.25
    nothing = {"ids": 0 * ids, "labels": np.array([], int)}
    assert model_file.agreement(nothing, nothing) == 1 and model_file.agreement(ours, nothing) == 0
    masks = {"masks": np.ones((2, 2, 2), bool), "labels": np.array([0, 1])}
    assert model_file.agreement(masks, masks | {"labels": np.array([0, 2])}) == 0.5
    labels = {"labels": np.array([[0, 0], [1, -1]])}
    assert model_file.agreement(labels, labels) == 1
    assert model_file.agreement(labels, {"labels": np.array([[0, 1], [1, -1]])}) == 0.5


def test_packages_that_are_missing_are_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    model_file.check_packages("stablehlo")
    with pytest.raises(UserError, match="pip install onnx onnxruntime"):
        model_file.check_packages("onnx")


def command(*arguments):
    done = subprocess.run(
        [sys.executable, "-m", "knet_jax.export", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
def test_the_command_for_pictures_of_one_size(folders, tmp_path):
    onnx = pytest.importorskip("onnx")
    path = tmp_path / "new" / "one.onnx"
    arguments = ("--format", "onnx", "--size", "48,64", "--batch", 1, "--output", path)
    status, out, err = command(folders / "semantic", *arguments)
    assert status == 0, err
    assert f"wrote {path}: semantic, 9 classes, step 1" in out and "uint8 [1, 48, 64, 3]" in out
    model = onnx.load(path)
    shapes = {
        value.name: [side.dim_value for side in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    assert shapes == {"image": [1, 48, 64, 3], "size": [1, 2], "labels": [1, 48, 64]}
    assert "If" not in {node.op_type for node in model.graph.node}
    metadata = json.loads({p.key: p.value for p in model.metadata_props}["knet_jax"])
    assert metadata["categories"][0] == {"name": "circle", "dataset_id": 1, "is_thing": True}
    assert metadata["config"]["task"] == metadata["task"] == "semantic"


def test_the_command_explains_itself():
    status, out, _ = command("--help")
    assert status == 0
    assert all(word in out for word in ("--format: <stablehlo|onnx>", "--output", "--size", "any"))


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], ["name one model"]),
        (["nowhere"], ["nowhere", "no such folder or file"]),
        (["README.md"], ["README.md", ".safetensors"]),
        (["docs", "--output", "tests"], ["--output=tests is a folder"]),
        (["runs", "--format", "torch"], ["torch", "stablehlo", "onnx"]),
        (["runs", "--size", "480x640"], ["--size=480x640", "480,640"]),
        (["runs", "--batch", "0"], ["batch", "0"]),
    ],
)
def test_mistakes_end_in_one_line(arguments, words):
    says(command(*arguments), *words)
