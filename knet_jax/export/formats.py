"""The kinds of files that a model is exported to: how each is written, and how it is opened again."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import knet_jax
from knet_jax.export.program import Program
from knet_jax.saved.models import Model
from knet_jax.system.errors import UserError

PLATFORMS = ("cpu", "cuda")
"""What a StableHLO file runs on."""

Arrays = Mapping[str, np.ndarray]


def describe(model: Model, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata of a file: what its user has to know, as values that JSON takes."""

    def shapes(arrays: Mapping[str, Any]) -> dict[str, Any]:
        return {
            name: {
                "dtype": np.dtype(array.dtype).name,
                "shape": [side if isinstance(side, int) else str(side) for side in array.shape],
            }
            for name, array in arrays.items()
        }

    names, ids, num_things = model.categories
    return {
        "made_by": f"knet_jax {knet_jax.__version__}",
        "task": model.config.task,
        "step": model.step,
        "categories": [
            {"name": name, "dataset_id": int(id), "is_thing": i < num_things}
            for i, (name, id) in enumerate(zip(names, ids))
        ],
        "inputs": shapes(inputs),
        "outputs": shapes(outputs),
        "config": model.config.to_dict(),
    }


def write_stablehlo(
    path: Path, program: Program, weights: Arrays, inputs: Mapping[str, Any], model: Model
) -> None:
    """Writes an npz: the weights by name, `program` as `jax.export` serializes it, and `metadata`."""
    shapes = {name: jax.ShapeDtypeStruct(w.shape, w.dtype) for name, w in weights.items()}
    exported = jax.export.export(jax.jit(program), platforms=PLATFORMS)(shapes, *inputs.values())
    outputs = jax.tree.unflatten(exported.out_tree, exported.out_avals)
    metadata = describe(model, inputs, outputs) | {"weights": list(weights)}
    parts = {"program": bytes(exported.serialize()), "metadata": json.dumps(metadata).encode()}
    with path.open("wb") as file:
        np.savez(file, **{k: np.frombuffer(v, np.uint8) for k, v in parts.items()}, **weights)


def open_stablehlo(path: Path) -> Program:
    """The program of a file, bound to its weights: (image, size) -> arrays by name."""
    file = np.load(path)
    metadata = json.loads(file["metadata"].tobytes())
    program = jax.jit(jax.export.deserialize(bytearray(file["program"])).call)
    weights = jax.device_put({name: file[name] for name in metadata["weights"]})
    return lambda image, size: jax.device_get(program(weights, image, size))


def write_onnx(
    path: Path, program: Program, weights: Arrays, inputs: Mapping[str, Any], model: Model
) -> None:
    """Writes an ONNX model, whose property `knet_jax` holds the metadata as JSON."""
    from knet_jax.export import onnx_model  # needs an optional package

    def properties(outputs: Mapping[str, Any]) -> dict[str, str]:
        return {"knet_jax": json.dumps(describe(model, inputs, outputs))}

    proto = onnx_model.convert(program, weights, inputs, properties)
    path.write_bytes(proto.SerializeToString())


def open_onnx(path: Path) -> Program:
    """The model of a file in onnxruntime: (image, size) -> arrays by name."""
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
    """Type of the feature maps; None is that of the config."""
    packages: tuple[str, ...]
    """What it needs besides the dependencies of this project."""


FORMATS = {
    "stablehlo": Format(".stablehlo.npz", write_stablehlo, open_stablehlo, None, ()),
    # Runtimes have no convolution in bfloat16 on CPUs.
    "onnx": Format(".onnx", write_onnx, open_onnx, "float32", ("onnx", "onnxruntime")),
}


def find_format(name: str) -> Format:
    """A format by its name.

    Raises:
        UserError: there is none of that name, or packages that it needs are not installed.
    """
    if name not in FORMATS:
        raise UserError(f"format is {name!r}; accepted: {', '.join(FORMATS)}")
    packages = FORMATS[name].packages
    if not all(map(importlib.util.find_spec, packages)):
        raise UserError(f"the format {name} needs more packages: pip install {' '.join(packages)}")
    return FORMATS[name]
