"""The program that an exported model is: from pictures of any size to named results.

It resizes the pictures, runs the network, and brings its masks to the pictures' own pixels. All of it
is one function of the weights and two inputs, which the formats of `formats.py` write down.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from ml_collections import ConfigDict

from knet_jax.data import recipes
from knet_jax.inference.any_size import Framing, resize_into_canvas
from knet_jax.inference.forward import run_rounds
from knet_jax.inference.multiscale import canvas_of
from knet_jax.knet import KNet
from knet_jax.structs import Batch, Pass
from knet_jax.tasks import TASKS

LANDSCAPE, PORTRAIT = (240, 320), (320, 240)
"""Height and width of the pictures that choose the canvases of a file for all sizes."""

Program = Callable[..., Any]
"""(image uint8 [b, H, W, 3], size int32 [b, 2]) -> results by name; before them comes, where it is
not yet bound, a mapping of weights by name."""


def with_training_canvases(config: ConfigDict) -> ConfigDict:
    """A copy of a config in which whole pictures are shown on the two canvases of training.

    Evaluation gives each picture a canvas of its own size, which a file for all sizes cannot.
    """
    config = config.copy_and_resolve_references()
    if "canvas" in config.data:
        config.data.eval_multiple = 0
    return config


def make_framings(config: ConfigDict, size: tuple[int, int] | None = None) -> tuple[Framing, ...]:
    """How an exported network sees pictures.

    Args:
        config: of the model; `with_training_canvases` where pictures have any size.
        size: height and width of all pictures; None is any.

    Returns:
        One framing, or one for pictures that are not upright and one for those that are.
    """
    recipe = recipes.find(config.task, config.data)
    sizes = [size] if size else [LANDSCAPE, PORTRAIT]
    canvases = dict.fromkeys(tuple(recipe.eval_canvas(size)) for size in sizes)
    return tuple(Framing(canvas, *recipe.eval_sides) for canvas in canvases)


def make_program(config: ConfigDict, network: KNet, framings: Sequence[Framing]) -> Program:
    """The function that is exported.

    Args:
        config: of the model.
        network: built from it.
        framings: from `make_framings`; of two, the second is taken where `image` is upright.

    Returns:
        A function (weights by name, image uint8 [b, H, W, 3], size int32 [b, 2]) -> the results of
        the task by name, as `inference/any_size.py` describes them. Picture i fills the upper left
        `size[i]` pixels of `image[i]`.
    """
    task = TASKS[config.task]
    options = task.choose_options(network.sizes, config.eval)

    def see(framing: Framing, variables: Any, image: jax.Array, size: jax.Array) -> Any:
        shown, shown_size = resize_into_canvas(image, size, framing)
        batch = Batch(shown, None, shown_size, size, None)
        [stage] = run_rounds(variables, batch, model=network)
        return task.predict_any_size(
            Pass(stage, shown_size, canvas_of(batch), jnp.zeros(image.shape[0], bool)),
            size,
            shape=image.shape[1:3],
            **options,
        )

    def program(weights: Mapping[str, jax.Array], image: jax.Array, size: jax.Array) -> Any:
        with jax.default_matmul_precision(config.precision):
            variables = unflatten_dict(weights, sep="/")
            branches = [partial(see, framing, variables) for framing in framings]
            if len(branches) == 1:
                return branches[0](image, size)
            height, width = (jnp.asarray(side) for side in image.shape[1:3])
            return jax.lax.cond(height > width, *reversed(branches), image, size)

    return program


def input_shapes(
    size: tuple[int, int] | None = None, batch: int | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of the inputs of a program by name; what is not given is a symbol: b, H, W."""
    spec = (batch or "b", *(size or ("H", "W")), 3)
    shape = jax.export.symbolic_shape(", ".join(map(str, spec)))
    return {
        "image": jax.ShapeDtypeStruct(shape, np.uint8),
        "size": jax.ShapeDtypeStruct((shape[0], 2), np.int32),
    }
