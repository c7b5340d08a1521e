"""Predicting a split and scoring it, picture by picture, in constant memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from knet_jax.data import pipeline
from knet_jax.data.prepared_split import Split
from knet_jax.inference.forward import lookahead, run_windows
from knet_jax.inference.multiscale import both_ways, canvas_of
from knet_jax.inference.resampling import Canvas
from knet_jax.knet import KNet
from knet_jax.metrics.counts import gather
from knet_jax.segmentation.drawing import Row, panel
from knet_jax.structs import Batch, Pass
from knet_jax.system.signals import StopRequest
from knet_jax.tasks import TASKS
from knet_jax.training.train_step import replicate


class Prediction(NamedTuple):
    """One picture of a split, its truth and what the network makes of it."""

    index: int
    truth: Any
    prediction: Any
    """Both as `Task.read` gives them."""


class Evaluator:
    """Evaluates a split again and again, with whatever variables a run has reached.

    Args:
      model: the network.
      split: what to evaluate on.
      config: of the run.
      devices: that share a batch; `validate` makes sure that their number divides it.
      limit: only the first so many pictures.
      stage: after how many updates the masks are taken; -1 is the last.
    """

    def __init__(
        self,
        model: KNet,
        split: Split,
        config: ConfigDict,
        devices: list[jax.Device],
        limit: int | None = None,
        stage: int = -1,
    ):
        self.split = split
        self.task = TASKS[config.task]
        self._data = config.data
        self._batch_size = config.eval.batch_size
        self._devices = devices
        self._limit = limit
        on_devices = partial(jax.pmap, devices=devices)
        options = config.eval
        self._scales = options.get("scales", (1.0,))
        self._flip = options.get("flip", False)
        window, step = (options.get(key, ()) for key in ("window", "window_step"))
        look_ = partial(run_windows, model=model, stage=stage, window=window, step=step)
        self._look = on_devices(look_, in_axes=(None, 0))
        # Pictures come in many sizes: only this small program is compiled for each canvas.
        predict = partial(self.task.predict, **self.task.choose_options(model.sizes, options))
        self._predict = cache(lambda canvas: on_devices(partial(predict, canvas=canvas)))

    def predictions(self, variables: Any) -> Iterator[Prediction]:
        """This process's pictures, one after the other."""
        variables = replicate(variables, self._devices)
        elements = pipeline.eval_batches(
            self.split,
            self._data,
            self._batch_size,
            limit=self._limit,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            ratios=self._scales,
        )

        def start(scales: Sequence[Batch]) -> Any:
            split = partial(split_over, num_devices=len(self._devices))
            seen = []
            for batch, mirrored in both_ways(scales, self._flip):
                stage = self._look(variables, split(batch))
                seen.append(Pass(stage, *split((batch.size, canvas_of(batch), mirrored))))
            canvas = Canvas.of(np.max([batch.size for batch in scales], 0), batch.original_size)
            return self._predict(canvas)(tuple(seen), split(batch.original_size))

        for batch, truths, result in lookahead((b[0], t, start(b)) for b, t in elements):
            result = jax.tree.map(lambda x: np.asarray(x).reshape(-1, *x.shape[2:]), result)
            rows = {int(index): i for i, index in enumerate(batch.id)}
            for index, truth in truths:
                i = rows[index]
                prediction = self.task.read(
                    jax.tree.map(lambda x, i=i: x[i], result), batch.original_size[i]
                )
                yield Prediction(index, truth, prediction)

    def evaluate(
        self,
        variables: Any,
        visit: Callable[[Prediction], None] | None = None,
        stop: StopRequest | None = None,
    ) -> Any | None:
        """Scores all pictures of all processes, with a progress bar.

        Args:
          variables: parameters and running statistics.
          visit: called with every prediction of this process.
          stop: ends the evaluation, whose result is then None.

        Returns:
          counts, as the metric of the task understands them.
        """
        metric, num_classes = self.task.metric, len(self.split.categories.names)
        counts = [metric.no_counts(num_classes)]  # merged at the end: that is much faster
        total = min(len(self.split), self._limit or len(self.split))
        with tqdm(total=total, desc="evaluating", unit="img", leave=False, delay=1) as bar:
            for prediction in self.predictions(variables):
                if stop:
                    return None
                truth, image_id = prediction.truth, self.split.image_id(prediction.index)
                counts.append(metric.count(truth, prediction.prediction, num_classes, image_id))
                if visit:
                    visit(prediction)
                bar.update(jax.process_count())
        return gather(metric.merge(*counts), metric.merge)


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


def split_over(batch: Any, num_devices: int) -> Any:
    """A batch, or some of its arrays, with a leading axis over devices."""
    return jax.tree.map(lambda x: x.reshape(num_devices, -1, *x.shape[1:]), batch)
