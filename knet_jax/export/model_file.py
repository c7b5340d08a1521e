"""A trained model as one file, which is tried before it is written."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict
from tqdm import tqdm

from knet_jax.export import program
from knet_jax.export.agreement import agreement, draw_picture, segment
from knet_jax.export.formats import find_format
from knet_jax.saved.checkpoints import check_writable
from knet_jax.saved.models import Model, open_model
from knet_jax.system.errors import UserError
from knet_jax.system.output_files import drafted

LEAST_AGREEMENT = 0.98
"""The least agreement of a file with the model that it was made of. Pixels where two segments are
equally likely, and what follows from them, may go either way."""


class Exported(NamedTuple):
    """A file that was written."""

    path: Path
    model: Model
    """What it was made of."""
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
    """Writes a trained model as one file that runs without this project.

    The file is tried on a picture first, and written only if it finds there what the model finds.

    Args:
        source: folder or file of a model, as for `open_model`.
        output: the file; default: `model.stablehlo.npz` or `model.onnx` in the folder of the model,
            or a file of the same name beside that of the model.
        format: `stablehlo` or `onnx`.
        size: height and width of all pictures that the file will be given; None is any.
        batch: how many pictures it will be given at a time; None is any.
        image: uint8 [H, W, 3], the picture to try the file on; default: one is drawn.
        checkpoint: `best`, `latest`, or the number of a step.
        ema: take the moving average of the parameters.
        overrides: `--config.x.y=value` arguments that change the config.

    Raises:
        UserError: there is no such model or format, the file cannot be written there, the picture
            is not of the size, the model has a part that the format does not, or the file finds
            something else than the model.
    """
    form = find_format(format)
    if size and image is not None and image.shape[:2] != size:
        raise UserError(f"the picture to try is {image.shape[:2]}, the file takes {size} only")
    source = Path(source)
    if output and Path(output).is_dir():
        raise UserError(f"output is {output}, a folder; accepted: a file {form.suffix}")
    if not source.exists():
        raise UserError(f"{source} is no model: there is no such folder or file")
    beside = source / f"model{form.suffix}" if source.is_dir() else source.with_suffix(form.suffix)
    path = Path(output or beside)
    check_writable(path.parent)
    model = open_model(source, checkpoint, ema, overrides, form.dtype)
    if size is None:
        model = replace(model, config=program.with_training_canvases(model.config))
    if image is None:
        image = draw_picture(size or program.LANDSCAPE)
    variables = flatten_dict(model.variables, sep="/")
    weights = {name: np.asarray(array) for name, array in variables.items()}
    framings = program.make_framings(model.config, size)
    function = program.make_program(model.config, model.network, framings)
    bar = tqdm(total=3, desc="translating", unit="step", leave=False, delay=1)
    with drafted(path) as draft, bar:
        form.write(draft, function, weights, program.input_shapes(size, batch), model)
        bar.set_description("trying the file")
        bar.update()
        count = batch or 1
        sizes = np.tile(np.int32(image.shape[:2]), (count, 1))
        results = form.open(draft)(np.repeat(image[None], count, 0), sizes)
        bar.set_description("trying the model")
        bar.update()
        share = agreement(segment(model, image), {k: v[-1] for k, v in results.items()})
        if share < LEAST_AGREEMENT:
            raise UserError(
                f"{path} is not written: its segments of a picture overlap those of the model by "
                f"{share:.1%}; accepted: at least {LEAST_AGREEMENT:.0%}"
            )
    return Exported(path, model, share)
