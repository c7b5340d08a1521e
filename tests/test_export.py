"""Files that run without this project, and say what it says."""

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_runs
from flax.traverse_util import flatten_dict
from PIL import Image
from programs import status_of

from knet_jax.config.files import load_config
from knet_jax.data.sources.shapes import draw
from knet_jax.export import formats, model_file, program
from knet_jax.export.agreement import agreement, draw_picture, find_masks, segment
from knet_jax.inference.any_size import Framing
from knet_jax.model import make_model, variable_shapes
from knet_jax.saved.models import open_model
from knet_jax.system.errors import UserError
from knet_jax.tasks import TASKS

ROOT = Path(__file__).parents[1]

# Of the canvas's own size: what a network without training sees depends on every color.
PICTURES = [draw("val", i, (100, 130)).image[:64, :width] for i, width in ((0, 96), (3, 80))]
UPRIGHT = draw("val", 2, (100, 130)).image[:96, :64]


@pytest.fixture(scope="module")
def expected(tiny_models):
    """task -> what this project says about each picture."""

    @functools.cache
    def of(task):
        model = open_model(tiny_models[task])
        return [segment(model, image) for image in PICTURES]

    return of


def inputs_of(*pictures, shape=(112, 112)):
    """The inputs of a program: pictures in the corners of arrays."""
    image = np.full((len(pictures), *shape, 3), 7, np.uint8)
    for place, picture in zip(image, pictures):
        place[: picture.shape[0], : picture.shape[1]] = picture
    return {"image": image, "size": np.int32([picture.shape[:2] for picture in pictures])}


def result_of(results, i, size):
    """The result of picture i of several, at its pixels."""
    one = {name: array[i] for name, array in results.items()}
    maps = {name for name, array in one.items() if name in ("ids", "masks") or array.ndim == 2}
    return {name: x[..., : size[0], : size[1]] if name in maps else x for name, x in one.items()}


def check(results, expected, sizes):
    """Results of several pictures of a file against those of the project."""
    for i, (ours, size) in enumerate(zip(expected, sizes)):
        assert find_masks(ours)[1].any(1).sum() > 1
        assert agreement(ours, result_of(results, i, size)) > 0.98


