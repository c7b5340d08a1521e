"""Takes a model away as one file that runs without this project.

The file holds the weights, the resizing of pictures of any size, the network, and the way from masks
to a panoptic map, instances or a label map at the picture's own size; names of classes and the config
lie beside them. docs/exporting.md shows how to run it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict
from tqdm import tqdm

import knet_jax
from knet_jax.app.segmenter import Segmenter
from knet_jax.data import recipes
from knet_jax.inference.any_size import Framing, resize_into_canvas
from knet_jax.inference.forward import run_network
from knet_jax.inference.multiscale import canvas_of
from knet_jax.knet import KNet
from knet_jax.saved.checkpoints import check_writable
from knet_jax.saved.models import Model, is_weight_file, open_model
from knet_jax.segmentation import rle
from knet_jax.segmentation.segments import PanopticMap
from knet_jax.structs import EMPTY, Batch, Pass
from knet_jax.system.errors import UserError
from knet_jax.tasks import TASKS

LANDSCAPE, PORTRAIT = (240, 320), (320, 240)
"""Pictures whose canvases serve all pictures."""

LEAST_AGREEMENT = 0.98
"""Of a file with the network that it was made of. Pixels where two segments are equally likely, and
what follows from them, may go either way."""

PASSES = ("scales", "flip", "window", "window_step")
"""Keys of `config.eval` that a file knows nothing of: it looks at a picture once, and whole."""

PLATFORMS = ("cpu", "cuda")

Arrays = Mapping[str, np.ndarray]
Results = dict[str, np.ndarray]
Program = Callable[..., Any]


# What is exported.


def of_two_canvases(config: ConfigDict) -> ConfigDict:
    """The config of a file for pictures of any size: whole pictures lie on the canvases of training."""
    config = config.copy_and_resolve_references()
    if "canvas" in config.data:
        config.data.eval_multiple = 0
    return config


def make_views(config: ConfigDict, size: tuple[int, int] | None = None) -> tuple[Framing, ...]:
    """How an exported network sees pictures of a height and width; by default those of any size,
    by a config `of_two_canvases`, upright ones by the last view."""
    recipe = recipes.find(config.task, config.data)
    sizes = [size] if size else [LANDSCAPE, PORTRAIT]
    canvases = dict.fromkeys(tuple(recipe.eval_canvas(size)) for size in sizes)
    return tuple(Framing(canvas, *recipe.eval_sides) for canvas in canvases)


def make_program(config: ConfigDict, model: KNet, views: Sequence[Framing]) -> Program:
    """(weights by name, images uint8 [b, H, W, 3], their sizes int32 [b, 2]) -> the results of the
    task by name, see `any_size.py`."""
    task = TASKS[config.task]
    options = task.choose_options(model.sizes, config.eval)

    def through(view: Framing, variables: Any, image: jax.Array, size: jax.Array) -> Any:
        shown, shown_size = resize_into_canvas(image, size, view)
        batch = Batch(shown, None, shown_size, size, None)
        stage = run_network(variables, batch, model=model)
        return task.predict_any_size(
            Pass(stage, shown_size, canvas_of(batch), jnp.zeros(image.shape[0], bool)),
            size,
            shape=image.shape[1:3],
            **options,
        )

    def program(weights: Mapping[str, jax.Array], image: jax.Array, size: jax.Array) -> Any:
        with jax.default_matmul_precision(config.precision):
            variables = unflatten_dict(weights, sep="/")
            branches = [partial(through, view, variables) for view in views]
            if len(branches) == 1:
                return branches[0](image, size)
            height, width = (jnp.asarray(side) for side in image.shape[1:3])
            return jax.lax.cond(height > width, *reversed(branches), image, size)

    return program


def input_shapes(
    size: tuple[int, int] | None = None, batch: int | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """The inputs of a program by name; what is not given is a symbol: b, H, W."""
    spec = (batch or "b", *(size or ("H", "W")), 3)
    shape = jax.export.symbolic_shape(", ".join(map(str, spec)))
    return {
        "image": jax.ShapeDtypeStruct(shape, np.uint8),
        "size": jax.ShapeDtypeStruct((shape[0], 2), np.int32),
    }


def describe(run: Model, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> dict[str, Any]:
    """What a user of the file has to know, as JSON holds it."""

    def shapes(arrays: Mapping[str, Any]) -> dict[str, Any]:
        return {
            name: {
                "dtype": np.dtype(array.dtype).name,
                "shape": [side if isinstance(side, int) else str(side) for side in array.shape],
            }
            for name, array in arrays.items()
        }

    names, ids, num_things = run.categories
    return {
        "made_by": f"knet_jax {knet_jax.__version__}",
        "task": run.config.task,
        "step": run.step,
        "categories": [
            {"name": name, "dataset_id": int(id), "is_thing": i < num_things}
            for i, (name, id) in enumerate(zip(names, ids))
        ],
        "inputs": shapes(inputs),
        "outputs": shapes(outputs),
        "config": run.config.to_dict(),
    }


# The formats.


def write_stablehlo(
    path: Path, program: Program, weights: Arrays, inputs: Mapping[str, Any], run: Model
) -> None:
    """An npz with the weights by name, `program` as `jax.export` serializes it, and `metadata`."""
    shapes = {name: jax.ShapeDtypeStruct(w.shape, w.dtype) for name, w in weights.items()}
    exported = jax.export.export(jax.jit(program), platforms=PLATFORMS)(shapes, *inputs.values())
    outputs = jax.tree.unflatten(exported.out_tree, exported.out_avals)
    metadata = describe(run, inputs, outputs) | {"weights": list(weights)}
    parts = {"program": bytes(exported.serialize()), "metadata": json.dumps(metadata).encode()}
    with path.open("wb") as file:
        np.savez(file, **{k: np.frombuffer(v, np.uint8) for k, v in parts.items()}, **weights)


def open_stablehlo(path: Path) -> Program:
    """The program of a file, with its weights: (image, size) -> results by name."""
    file = np.load(path)
    metadata = json.loads(file["metadata"].tobytes())
    program = jax.jit(jax.export.deserialize(bytearray(file["program"])).call)
    weights = jax.device_put({name: file[name] for name in metadata["weights"]})
    return lambda image, size: jax.device_get(program(weights, image, size))


def write_onnx(
    path: Path, program: Program, weights: Arrays, inputs: Mapping[str, Any], run: Model
) -> None:
    """An ONNX model; what is no tensor is JSON in its metadata, under `knet_jax`."""
    from knet_jax.export import onnx_model

    def properties(outputs: Mapping[str, Any]) -> dict[str, str]:
        return {"knet_jax": json.dumps(describe(run, inputs, outputs))}

    model = onnx_model.convert(program, weights, inputs, properties)
    path.write_bytes(model.SerializeToString())


def open_onnx(path: Path) -> Program:
    """The model of a file in onnxruntime: (image, size) -> results by name."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda image, size: dict(zip(names, session.run(None, {"image": image, "size": size})))


