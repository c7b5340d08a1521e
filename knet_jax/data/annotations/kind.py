"""What the annotations of every task can do: be stored, counted, learned from, and evaluated with."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from knet_jax.data.recipes import Crop, WholePicture
from knet_jax.data.transforms import View
from knet_jax.segmentation.segments import Categories


class Record(NamedTuple):
    """A picture with its annotation, as it is stored."""

    image: bytes
    """The encoded picture."""
    image_id: int
    """The id that the dataset's own files use, or a position where they use none."""
    file_name: str
    """As the dataset's own files call it; may contain subfolders."""
    size: tuple[int, int]
    """Height and width."""
    annotation: Any
    """A `PanopticAnnotation`, a list of `StoredInstance`, or the bytes of a PNG of 1 + class, by task."""


class Kind(abc.ABC):
    """The annotations of a task in a dataset of some classes.

    Three forms of an annotation occur: as a dataset's files hold it (`Record.annotation`), as TFDS
    stores it (`features`), and decoded (what `load` returns).
    """

    def __init__(self, categories: Categories):
        self.categories = categories

    @staticmethod
    @abc.abstractmethod
    def features() -> dict[str, Any]:
        """The TFDS features that hold an annotation."""

    @abc.abstractmethod
    def encode(self, annotation: Any) -> dict[str, Any]:
        """Values for `features`."""

    @abc.abstractmethod
    def decode(self, stored: Mapping[str, Any]) -> Any:
        """The annotation, from stored features; PNG files are left encoded."""

    @abc.abstractmethod
    def tally(self, record: Record) -> tuple[int, dict[str, np.ndarray]]:
        """Counts what a picture shows.

        Returns:
            the number of things, crowds left out, and named counts, each int [number of classes].
        """

    @abc.abstractmethod
    def describe(
        self, counts: Mapping[str, Sequence[int]], num_pixels: int
    ) -> tuple[str, Sequence[str]]:
        """A summary of a split's counts in one line, and a text for each class.

        Args:
            counts: the sums of those of `tally`.
            num_pixels: of all pictures together.
        """

    @abc.abstractmethod
    def load(self, record: Record) -> Any:
        """Decodes an annotation. Raises UserError where it is damaged."""

    @abc.abstractmethod
    def train_view(
        self, recipe: WholePicture | Crop, loaded: Any, rng: np.random.Generator
    ) -> View:
        """Draws at random which part of a picture training sees."""

    @abc.abstractmethod
    def empty(self, recipe: WholePicture | Crop, group: int, count: int) -> Any:
        """Training targets for `count` pictures of a group, in which nothing is annotated."""

    @abc.abstractmethod
    def fill(self, targets: Any, place: int, loaded: Any, view: View) -> None:
        """Writes what a view shows of an annotation into row `place` of the targets."""

    @abc.abstractmethod
    def truth(self, loaded: Any) -> Any:
        """The annotation at the picture's original size, as the task's metric takes it."""
