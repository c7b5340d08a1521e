"""Recipes: how a picture comes onto its canvas, in training and in evaluation.

Panoptic and instance segmentation show whole pictures (`WholePicture`), semantic segmentation
trains on crops (`Crop`). Both are the part of `config.data` that a worker needs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from knet_jax.data import photometric, transforms
from knet_jax.data.transforms import View
from knet_jax.system.errors import UserError

CROP_TRIES = 10
"""How many windows are looked at for one in which no class takes too much."""


class WholePicture(NamedTuple):
    """Pictures are resized to a short side and shown whole.

    In training there are two canvases, for landscape and for portrait pictures.
    """

    canvas: tuple[int, int]
    """Height and width of the landscape canvas."""
    short_side: tuple[int, int]
    long_side: int
    flip: float
    max_things: int
    num_workers: int
    max_broken_share: float
    min_things: int
    """How many things, crowds not counted, a picture must show to be trained on."""
    eval_multiple: int
    """Of the canvas's sides in evaluation; 0 is the canvas of training, whatever it pads."""

    @property
    def train_canvases(self) -> tuple[tuple[int, int], ...]:
        """Height and width of the canvas of each of the `groups`."""
        return self.canvas, self.canvas[::-1]

    def groups(self, split: Any) -> Sequence[np.ndarray]:
        """Which pictures may share a training batch: those of one orientation.

        Args:
            split: has int arrays `sizes` [n, 2] and `num_things` [n], as `prepared_split.Split`.

        Returns:
            positions in the split, int32, for each group; landscape pictures come first.

        Raises:
            UserError: no picture shows enough things.
        """
        shown = split.num_things >= self.min_things
        if not shown.any():
            raise UserError(
                f"config.data.min_things {self.min_things}: no picture of the training split "
                f"shows so many things, the most are {split.num_things.max()}"
            )
        landscape = split.sizes[:, 1] >= split.sizes[:, 0]
        groups = (shown & landscape, shown & ~landscape)
        return [np.flatnonzero(group).astype(np.int32) for group in groups]

    def train_view(self, size: tuple[int, int], rng: np.random.Generator) -> View:
        """Draws at random how a picture of a height and width is resized and flipped."""
        short_side = rng.integers(*self.short_side, endpoint=True)
        resized = transforms.resized_size(size, short_side, self.long_side)
        return transforms.whole(resized, bool(rng.random() < self.flip))

    @property
    def eval_sides(self) -> tuple[int, int]:
        """What the short and the long side of a picture become at most in evaluation."""
        return self.short_side[1], self.long_side

    def eval_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of a picture in evaluation."""
        return transforms.resized_size(size, *self.eval_sides)

    def eval_canvas(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the canvas of a picture in evaluation."""
        if not self.eval_multiple:
            return self.train_canvases[int(size[0] > size[1])]
        return _round_up(self.eval_size(size), self.eval_multiple)


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

    @property
    def train_canvases(self) -> tuple[tuple[int, int], ...]:
        """Height and width of the canvas of each of the `groups`."""
        return (self.crop,)

    def groups(self, split: Any) -> Sequence[np.ndarray]:
        """Which pictures may share a training batch: all of them, in one group."""
        return [np.arange(len(split.sizes), dtype=np.int32)]

    def train_view(self, label_map: np.ndarray, rng: np.random.Generator) -> View:
        """Draws at random how a picture is resized, cropped, flipped and distorted.

        Of several windows the first is taken in which no class has more than `max_class_share` of
        the pixels that are not ignored, else the last.

        Args:
            label_map: of the picture, [height, width]; 0 is ignored.
            rng: source of randomness.
        """
        resized = self.scaled(rng.uniform(*self.ratio)).eval_size(label_map.shape)
        shown = tuple(min(pair) for pair in zip(self.crop, resized))
        for _ in range(CROP_TRIES):
            corner = tuple(
                int(rng.integers(side - part, endpoint=True)) for side, part in zip(resized, shown)
            )
            view = View(resized, corner, shown)
            if largest_share(crop_map(label_map, view)) <= self.max_class_share:
                break
        flip = bool(rng.random() < self.flip)
        if self.photometric:
            view = view._replace(distortion=photometric.draw(rng))
        return view._replace(flip=flip)

    @property
    def eval_sides(self) -> tuple[int, int]:
        """What the short and the long side of a picture become at most in evaluation."""
        return min(self.scale), max(self.scale)

    def eval_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of a picture in evaluation."""
        return transforms.resized_size(size, *self.eval_sides)

    def eval_canvas(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the canvas of a picture in evaluation."""
        return _round_up(self.eval_size(size), self.eval_multiple)

    def scaled(self, ratio: float) -> Crop:
        """The recipe for pictures that are `ratio` times as large; the limits are whole pixels."""
        return self._replace(scale=tuple(max(1, int(side * ratio)) for side in self.scale))


RECIPES = {"panoptic": WholePicture, "instance": WholePicture, "semantic": Crop}
"""By the name of the task, `config.task`."""


def find(task: str, config_data: Mapping[str, Any]) -> WholePicture | Crop:
    """The recipe of a task, with the values of `config.data`, none of which is None any more."""
    recipe = RECIPES[task]
    return recipe(*(config_data[name] for name in recipe._fields))


def at_ratios(recipe: WholePicture | Crop, ratios: Sequence[float]) -> list[WholePicture | Crop]:
    """A recipe for each ratio, for pictures that are so many times as large.

    Ratios other than 1 need a `Crop`.
    """
    return [recipe.scaled(ratio) if ratio != 1 else recipe for ratio in ratios]


def crop_map(label_map: np.ndarray, view: View) -> np.ndarray:
    """What a view shows of a map [h, w], resized by centre-aligned nearest interpolation."""
    height, width = view.shown
    rows = view.rows(np.arange(height), label_map.shape[0])
    columns = view.columns(np.arange(width), label_map.shape[1])
    return label_map[rows].take(columns, axis=1)


def largest_share(label_map: np.ndarray) -> float:
    """The share of the most frequent class among the pixels that are not 0; 1 if all are."""
    counts = np.bincount(label_map.ravel(), minlength=2)[1:]
    return counts.max() / counts.sum() if counts.any() else 1.0


def _round_up(size: tuple[int, int], multiple: int) -> tuple[int, int]:
    return tuple(-(-side // multiple) * multiple for side in size)
