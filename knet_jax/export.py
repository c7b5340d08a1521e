"""Takes a model away as one file that runs without this project.

python -m knet_jax.export runs/demo
python -m knet_jax.export runs/demo --format onnx --output shapes.onnx
python -m knet_jax.export runs/mine --format onnx --size 480,640 --batch 1

The file holds the weights, the resizing of pictures of any size, the network, and the way from masks
to a panoptic map, instances or a label map at the picture's own size; names of classes and the config
lie beside them. docs/exporting.md shows how to run it.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from knet_jax import __version__
from knet_jax.data import kinds
from knet_jax.evaluation import run_network
from knet_jax.knet import KNet
from knet_jax.portable import View, show
from knet_jax.structs import Batch, Pass
from knet_jax.tasks import TASKS

LANDSCAPE, PORTRAIT = (3, 4), (4, 3)
"""Pictures whose canvases serve all pictures."""


def make_views(config: ConfigDict, size: tuple[int, int] | None = None) -> tuple[View, ...]:
    """How an exported network sees pictures of a height and width; by default those of any size,
    upright ones by the last view."""
    recipe = kinds.find(config.task).recipe(config.data)
    sizes = [size] if size else [LANDSCAPE, PORTRAIT]
    canvases = dict.fromkeys(recipe.eval_canvas(size) for size in sizes)
    return tuple(View(canvas, *recipe.eval_sides) for canvas in canvases)


def make_program(
    config: ConfigDict, model: KNet, views: Sequence[View]
) -> Callable[..., dict[str, jax.Array]]:
    """What is exported: (weights by name, images uint8 [b, H, W, 3], their sizes int32 [b, 2]) ->
    the results of the task, see `portable.py`."""
    task, options = TASKS[config.task], config.eval.to_dict()

    def through(view: View, variables: Any, image: jax.Array, size: jax.Array) -> Any:
        shown, shown_size = show(image, size, view)
        batch = Batch(shown, None, shown_size, size, None)
        stage = run_network(variables, batch, model=model)
        seen = Pass(stage, shown_size, jnp.zeros(image.shape[0], bool))
        return task.portable(
            seen,
            size,
            sizes=model.sizes,
            shape=image.shape[1:3],
            stride=view.canvas[0] // stage.masks.shape[2],
            options=options,
        )

    def program(weights: Mapping[str, jax.Array], image: jax.Array, size: jax.Array) -> Any:
        branches = [partial(through, view, unflatten_dict(weights, sep="/")) for view in views]
        if len(branches) == 1:
            return branches[0](image, size)
        height, width = (jnp.asarray(side) for side in image.shape[1:3])
        return jax.lax.cond(height > width, *reversed(branches), image, size)

    return program
