"""A few pictures from all over an evaluation."""

from __future__ import annotations

from itertools import chain

import numpy as np

from knet_jax.data.prepared_split import Split
from knet_jax.metrics.counts import Prediction
from knet_jax.segmentation.drawing import Compared
from knet_jax.system import processes


class Gallery:
    """Keeps `size` predictions from all over an evaluation of `num_images`, to draw them."""

    def __init__(self, split: Split, size: int, num_images: int):
        self._split = split
        self._wanted = set(np.linspace(0, num_images - 1, size).round().astype(int).tolist())
        self._kept: list[Prediction] = []

    def add(self, predictions: list[Prediction]) -> None:
        """Keeps those predictions whose pictures were chosen."""
        chosen = (one for one in predictions if one.index in self._wanted)
        self._kept += [one._replace(activity=None) for one in chosen]

    def kept(self) -> list[Prediction]:
        """What all processes, each of which must call this, have kept, in the order of the split."""
        kept = chain.from_iterable(processes.exchange(self._kept))
        return sorted(kept, key=lambda one: one.index)

    def rows(self) -> list[Compared]:
        """The same pictures with truth and prediction, to be drawn."""
        return [
            Compared(self._split.file_name(i), self._split.image(i), truth, prediction)
            for i, truth, prediction, *_ in self.kept()
        ]
