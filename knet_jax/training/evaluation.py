"""Scoring a network on a split, picture by picture, in constant memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
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
from knet_jax.saved.checkpoints import check_writable
from knet_jax.saved.models import Model, open_model
from knet_jax.segmentation.class_lists import check_class_counts, check_trained_classes
from knet_jax.segmentation.drawing import Row, panel, save_picture
from knet_jax.structs import Batch, Pass
from knet_jax.system.backend import start_backend
from knet_jax.system.errors import UserError
from knet_jax.system.output_files import Stems, write_whole
from knet_jax.system.signals import StopRequest
from knet_jax.tasks import TASKS
from knet_jax.training.train_step import replicate


class Prediction(NamedTuple):
    """One picture of a split: its position, its truth and the result of the network.

    Both are a `PanopticMap`, a tuple of `Instance`, or a map of labels, as the task has it.
    """

    index: int
    truth: Any
    prediction: Any


class Evaluator:
    """Evaluates a split again and again, with whatever variables a run has reached.

    Args:
        model: the network.
        split: what to evaluate on.
        config: of the run; its `task`, `data` and `eval` are read.
        devices: that share a batch, whose size they divide.
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
        """The results of this process's pictures, one after the other."""
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
            Counts, which the metric of the task turns into scores; None where it was stopped.
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
    """Keeps a few predictions from all over an evaluation, to draw them.

    Args:
        split: that is evaluated.
        size: how many are kept.
        num_images: how many are evaluated.
    """

    def __init__(self, split: Split, size: int, num_images: int):
        self._split = split
        self._wanted = set(np.linspace(0, num_images - 1, size).round().astype(int).tolist())
        self.rows: list[Row] = []

    def add(self, prediction: Prediction) -> None:
        """Keeps a prediction if it is one of those."""
        if prediction.index in self._wanted:
            image = self._split.image(prediction.index)
            title = self._split.file_name(prediction.index)
            self.rows.append(Row(title, image, prediction.truth, prediction.prediction))

    def panel(self) -> np.ndarray:
        """Draws them one under another, image | truth | prediction, as uint8 [H, W, 3]."""
        return panel(self.rows, self._split.categories)


def split_over(batch: Any, num_devices: int) -> Any:
    """Gives the arrays of a batch a leading axis over devices."""
    return jax.tree.map(lambda x: x.reshape(num_devices, -1, *x.shape[1:]), batch)


def evaluate(
    model: str | Path | Model,
    *,
    checkpoint: str | int = "best",
    ema: bool = False,
    limit: int | None = None,
    output: str | Path | None = None,
    results: bool = False,
    rounds: bool = False,
    boundary: bool = False,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Scores a model on the validation split of its config, and prints tables of it.

    Writes metrics.json and pictures/ (image | truth | prediction) to the output.

    Args:
        model: the folder of a run or of a conversion, a file of weights, or what `open_model` gave.
        checkpoint: of a folder: `best`, `latest`, or the number of a step.
        ema: of a folder: the moving average of the parameters instead of the parameters.
        limit: evaluate only the first so many pictures.
        output: a folder, created if need be; default: that of the model.
        results: also write the results in files, as the test servers of COCO and ADE20K take them.
        rounds: also evaluate the masks after every earlier update.
        boundary: also boundary AP, for the task instance.
        overrides: `--config.x.y=value` arguments, where the model is not yet opened.

    Returns:
        What metrics.json holds: PQ, AP or mIoU and their like in percent, `step`, `ema`, `split`,
        `num_images`, `num_broken`, `per_class`, and `rounds` and `boundary` if asked for.

    Raises:
        UserError: there is no such model or checkpoint, or it does not fit the data or the output.
    """
    start_backend()
    if output is None and isinstance(model, Model):
        raise UserError("output is missing: an opened model does not say where results go")
    output = Path(output or model)
    if output.is_file():
        raise UserError(f"--output={output} is a file; accepted: a folder for the results")
    if not isinstance(model, Model):
        model = open_model(model, checkpoint, ema, overrides, num_devices=jax.device_count())
    check_writable(output)
    config, devices = model.config, jax.local_devices()
    task = TASKS[config.task]
    metric = task.metric
    if boundary and not hasattr(metric, "boundary_iou"):
        raise UserError(f"--boundary: config.task is {config.task!r}; accepted: instance")
    split = pipeline.load_split(config.data, config.data.val_split, config.task)
    categories = split.categories
    check_class_counts(config, categories)
    check_trained_classes(model.categories._asdict(), categories)
    num_images = min(len(split), limit or len(split))
    print(
        f"evaluating step {model.step} on {num_images} images, "
        f"{len(devices)} x {devices[0].device_kind}"
    )

    gallery = Gallery(split, config.eval.num_pictures, num_images)
    num_classes, num_scored = len(categories.names), 0
    boundaries = [metric.no_counts(num_classes)]
    files = task.results(output / f"{config.task}.json", categories) if results else None

    def visit(prediction: Prediction) -> None:
        nonlocal num_scored
        num_scored += 1
        gallery.add(prediction)
        index, truth, result = prediction
        if files:
            files.add(split.image_id(index), split.file_name(index), result)
        if boundary:
            image_id, overlap = split.image_id(index), metric.boundary_iou
            boundaries.append(metric.count(truth, result, num_classes, image_id, overlap))

    def counts_after(stage: int, visit: Callable[[Prediction], None] | None = None) -> Any:
        evaluator = Evaluator(model.model, split, config, devices, limit, stage)
        with jax.default_matmul_precision(config.precision):
            return evaluator.evaluate(model.variables, visit)

    def summarize(counts: Any) -> dict[str, float | None]:
        scores = metric.summarize(counts, categories)
        return {name: None if np.isnan(score) else score for name, score in scores.items()}

    counts = counts_after(-1, visit)
    if num_scored < num_images:
        num_broken = num_images - num_scored
        print(f"WARNING: {num_broken} of {num_images} images are broken and left out")
    print(metric.table(counts, categories))
    scores = summarize(counts)
    metrics = scores | {
        "step": model.step,
        "ema": ema,
        "split": config.data.val_split,
        "num_images": num_scored,
        "num_broken": num_images - num_scored,
        "per_class": metric.per_class(counts, categories),
    }
    if boundary:
        merged = metric.merge(*boundaries)
        print(f"\nBoundaries\n{metric.table(merged, categories)}")
        metrics["boundary"] = summarize(merged)
    if rounds:
        earlier = [summarize(counts_after(stage)) for stage in range(config.model.num_stages)]
        metrics["rounds"] = [{"updates": i} | row for i, row in enumerate([*earlier, scores])]
        print(f"\n{'updates':>7} " + " ".join(f"{name:>10}" for name in metric.HEADLINE))
        for row in metrics["rounds"]:
            columns = " ".join(f"{row[name]:10.1f}" for name in metric.HEADLINE)
            print(f"{row['updates']:7} {columns}")

    write_whole(output / "metrics.json", (json.dumps(metrics, indent=2) + "\n").encode())
    stems = Stems()
    for row in gallery.rows:
        path = output / "pictures" / f"{stems.of(row.title)}.png"
        save_picture(path, panel([row], categories))
    if files:
        files.close()
    print(f"wrote {output / 'metrics.json'} and {output / 'pictures'}/")
    return metrics
