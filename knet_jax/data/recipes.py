"""Recipes: how a picture comes onto its canvas, in training and in evaluation.

Panoptic and instance segmentation show whole pictures (`WholePicture`), semantic segmentation
trains on crops (`Crop`). Both are the part of `config.data` that a worker needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from knet_jax.data import photometric, sampler, transforms
from knet_jax.data.transforms import View

STRIDE = 32
"""Sides of a canvas are multiples of the greatest stride of a backbone."""
CROP_TRIES = 10
"""How many windows are looked at for one in which no class takes too much."""


class WholePicture(NamedTuple):
    """Pictures are resized to a short side, on a canvas that only the orientation chooses."""

    canvas: tuple[int, int]
    """Height and width of the landscape canvas."""
    short_side: tuple[int, int]
    long_side: int
    flip: float
    max_things: int
    num_workers: int
    max_broken_share: float
    min_things: int = 0
    """How many things, crowds not counted, a picture must show to be trained on."""

    def groups(self, sizes: np.ndarray, num_things: np.ndarray) -> Sequence[np.ndarray]:
        """The positions of the pictures that may share a training batch, group by group.

        Raises:
            ValueError: no picture shows enough things.
        """
        shown = num_things >= self.min_things
        if not shown.any():
            raise ValueError(
                f"config.data.min_things {self.min_things}: no picture of the training split "
                f"shows so many things, the most are {num_things.max()}"
            )
        return [group[shown[group]] for group in sampler.orientation_groups(sizes)]

    def train_canvas(self, group: int) -> tuple[int, int]:
        """Height and width of the canvas of a group."""
        return self.canvas[::-1] if group == 1 else self.canvas

    def train_view(
        self, size: tuple[int, int], rng: np.random.Generator, label_map: np.ndarray | None = None
    ) -> View:
        """Draws what is seen of a picture of some height and width."""
        short_side = rng.integers(*self.short_side, endpoint=True)
        resized = transforms.resized_size(size, short_side, self.long_side)
        return transforms.whole(resized, bool(rng.random() < self.flip))

    def eval_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of a picture in evaluation, by the greatest short side."""
        return transforms.resized_size(size, self.short_side[1], self.long_side)

    def eval_canvas(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the canvas of a picture in evaluation."""
        return self.train_canvas(int(size[0] > size[1]))

    def scaled(self, ratio: float) -> WholePicture:
        """The recipe for pictures that are `ratio` times as large."""
        return self._replace(
            canvas=tuple(_round_up(ratio * side, STRIDE) for side in self.canvas),
            short_side=tuple(ratio * side for side in self.short_side),
            long_side=ratio * self.long_side,
        )


def whole_picture(config_data) -> WholePicture:
    """Checks what the loader needs of `config.data` to show whole pictures.

    Raises:
        ValueError: a value that cannot be meant.
    """
    recipe = _read(WholePicture, config_data)
    height, width = recipe.canvas
    low, high = recipe.short_side
    if height % STRIDE or width % STRIDE or not 0 < height <= width:
        raise ValueError(
            f"config.data.canvas {recipe.canvas} must be a landscape (height, width), "
            f"multiples of {STRIDE}"
        )
    if not 0 < low <= high:
        raise ValueError(f"config.data.short_side {recipe.short_side} must be (least, greatest)")
    if high > height or recipe.long_side > width:
        raise ValueError(
            f"config.data.short_side {recipe.short_side} and long_side {recipe.long_side} "
            f"do not fit into config.data.canvas {recipe.canvas}"
        )
    for name, least in (("max_things", 1), ("min_things", 0)):
        if getattr(recipe, name) < least:
            raise ValueError(f"config.data.{name} {getattr(recipe, name)} must be >= {least}")
    return recipe


class Crop(NamedTuple):
    """Pictures are resized by a random ratio and cropped; in evaluation they are shown whole."""

    scale: tuple[int, int]
    """The most that the long and the short side become at ratio 1."""
    ratio: tuple[float, float]
    crop: tuple[int, int]
    """Height and width of the window, which is the canvas in training."""
    max_class_share: float
    flip: float
    photometric: bool
    eval_multiple: int
    num_workers: int
    max_broken_share: float

    max_things = 0  # a map of labels has no slots that could be too few

    def groups(self, sizes: np.ndarray, num_things: np.ndarray) -> Sequence[np.ndarray]:
        """The positions of the pictures that may share a training batch: all of them."""
        del num_things
        return [np.arange(len(sizes))]

    def train_canvas(self, group: int) -> tuple[int, int]:
        """Height and width of the canvas of a group."""
        del group
        return self.crop

    def train_view(
        self, size: tuple[int, int], rng: np.random.Generator, label_map: np.ndarray
    ) -> View:
        """Draws what is seen of a picture.

        Of several windows the first is taken in which no class has more than `max_class_share` of
        the pixels that are not ignored, else the last.

        Args:
            size: height and width of the picture.
            rng: source of randomness.
            label_map: [height, width], 0 is ignored.
        """
        resized = self.scaled(rng.uniform(*self.ratio)).eval_size(size)
        shown = tuple(min(pair) for pair in zip(self.crop, resized))
        for _ in range(CROP_TRIES):
            corner = tuple(
                int(rng.integers(side - part, endpoint=True)) for side, part in zip(resized, shown)
            )
            view = View(resized, corner, shown)
            if largest_share(look(label_map, view)) <= self.max_class_share:
                break
        flip = bool(rng.random() < self.flip)
        if self.photometric:
            view = view._replace(distortion=photometric.draw(rng))
        return view._replace(flip=flip)

    def eval_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of a picture in evaluation."""
        return transforms.resized_size(size, min(self.scale), max(self.scale))

    def eval_canvas(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the canvas of a picture in evaluation."""
        return tuple(_round_up(side, self.eval_multiple) for side in self.eval_size(size))

    def scaled(self, ratio: float) -> Crop:
        """The recipe for pictures that are `ratio` times as large; the limits are whole pixels."""
        return self._replace(scale=tuple(max(1, int(side * ratio)) for side in self.scale))


def crop(config_data) -> Crop:
    """Checks what the loader needs of `config.data` to train on crops.

    Raises:
        ValueError: a value that cannot be meant.
    """
    recipe = _read(Crop, config_data)
    long, short = recipe.scale
    if not 0 < short <= long:
        raise ValueError(f"config.data.scale {recipe.scale} must be (long side, short side)")
    low, high = recipe.ratio
    if not 0 < low <= high:
        raise ValueError(f"config.data.ratio {recipe.ratio} must be (least, greatest)")
    if any(side < 1 or side % STRIDE for side in recipe.crop):
        raise ValueError(
            f"config.data.crop {recipe.crop} must be (height, width), multiples of {STRIDE}"
        )
    if not 0 < recipe.max_class_share <= 1:
        raise ValueError(
            f"config.data.max_class_share {recipe.max_class_share} must be above 0 and at most 1"
        )
    if recipe.photometric not in (False, True):
        raise ValueError(f"config.data.photometric {recipe.photometric} must be True or False")
    if recipe.eval_multiple < 1 or recipe.eval_multiple % STRIDE:
        raise ValueError(
            f"config.data.eval_multiple {recipe.eval_multiple} must be a multiple of {STRIDE}"
        )
    return recipe


def look(label_map: np.ndarray, view: View) -> np.ndarray:
    """What a view shows of a map [h, w], by centre-aligned nearest interpolation."""
    height, width = view.shown
    rows = view.rows(np.arange(height), label_map.shape[0])
    columns = view.columns(np.arange(width), label_map.shape[1])
    return label_map[rows].take(columns, axis=1)


def largest_share(label_map: np.ndarray) -> float:
    """The share of the most frequent class among the pixels that are not 0; 1 if all are."""
    counts = np.bincount(label_map.ravel(), minlength=2)[1:]
    return counts.max() / counts.sum() if counts.any() else 1.0


def _read(kind: type[Any], config_data) -> Any:
    """The fields of a recipe from `config.data`, those that all recipes share checked."""
    values = {name: config_data[name] for name in kind._fields if name in config_data}
    for name in kind._fields:
        if name not in values and name not in kind._field_defaults:
            raise ValueError(f"config.data.{name} is missing: the task needs it")
    lists = {name: tuple(v) for name, v in values.items() if isinstance(v, list | tuple)}
    recipe = kind(**values | lists)
    for name in ("flip", "max_broken_share"):
        if not 0 <= getattr(recipe, name) <= 1:
            raise ValueError(f"config.data.{name} {getattr(recipe, name)} must be in [0, 1]")
    if recipe.num_workers < 0:
        raise ValueError(f"config.data.num_workers {recipe.num_workers} must be >= 0")
    return recipe


def _round_up(length: float, multiple: int) -> int:
    return -int(-length // multiple) * multiple
