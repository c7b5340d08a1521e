"""Makes a model of a checkpoint of PyTorch, and a checkpoint in PyTorch's names of a model."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict
from safetensors import SafetensorError
from safetensors.numpy import save_file

from knet_jax.config.files import (
    CONVERSION_NAME,
    apply_overrides,
    complete_saved,
    load_config,
    save_config,
)
from knet_jax.config.validation import validate
from knet_jax.model import make_model, variable_shapes
from knet_jax.saved.checkpoints import Checkpoints, check_writable
from knet_jax.saved.class_names import find_categories
from knet_jax.saved.fitting import fill_missing, fit_network
from knet_jax.saved.models import open_model
from knet_jax.saved.parameter_names import Fit, Variables, to_reference
from knet_jax.saved.weight_files import (
    CLASSES_KEY,
    MODEL_KEY,
    About,
    WeightFile,
    read_weights,
)
from knet_jax.segmentation.segments import Categories
from knet_jax.system.backend import start_backend
from knet_jax.system.errors import UserError, naming_file
from knet_jax.system.output_files import drafted

# From a file to a model.


def import_weights(
    source: Path,
    spec: str | None,
    output: Path,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    *,
    entry: str = "",
    ema: bool = False,
    categories_file: Path | None = None,
    new_classes: bool = False,
    partial: bool = False,
) -> dict[str, Any]:
    """Makes a model of a file of weights.

    Args:
        source: the file, or the folder of another model.
        spec: the config, see `load_config`; default: that of the source, if it is a model.
        output: the folder to be made.
        overrides: what changes the config, see `load_config`.
        entry: which set of tensors, if a file holds several; of a model, the checkpoint.
        ema: of a model, take the moving average of the parameters.
        categories_file: a file that names the classes.
        new_classes: leave what belongs to the classes as initialized.
        partial: take what fits; the rest stays as initialized, or is left over.

    Returns:
        What became of every tensor and every array, in JSON: see `report_table`.

    Raises:
        UserError: the file, the config and the rest do not go together.
    """
    start_backend()
    config = load_config(spec, overrides) if spec else None
    here = output.is_dir() and output.samefile(".")  # which cannot be made
    if output.is_file() or here or (output.is_dir() and any(output.iterdir())):
        raise UserError(f"--output={output} is there already; accepted: a new folder")
    check_writable(output.parent)
    with naming_file(source):
        if source.is_dir():
            weights = _read_model(source, entry or "best", ema)
        else:
            weights = read_weights(source, entry)
        if not config and not weights.about:
            raise UserError("it has no config; give its --config, such as coco_panoptic")
        saved = None if config else complete_saved(weights.about.config)
    config = config or apply_overrides(saved, overrides)
    validate(config, parts=())
    template = variable_shapes(make_model(**config.model))
    with naming_file(source):
        found = fit_network(weights, template, config, new_classes, partial)
    listed = () if new_classes else weights.classes
    categories, origin = find_categories(config, listed, categories_file)
    report = {
        "source": source.name,
        "config": spec or "that of the model",
        **_describe(weights, found, template),
        "categories": categories._asdict(),
        "categories_from": origin,
    }
    _write_model(output, config, fill_missing(found, template, config), categories, report)
    return report


def _read_model(source: Path, checkpoint: str, ema: bool) -> WeightFile:
    """The weights of a model, as if they were from a file."""
    opened = open_model(source, checkpoint, ema)
    tensors = to_reference(opened.variables)
    step = f"step {opened.step}"
    original = {name: name for name in tensors}
    about = About(opened.config.to_dict(), opened.categories, opened.step)
    names = opened.categories.names
    return WeightFile(tensors, original, (), step, (step,), names, about)


def _write_model(
    output: Path,
    config: ConfigDict,
    variables: Variables,
    categories: Categories,
    report: Mapping[str, Any],
) -> None:
    """Writes a folder as training leaves one at its step 0, whole or not at all."""
    folder = output.with_name(f".{output.name}.part")
    shutil.rmtree(folder, ignore_errors=True)  # of a conversion that was killed
    folder.mkdir()
    try:
        save_config(config, folder)
        (folder / CONVERSION_NAME).write_text(json.dumps(report, indent=2) + "\n")
        with Checkpoints(folder / "checkpoints", model=config.model.to_dict()) as checkpoints:
            progress = {"examples_seen": 0, "categories": categories._asdict()}
            checkpoints.save(0, variables, progress)
        folder.rename(output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# The report.


def _describe(weights: WeightFile, found: Fit, template: Variables) -> dict[str, Any]:
    original = weights.original
    sizes = {key: math.prod(leaf.shape) for key, leaf in flatten_dict(template, sep="/").items()}
    anew = sorted(sizes.keys() - found.arrays.keys())
    return {
        "entry": weights.entry,
        "other_entries": [name for name in weights.entries if name != weights.entry],
        "used": sorted(original[name] for name in found.used),
        "renamed": {original[n]: n for n in sorted(found.used) if original[n] != n},
        "interpolated": [original[name] for name in found.resized],
        "rounded": sorted(key for key, x in found.arrays.items() if jnp.finfo(x.dtype).bits > 32),
        "surplus": list(weights.surplus),
        "left_over": [original[name] for name in weights.tensors if name not in found.used],
        "wrong_shape": {
            original[name]: {"given": list(given), "needed": list(needed)}
            for name, (given, needed) in found.misfits.items()
        },
        "missing": list(found.missing),
        "anew": anew,
        "numbers": sum(sizes.values()),
        "numbers_anew": sum(sizes[key] for key in anew),
    }


def report_table(report: Mapping[str, Any]) -> str:
    """The report of `import_weights` as a table of text, with a few names of each kind."""
    anew = ""
    if report["anew"]:
        share = f"{report['numbers_anew'] / 1e6:.1f} of {report['numbers'] / 1e6:.1f} M numbers"
        parts = dict.fromkeys("/".join(key.split("/")[1:-1][:2]) for key in report["anew"])
        anew = f"{share}: {_first(parts)}"
    kinds = Counter(name.rpartition(".")[2] for name in report["surplus"])
    rows = [
        ("tensors used", report["used"], f"of {report['source']}"),
        ("  under another name", report["renamed"], None),
        ("  interpolated", report["interpolated"], None),
        ("  rounded to float32", report["rounded"], None),
        ("tensors of no use", report["surplus"], _first(kind for kind, _ in kinds.most_common())),
        ("tensors left over", report["left_over"], None),
        ("  of another shape", report["wrong_shape"], None),
        ("arrays that start anew", report["anew"], anew),
    ]
    lines = [
        f"{title:24} {len(names):6}  {_first(names) if note is None else note}".rstrip()
        for title, names, note in rows
        if names or not title.startswith(" ")
    ]
    names, things = report["categories"]["names"], report["categories"]["num_things"]
    origin = report["categories_from"]
    hint = "; --categories gives them" if origin == "nowhere" else ""
    lines.append(
        f"{'classes':24} {len(names):6}  {things} things and {len(names) - things} stuff, "
        f"names from {origin}{hint}"
    )
    if report["other_entries"]:
        chosen = report["entry"] or "the top"
        others = ", ".join(name or "the top" for name in report["other_entries"])
        lines.append(f"taken from {chosen}; also there: {others}")
    return "\n".join(lines)


def _first(names: Iterable[str]) -> str:
    """The first three names."""
    names = list(names)
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


# From a model to a file.


def export_weights(source: Path, output: Path, checkpoint: str = "best", ema: bool = False) -> str:
    """Writes a model as one file, its weights under the reference's names.

    Args:
        source: the model, see `open_model`.
        output: the safetensors file to be made.
        checkpoint: `best`, `latest`, or the number of a step.
        ema: take the moving average of the parameters.

    Returns:
        What was written, in a sentence.

    Raises:
        UserError: there is no such model, or the output is no such file.
        OSError: the output cannot be written.
    """
    if output.suffix != ".safetensors" or output.is_dir():
        raise UserError(f"--output={output}; accepted: a new folder, or a file .safetensors")
    start_backend()
    check_writable(output.parent)
    opened = open_model(source, checkpoint, ema)
    tensors = {name: np.ascontiguousarray(x) for name, x in to_reference(opened.variables).items()}
    metadata = {
        "format": "pt",  # loaders of other libraries ask for it
        CLASSES_KEY: json.dumps(opened.categories.names),
        MODEL_KEY: json.dumps(
            {
                "config": opened.config.to_dict(),
                "categories": opened.categories._asdict(),
                "step": opened.step,
            }
        ),
    }
    with drafted(output) as draft:
        try:
            save_file(tensors, draft, metadata)
        except SafetensorError as error:
            code = re.search(r"os error (\d+)", str(error))
            if not code:
                raise
            raise OSError(int(code[1]), os.strerror(int(code[1]))) from error
    size = sum(x.nbytes for x in tensors.values()) / 2**20
    return f"wrote {len(tensors)} tensors of step {opened.step} ({size:.1f} MiB) to {output}"
