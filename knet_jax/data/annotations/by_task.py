"""The kinds of annotation, one for each task: all that the data of the tasks differ in."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from knet_jax.data import recipes
from knet_jax.data.annotations import instance, panoptic, semantic
from knet_jax.data.transforms import View
from knet_jax.system.errors import UserError


class Kind(NamedTuple):
    """What is done with one kind of annotation."""

    recipe: Callable[..., Any]
    """config.data -> a recipe."""
    features: Callable[[], dict[str, Any]]
    """What TFDS stores of an annotation."""
    encoded: tuple[str, ...]
    """Which of the features are pictures."""
    encode: Callable[..., dict[str, Any]]
    """annotation -> the features."""
    decode: Callable[..., Any]
    """the features -> annotation."""
    tally: Callable[..., tuple[int, dict[str, Any]]]
    """annotation, size, categories -> number of things, and columns of numbers for the classes."""
    describe: Callable[..., tuple[str, Any]]
    """sums of such columns, number of pixels -> a headline, and a text for each class."""
    load: Callable[..., Any]
    """annotation, size, categories -> loaded: what the functions below read."""
    train_view: Callable[..., View]
    """recipe, loaded, size, random generator -> what training sees of a picture."""
    empty: Callable[..., Any]
    """recipe, categories, count, canvas -> targets of pictures that show nothing."""
    fill: Callable[..., None]
    """targets, place, loaded, view, canvas, categories: writes one picture into the targets."""
    truth: Callable[..., Any]
    """loaded, categories -> the annotation at original size, for evaluation."""


KINDS = {
    "panoptic": Kind(
        recipe=partial(recipes.read, recipes.WholePicture),
        features=panoptic.features,
        encoded=panoptic.ENCODED,
        encode=panoptic.encode,
        decode=panoptic.decode,
        tally=panoptic.tally,
        describe=panoptic.describe,
        load=panoptic.load,
        train_view=panoptic.train_view,
        empty=panoptic.empty,
        fill=panoptic.fill,
        truth=panoptic.truth,
    ),
    "instance": Kind(
        recipe=partial(recipes.read, recipes.WholePicture),
        features=instance.features,
        encoded=instance.ENCODED,
        encode=instance.encode,
        decode=instance.decode,
        tally=instance.tally,
        describe=panoptic.describe,
        load=instance.load,
        train_view=panoptic.train_view,
        empty=instance.empty,
        fill=instance.fill,
        truth=instance.truth,
    ),
    "semantic": Kind(
        recipe=partial(recipes.read, recipes.Crop),
        features=semantic.features,
        encoded=semantic.ENCODED,
        encode=semantic.encode,
        decode=semantic.decode,
        tally=semantic.tally,
        describe=semantic.describe,
        load=semantic.load,
        train_view=semantic.train_view,
        empty=semantic.empty,
        fill=semantic.fill,
        truth=semantic.truth,
    ),
}
"""By the name of the task, `config.task`."""


def find(task: str) -> Kind:
    """The kind of annotation that a task needs. Raises ValueError where there is no such task."""
    if task not in KINDS:
        raise UserError(f"config.task is {task!r}; accepted: {', '.join(KINDS)}")
    return KINDS[task]
