"""Predicting a split and scoring it, picture by picture, in constant memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from itertools import islice
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict
from tqdm import tqdm

from knet_jax.data import pipeline
from knet_jax.data.splits import Split
from knet_jax.fusion import Fused, fuse
from knet_jax.knet import KNet, normalize
from knet_jax.metrics import panoptic
from knet_jax.preemption import StopRequest
from knet_jax.resampling import Canvas
from knet_jax.structs import EMPTY, Batch, PanopticMap, SegmentInfo
from knet_jax.training import replicate
from knet_jax.visualize import Row, panel


def last_stage(variables: Any, batch: Batch, *, model: KNet) -> tuple[jax.Array, jax.Array]:
    """Mask and class logits of one device's images after the last update."""
    image = normalize(batch.image, batch.size, model.backbone.dtype)
    last = model.apply(variables, image).stages[-1]
    return last.masks, last.logits


def panoptic_map(fused: Fused, i: int, original_size: np.ndarray) -> PanopticMap:
    """The i-th map of a batch without its padding, on the host."""
    height, width = original_size
    labels = np.asarray(fused.labels[i])
    scores = np.asarray(fused.scores[i])
    infos = tuple(
        SegmentInfo(number + 1, int(label), score=float(score))
        for number, (label, score) in enumerate(zip(labels, scores))
        if label != EMPTY
    )
    return PanopticMap(np.asarray(fused.ids[i, :height, :width], np.int32), infos)


class Prediction(NamedTuple):
    """One picture of a split, its truth and what the network makes of it."""

    index: int
    truth: PanopticMap
    prediction: PanopticMap


class Evaluator:
    """Evaluates a split again and again, with whatever variables a run has reached.

    Args:
      model: the network.
      split: what to evaluate on.
      config: of the run.
      devices: that share a batch.
      limit: only the first so many pictures.

    Raises:
      ValueError: the devices do not divide `config.eval.batch_size`.
    """

    def __init__(
        self,
        model: KNet,
        split: Split,
        config: ConfigDict,
        devices: list[jax.Device],
        limit: int | None = None,
    ):
        self.split = split
        self._data = config.data
        self._batch_size = config.eval.batch_size
        self._devices = devices
        self._limit = limit
        on_devices = partial(jax.pmap, devices=devices)
        self._network = on_devices(partial(last_stage, model=model), in_axes=(None, 0))
        fuse_ = partial(
            fuse,
            num_things=model.initial.num_things,
            instance_threshold=config.eval.instance_threshold,
            overlap_threshold=config.eval.overlap_threshold,
        )
        # Pictures come in many sizes: only this small program is compiled for each canvas.
        self._fuse = cache(lambda canvas: on_devices(partial(fuse_, canvas=canvas)))

    def predictions(self, variables: Any) -> Iterator[Prediction]:
        """This process's pictures, one after the other."""
        variables = replicate(variables, self._devices)
        batches = pipeline.eval_batches(
            self.split,
            self._data,
            self._batch_size,
            limit=self._limit,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

        def start(batch: Batch) -> Fused:
            parts = split_over(batch, len(self._devices))
            canvas = Canvas.of(batch.size, batch.original_size)
            masks, logits = self._network(variables, parts)
            return self._fuse(canvas)(masks, logits, parts.size, parts.original_size)

        for batch, truths, fused in lookahead((b, t, start(b)) for b, t in batches):
            fused = jax.tree.map(lambda x: np.asarray(x).reshape(-1, *x.shape[2:]), fused)
            rows = {int(index): i for i, index in enumerate(batch.id)}
            for index, truth in truths:
                i = rows[index]
                yield Prediction(index, truth, panoptic_map(fused, i, batch.original_size[i]))

    def evaluate(
        self,
        variables: Any,
        visit: Callable[[Prediction], None] | None = None,
        stop: StopRequest | None = None,
    ) -> panoptic.PQCounts | None:
        """Scores all pictures of all processes, with a progress bar.

        Args:
          variables: parameters and running statistics.
          visit: called with every prediction of this process.
          stop: ends the evaluation, whose result is then None.
        """
        num_classes = len(self.split.categories.names)
        counts = panoptic.no_counts(num_classes)
        total = min(len(self.split), self._limit or len(self.split))
        with tqdm(total=total, desc="evaluating", unit="img", leave=False, delay=1) as bar:
            for prediction in self.predictions(variables):
                if stop:
                    return None
                one = panoptic.count(prediction.truth, prediction.prediction, num_classes)
                counts = panoptic.merge(counts, one)
                if visit:
                    visit(prediction)
                bar.update(jax.process_count())
        if jax.process_count() > 1:
            everywhere = multihost_utils.process_allgather(counts)
            counts = jax.tree.map(lambda x: np.asarray(x).sum(0), everywhere)
        return counts


class Gallery:
    """The first few predictions of an evaluation as pictures.

    Args:
      split: where they come from.
      size: how many.
    """

    def __init__(self, split: Split, size: int):
        self._split = split
        self._size = size
        self.rows: list[Row] = []

    def add(self, prediction: Prediction) -> None:
        """Keeps a prediction if there is room."""
        if len(self.rows) < self._size:
            image = self._split.image(prediction.index)
            title = self._split.file_name(prediction.index)
            self.rows.append(Row(title, image, prediction.truth, prediction.prediction))

    def panel(self) -> np.ndarray:
        """All of them one under another, image | truth | prediction. uint8 [H, W, 3]."""
        return panel(self.rows, self._split.categories)


def split_over(batch: Batch, num_devices: int) -> Batch:
    """A batch with a leading axis over devices."""
    return jax.tree.map(lambda x: x.reshape(num_devices, -1, *x.shape[1:]), batch)


def lookahead(items: Iterable[Any]) -> Iterator[Any]:
    """The same items, each given out after the next one has been drawn: what drawing one starts on
    the device or in a worker goes on while the one before it is used."""
    iterator = iter(items)
    drawn = list(islice(iterator, 1))
    for item in iterator:
        yield drawn.pop()
        drawn.append(item)
    yield from drawn