class Format(NamedTuple):
    """One kind of file."""

    suffix: str
    write: Callable[..., None]
    open: Callable[[Path], Program]
    dtype: str | None
    """Of the feature maps; None is that of the config."""
    packages: str
    """What it needs besides this project's own dependencies."""


FORMATS = {
    "stablehlo": Format(".stablehlo.npz", write_stablehlo, open_stablehlo, None, ""),
    # Runtimes have no convolution in bfloat16 on CPUs.
    "onnx": Format(".onnx", write_onnx, open_onnx, "float32", "onnx onnxruntime"),
}


def check_packages(name: str) -> None:
    """Raises UserError where a format needs packages that are not installed."""
    import importlib.util

    packages = FORMATS[name].packages.split()
    if not all(map(importlib.util.find_spec, packages)):
        raise UserError(f"--format={name} needs more packages: pip install {' '.join(packages)}")


# Whether the file does what the network does.


def draw_picture(size: tuple[int, int]) -> np.ndarray:
    """Patches of random colors that run into each other. uint8 [H, W, 3]."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (9, 9, 3)).astype(np.uint8)
    return cv2.resize(coarse, size[::-1], interpolation=cv2.INTER_CUBIC)


def expected(run: Model, image: np.ndarray) -> Results:
    """What this project makes of a picture in one pass, by the names that files use."""
    config = run.config.to_dict()
    config["eval"] = {key: value for key, value in config["eval"].items() if key not in PASSES}
    run = replace(run, config=ConfigDict(config))
    prediction = Segmenter(run)(image, threshold=0.0).prediction
    if isinstance(prediction, np.ndarray):
        return {"labels": prediction.astype(np.int32) - 1}
    parts = prediction.segments if isinstance(prediction, PanopticMap) else prediction
    results = {
        "labels": np.array([part.label for part in parts], np.int32),
        "scores": np.array([part.score for part in parts], np.float32),
    }
    if isinstance(prediction, PanopticMap):
        return results | {"ids": prediction.ids}
    return results | {"masks": np.array([rle.decode(part.rle) for part in parts], bool)}


def agreement(ours: Results, theirs: Results) -> float:
    """How far two results say the same about a picture, from 0 to 1.

    Every segment is compared with that of the other side which has its class and overlaps it most,
    whatever its rank: the mean of these overlaps (intersection over union), by area.
    """
    ours, theirs = find_masks(ours), find_masks(theirs)
    return min(mean_overlap(ours, theirs), mean_overlap(theirs, ours))


def find_masks(results: Results) -> tuple[np.ndarray, np.ndarray]:
    """Class [s] and pixels [s, H·W] of each segment, instance or class of a picture."""
    labels = results["labels"]
    if "masks" in results:
        masks = results["masks"]
    elif "ids" in results:
        masks = results["ids"] == np.arange(1, len(labels) + 1)[:, None, None]
    else:
        classes = np.unique(labels[labels != EMPTY])
        masks, labels = labels == classes[:, None, None], classes
    return labels, masks.reshape(len(labels), np.prod(masks.shape[1:])).astype(np.float32)


def mean_overlap(
    ours: tuple[np.ndarray, np.ndarray], theirs: tuple[np.ndarray, np.ndarray]
) -> float:
    """Of our masks with the best of theirs, by the area of ours; 1 where we have no pixel."""
    (labels, masks), (their_labels, their_masks) = ours, theirs
    areas, their_areas = masks.sum(1), their_masks.sum(1)
    if not areas.sum():
        return 1.0
    common = masks @ their_masks.T
    overlaps = common / np.maximum(areas[:, None] + their_areas - common, 1)
    overlaps = np.where(labels[:, None] == their_labels, overlaps, 0).max(1, initial=0)
    return float((overlaps * areas).sum() / areas.sum())


# The command.


def export(
    run: Model,
    path: Path,
    name: str = "stablehlo",
    size: tuple[int, int] | None = None,
    batch: int | None = None,
    image: np.ndarray | None = None,
) -> float:
    """Writes a model as one file, once the file has shown that it does what the model does.

    Args:
      run: from `open_run`, of the `dtype` of the format.
      path: of the file.
      name: of the format, see `FORMATS`.
      size: height and width of all pictures; None is any.
      batch: number of pictures; None is any.
      image: uint8 [H, W, 3], what to try the file on; None is a drawn picture.

    Returns:
      The agreement of the file with this project on the picture.

    Raises:
      ValueError: the model has a part that the format does not, or the file does something else.
    """
    if image is None:
        image = draw_picture(size or LANDSCAPE)
    if size is None:
        run = replace(run, config=of_two_canvases(run.config))
    draft = path.with_name(f"{path.name}.part")
    weights = {
        name: np.asarray(array) for name, array in flatten_dict(run.variables, sep="/").items()
    }
    program = make_program(run.config, run.model, make_views(run.config, size))
    inputs = input_shapes(size, batch)
    try:
        with tqdm(total=3, desc="translating", unit="step", leave=False, delay=1) as bar:
            FORMATS[name].write(draft, program, weights, inputs, run)
            bar.set_description("trying the file")
            bar.update()
            call = FORMATS[name].open(draft)
            count = batch or 1
            sizes = np.tile(np.int32(image.shape[:2]), (count, 1))
            results = call(np.repeat(image[None], count, 0), sizes)
            bar.set_description("trying the model")
            bar.update()
            share = agreement(expected(run, image), {k: v[-1] for k, v in results.items()})
        if share < LEAST_AGREEMENT:
            raise UserError(
                f"{path} is not written: its segments of a picture overlap those of the model by "
                f"{share:.1%}; accepted: at least {LEAST_AGREEMENT:.0%}"
            )
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    return share


class Exported(NamedTuple):
    """What `export_model` has written."""

    path: Path
    model: Model
    agreement: float
    """How far the file and the model agree about a picture, from 0 to 1."""


def export_model(
    source: str | os.PathLike,
    output: str | os.PathLike | None = None,
    format: str = "stablehlo",
    *,
    size: tuple[int, int] | None = None,
    batch: int | None = None,
    image: np.ndarray | None = None,
    checkpoint: str | int = "best",
    ema: bool = False,
    overrides: Sequence[str] = (),
) -> Exported:
    """Writes a trained model as one file that runs without this project, see `export`.

    Args:
      source: folder or file of a model, as for `open_model`.
      output: the file; default: `model.stablehlo.npz` or `model.onnx` in the folder of the model.
      format: `stablehlo` or `onnx`.
      size: height and width of all pictures; None is any.
      batch: number of pictures; None is any.
      image: uint8 [H, W, 3], what to try the file on; default: one is drawn.
      checkpoint: `best`, `latest`, or the number of a step.
      ema: take the moving average of the parameters.
      overrides: `--config.x.y=value` arguments.

    Raises:
      UserError: there is no such model, or it cannot be written as asked for.
    """
    check_packages(format)
    if size and image is not None and image.shape[:2] != size:
        raise UserError(
            f"--image is {image.shape[0]},{image.shape[1]}, which --size={size[0]},{size[1]} "
            "does not take"
        )
    form, source = FORMATS[format], Path(source)
    beside = (
        source.with_suffix(form.suffix)
        if is_weight_file(source)
        else source / f"model{form.suffix}"
    )
    path = Path(output or beside)
    if path.is_dir():
        raise UserError(f"--output={path} is a folder; accepted: a file {form.suffix}")
    if not source.exists():
        raise UserError(f"{source} is no model: there is no such folder or file")
    check_writable(path.parent)
    model = open_model(source, checkpoint, ema, overrides, form.dtype)
    return Exported(path, model, export(model, path, format, size, batch, image))


def parse_size(text: str) -> tuple[int, int]:
    """`480,640` -> (480, 640). Raises UserError where a text is something else."""
    sides = text.split(",")
    if len(sides) != 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise UserError(f"--size={text}; accepted: height and width, such as 480,640")
    return int(sides[0]), int(sides[1])