def test_onnx_of_classes(tiny_models, expected, tmp_path):
    """For two pictures of one size; the file says what its numbers mean."""
    pytest.importorskip("onnxruntime")
    onnx, path = pytest.importorskip("onnx"), tmp_path / "new" / "semantic.onnx"
    fixed = {"size": (64, 96), "batch": 2}
    done = model_file.export_model(
        tiny_models["semantic"], path, "onnx", image=PICTURES[0], **fixed
    )
    assert done.path == path and done.agreement > 0.98
    inputs = inputs_of(*PICTURES, shape=fixed["size"])
    check(formats.open_onnx(path)(**inputs), expected("semantic"), inputs["size"])
    assert [file.name for file in path.parent.iterdir()] == ["semantic.onnx"]
    model = onnx.load(path)
    shapes = {
        value.name: [side.dim_value for side in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    assert shapes == {"image": [2, 64, 96, 3], "size": [2, 2], "labels": [2, 64, 96]}
    assert "If" not in {node.op_type for node in model.graph.node}
    metadata = json.loads({p.key: p.value for p in model.metadata_props}["knet_jax"])
    assert metadata["categories"][0] == {"name": "circle", "dataset_id": 1, "is_thing": False}
    assert metadata["config"]["task"] == metadata["task"] == "semantic"


def test_stablehlo_by_the_thresholds_of_the_config_beside_the_model(
    tiny_models, expected, tmp_path, capsys
):
    """By a threshold that leaves things out, which a comparison at another one would miss."""
    folder, changes = tiny_models["panoptic"], ["--config.eval.instance_threshold=0.985"]
    some = segment(open_model(folder, overrides=changes), PICTURES[0])
    assert agreement(some, expected("panoptic")[0]) < 0.9
    Image.fromarray(PICTURES[0]).save(tmp_path / "photo.png")
    flags = ("--size", "64,96", "--batch", "1", "--image", tmp_path / "photo.png", *changes)
    assert status_of("export", folder, *flags) == 0
    path = folder / "model.stablehlo.npz"
    said = capsys.readouterr().out
    assert said.startswith(f"wrote {path}: panoptic, 9 classes, step 1, ")
    assert float(re.search(r"overlap those of the model by (.*)%\n", said)[1]) > 98
    path.unlink()


# A process in which this project cannot be imported runs the lines of the documentation on every
# file, then on two pictures in one array and on an upright one.
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
    np.savez("photo.npz", **names["results"])
    for name in ("pair", "upright"):
        inputs = dict(np.load(f"{name}_inputs.npz"))
        if "session" in names:
            arrays = names["session"].run(None, inputs)
            results = dict(zip(names["metadata"]["outputs"], arrays))
        else:
            results = names["program"](names["weights"], inputs["image"], inputs["size"])
        np.savez(f"{name}.npz", **results)
    print(names["metadata"]["task"], [c["name"] for c in names["metadata"]["categories"]][0])
"""


@pytest.mark.slow
@pytest.mark.parametrize("heading, tasks", [("StableHLO", ["instance"]), ("ONNX", TASKS)])
def test_files_run_without_this_project(heading, tasks, tiny_models, expected, tmp_path):
    if heading == "ONNX":
        pytest.importorskip("onnxruntime")
    pair = inputs_of(*PICTURES)
    upright = {"image": UPRIGHT[None], "size": np.int32([UPRIGHT.shape[:2]])}
    for task in tasks:
        place = tmp_path / task
        place.mkdir()
        suffix = formats.FORMATS[heading.lower()].suffix
        model_file.export_model(
            tiny_models[task], place / f"model{suffix}", heading.lower(), image=PICTURES[0]
        )
        Image.fromarray(PICTURES[0]).save(place / "photo.png")
        np.savez(place / "pair_inputs.npz", **pair)
        np.savez(place / "upright_inputs.npz", **upright)
    text = (ROOT / "docs" / "exporting.md").read_text().split(f"\n## {heading}\n")[1]
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1].replace("photo.jpg", "photo.png")
    done = subprocess.run(
        [sys.executable, "-c", ALONE, code, *(str(tmp_path / task) for task in tasks)],
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == [f"{task} circle" for task in tasks]
    for task in tasks:
        read = {name: dict(np.load(tmp_path / task / f"{name}.npz")) for name in ("photo", "pair")}
        check(read["photo"], expected(task)[:1], pair["size"])
        check(read["pair"], expected(task), pair["size"])
        # On a canvas of its own, which stands upright.
        ours = segment(open_model(tiny_models[task]), UPRIGHT)
        check(dict(np.load(tmp_path / task / "upright.npz")), [ours], upright["size"])


# Networks that the demos do not have.
OTHERS = {
    "deformable": ("coco_panoptic.py:tiny,tiny_dcn", {}),
    "swin": ("coco_panoptic.py:tiny,tiny_swin", {}),
    "convnext": ("coco_panoptic.py:tiny,tiny_convnext", {}),
    "vit": ("coco_panoptic.py:tiny,tiny_vit", {}),
    "plain decoder": ("coco_panoptic.py:tiny", {"model.num_stages": 0}),
    "coordinates": ("coco_instance.py:tiny", {"model.neck.coordinates": True}),
    "deeplabv3": ("ade20k_semantic.py:deeplabv3,tiny", {}),
    "uper": ("ade20k_semantic.py:uper,tiny", {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", OTHERS)
def test_every_network_has_a_translation(case):
    """To ONNX that onnxruntime takes; `test_onnx_model.py` compares what each operator computes."""
    onnxruntime = pytest.importorskip("onnxruntime")
    from knet_jax.export import onnx_model

    spec, changes = OTHERS[case]
    config = load_config(f"{ROOT}/configs/{spec}")
    config.update_from_flattened_dict(changes | {"model.dtype": "float32"})
    network = make_model(**config.model)
    shapes = variable_shapes(network)
    variables = tiny_runs.random_variables(shapes, np.random.default_rng(0))
    function = program.make_program(config, network, [Framing((64, 96), 64, 96)])
    inputs = program.input_shapes((50, 70))
    weights = flatten_dict(variables, sep="/")
    proto = onnx_model.convert(function, weights, inputs, lambda outputs: {})
    convolutions = [node for node in proto.graph.node if node.op_type == "Conv"]
    assert len(convolutions) <= sum(w.ndim == 4 for w in weights.values()), "one is done twice"
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    image, size = draw_picture((50, 70))[None], np.int32([[50, 70]])
    for array in session.run(None, {"image": image, "size": size}):
        assert array.size and np.isfinite(array).all()


def test_a_file_has_the_canvases_of_training_or_that_of_its_size():
    config = load_config(f"{ROOT}/configs/coco_panoptic.py")
    both = program.make_framings(program.with_training_canvases(config))
    assert [framing.canvas for framing in both] == [(800, 1344), (1344, 800)]
    [one] = program.make_framings(config, (480, 640))
    assert one.canvas == (800, 1088)
    assert config.data.eval_multiple == 32


def test_agreement_is_the_overlap_of_segments():
    ids = np.array([[0, 0, 1], [2, 2, 1]])
    ours = {"ids": ids, "labels": np.array([5, 3]), "scores": np.ones(2)}
    assert agreement(ours, ours) == 1
    assert agreement(ours, ours | {"labels": np.array([5, 3, -1])}) == 1
    swapped = {"ids": np.array([0, 2, 1])[ids], "labels": np.array([3, 5])}
    assert agreement(ours, swapped) == 1
    assert agreement(ours, ours | {"labels": np.array([5, 4])}) == 0.5
    assert agreement(ours, ours | {"ids": np.minimum(ids, 1)}) == 0.25
    nothing = {"ids": 0 * ids, "labels": np.array([], int)}
    assert agreement(nothing, nothing) == 1 and agreement(ours, nothing) == 0
    masks = {"masks": np.ones((2, 2, 2), bool), "labels": np.array([0, 1])}
    assert agreement(masks, masks | {"labels": np.array([0, 2])}) == 0.5
    labels = {"labels": np.array([[0, 0], [1, -1]])}
    assert agreement(labels, labels) == 1
    assert agreement(labels, {"labels": np.array([[0, 1], [1, -1]])}) == 0.5


def test_what_is_refused(tiny_models, tmp_path, monkeypatch):
    folder = tiny_models["semantic"]
    (tmp_path / "not a model").mkdir()
    for arguments, words in (
        ({"source": tmp_path / "nowhere"}, ["nowhere", "no such folder or file"]),
        ({"source": ROOT / "README.md"}, ["README.md", ".safetensors"]),
        ({"source": tmp_path / "not a model"}, ["config.json"]),
        ({"source": folder, "output": tmp_path}, [f"{tmp_path}, a folder", ".stablehlo.npz"]),
        ({"source": folder, "format": "torch"}, ["torch", "stablehlo, onnx"]),
        ({"source": folder, "size": (9, 9), "image": PICTURES[0]}, ["(64, 96)", "(9, 9)"]),
    ):
        with pytest.raises(UserError) as raised:
            model_file.export_model(**arguments)
        assert all(word in str(raised.value) for word in words), raised.value
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    formats.find_format("stablehlo")
    with pytest.raises(UserError, match="pip install onnx onnxruntime"):
        formats.find_format("onnx")


def test_a_file_that_says_something_else_is_not_written(tiny_models, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    shape = (48, 64)
    nothing = {"labels": np.full(shape, -1)}
    monkeypatch.setattr(model_file, "segment", lambda model, image: nothing)
    with pytest.raises(UserError, match="is not written: .* by 0.0%"):
        model_file.export_model(tiny_models["semantic"], tmp_path / "model", "onnx", size=shape)
    assert not list(tmp_path.iterdir())
