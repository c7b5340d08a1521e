"""Scoring a network on a split, picture by picture, in constant memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from itertools import chain
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
from knet_jax.inference.resampling import ResultCanvas
from knet_jax.inference.windows import Windows
from knet_jax.knet import KNet
from knet_jax.metrics.counts import collect
from knet_jax.saved.checkpoints import check_writable
from knet_jax.saved.models import Model, open_model
from knet_jax.segmentation.class_lists import check_class_counts, check_trained_classes
from knet_jax.segmentation.drawing import Row, panel, save_picture
from knet_jax.structs import EMPTY, Batch, Pass
from knet_jax.system import processes
from knet_jax.system.errors import UserError
from knet_jax.system.output_files import Stems, local_path, write_whole
from knet_jax.system.signals import StopRequest
from knet_jax.tasks import TASKS
from knet_jax.training.train_step import replicate

LISTENS_EVERY = 16
"""Batches after which several processes ask each other whether they are to stop: it takes a moment in
which the devices idle."""


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
        devices: of this process. They share its part of a batch, whose size all devices divide.
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
        self._overlap = options.get("overlap_threshold", 0.0)
        inside, self._windows = self.task.place_windows(options)
        look_ = partial(run_windows, model=model, stage=stage, **inside)
        self._look = on_devices(look_, in_axes=(None, 0))
        # Pictures come in many sizes: only this small program is compiled for each canvas.
        predict = partial(self.task.predict, **self.task.choose_options(model.sizes, options))
        self._predict = cache(lambda canvas: on_devices(partial(predict, canvas=canvas)))

    def predictions(self, variables: Any) -> Iterator[Prediction]:
        """The results of this process's pictures, one after the other."""
        return chain.from_iterable(self.batches(variables))

    def batches(self, variables: Any) -> Iterator[list[Prediction]]:
        """The results of this process's part of every batch; all processes have as many batches."""
        variables = replicate(variables, self._devices)
        elements = pipeline.eval_batches(
            self.split,
            self._data,
            self._batch_size,
            limit=self._limit,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            ratios=self._scales,
            **self._windows,
        )
        begun: dict[int, tuple[Windows, Any]] = {}

        def start(scales: Sequence[Batch]) -> Any:
            split = partial(split_over, num_devices=len(self._devices))
            seen = []
            for batch, mirrored in both_ways(scales, self._flip):
                stage = self._look(variables, split(batch))
                seen.append(Pass(stage, *split((batch.size, canvas_of(batch), mirrored))))
            canvas = ResultCanvas.of(
                np.max([batch.size for batch in scales], 0), batch.original_size
            )
            return self._predict(canvas)(tuple(seen), split(batch.original_size))

        for batch, truths, result in lookahead((b[0], t, start(b)) for b, t in elements):
            result = jax.tree.map(lambda x: np.asarray(x).reshape(-1, *x.shape[2:]), result)
            for index, truth in truths:
                begun[index] = Windows(self.split.sizes[index], **self._windows), truth
            predictions = []
            for i, index in enumerate(batch.id.tolist()):
                if index == EMPTY:
                    continue
                windows, truth = begun[index]
                one = jax.tree.map(lambda x, i=i: x[i], result)
                if windows.add(self.task.read(one, batch.original_size[i])):
                    joined = windows.join(
                        self.task, self.split.categories.num_things, self._overlap
                    )
                    predictions.append(Prediction(index, truth, joined))
                    del begun[index]
            yield predictions

    def evaluate(
        self,
        variables: Any,
        visit: Callable[[list[Prediction]], None] | None = None,
        stop: StopRequest | None = None,
    ) -> Any | None:
        """Scores all pictures of all processes, with a progress bar.

        Args:
            variables: parameters and running statistics.
            visit: called with this process's predictions of every batch.
            stop: ends the evaluation, of all processes within a few batches, whose result is then None.

        Returns:
            Counts, which the metric of the task turns into scores; None where it was stopped.
        """
        metric, num_classes = self.task.metric, len(self.split.categories.names)
        counts = {}  # merged at the end: that is much faster
        total = min(len(self.split), self._limit or len(self.split))
        hidden = None if processes.is_main() else True
        bar = tqdm(total=total, desc="evaluating", unit="img", leave=False, delay=1, disable=hidden)
        alone, stopped = processes.is_alone(), False
        with bar, processes.together():
            for number, predictions in enumerate(self.batches(variables)):
                if alone or number % LISTENS_EVERY == 0:
                    stopped = processes.any_of(stop)
                if stopped:
                    return None
                for index, truth, prediction in predictions:
                    image_id = self.split.image_id(index)
                    counts[index] = metric.count(truth, prediction, num_classes, image_id)
                if visit:
                    visit(predictions)
                bar.update(len(predictions) * jax.process_count())
            return merge(metric, num_classes, counts)


def merge(metric: Any, num_classes: int, counts: dict[int, Any]) -> Any:
    """Merges the counts of the pictures of all processes, each by its position in the split."""
    return metric.merge(metric.no_counts(num_classes), *collect(counts))


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
        self._kept: list[Prediction] = []

    def add(self, predictions: list[Prediction]) -> None:
        """Keeps those predictions whose pictures were chosen."""
        self._kept += [one for one in predictions if one.index in self._wanted]

    def rows(self) -> list[Row]:
        """The pictures that all processes have kept, in their order, with truth and prediction."""
        kept = chain.from_iterable(processes.exchange(self._kept))
        return [
            Row(self._split.file_name(i), self._split.image(i), truth, prediction)
            for i, truth, prediction in sorted(kept, key=lambda one: one.index)
        ]


def describe_model(model: Model) -> str:
    """A text that tells models of other steps or variables apart."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(model.variables):
        digest.update(np.asarray(leaf).tobytes())
    return f"step {model.step}, {digest.hexdigest()[:10]}"


def split_over(batch: Any, num_devices: int) -> Any:
    """Gives the arrays of a batch a leading axis over devices."""
    return jax.tree.map(lambda x: x.reshape(num_devices, -1, *x.shape[1:]), batch)


@processes.main_speaks()
@processes.together()  # all that they do together in it is to exchange what they found
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
    folder = None if isinstance(model, Model) else local_path("workdir", model)
    if not (folder or output):
        raise UserError("output is missing: an opened model does not say where results go")
    output = local_path("output", output or folder)
    if output.is_file():
        raise UserError(f"--output={output} is a file; accepted: a folder for the results")
    if folder:
        model = open_model(folder, checkpoint, ema, overrides, num_devices=jax.device_count())
    if processes.is_main():
        check_writable(output)
    if not processes.is_alone():
        processes.check_same({"the model": describe_model(model)})
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
        f"{jax.device_count()} x {devices[0].device_kind}"
    )

    gallery = Gallery(split, config.eval.num_pictures, num_images)
    num_classes, num_scored, boundaries = len(categories.names), 0, {}
    files = None
    if results:
        files = processes.on_main(
            lambda: task.result_files(output / f"{config.task}.json", categories)
        )

    def visit(predictions: list[Prediction]) -> None:
        nonlocal num_scored
        num_scored += len(predictions)
        gallery.add(predictions)
        for index, truth, result in predictions if boundary else ():
            image_id, overlap = split.image_id(index), metric.boundary_iou
            boundaries[index] = metric.count(truth, result, num_classes, image_id, overlap)
        if files:
            found = [(one.index, one.prediction) for one in predictions]
            for index, result in chain.from_iterable(processes.exchange(found)):
                files.add(split.image_id(index), split.file_name(index), result)

    def counts_after(stage: int, visit: Callable[[Prediction], None] | None = None) -> Any:
        evaluator = Evaluator(model.network, split, config, devices, limit, stage)
        with jax.default_matmul_precision(config.precision):
            return evaluator.evaluate(model.variables, visit)

    def summarize(counts: Any) -> dict[str, float | None]:
        scores = metric.summarize(counts, categories)
        return {name: None if np.isnan(score) else score for name, score in scores.items()}

    counts = counts_after(-1, visit)
    num_scored = sum(processes.exchange(num_scored))
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
        merged = merge(metric, num_classes, boundaries)
        print(f"\nBoundaries\n{metric.table(merged, categories)}")
        metrics["boundary"] = summarize(merged)
    if rounds:
        earlier = [summarize(counts_after(stage)) for stage in range(config.model.num_stages)]
        metrics["rounds"] = [{"updates": i} | row for i, row in enumerate([*earlier, scores])]
        print(f"\n{'updates':>7} " + " ".join(f"{name:>10}" for name in metric.HEADLINE))
        for row in metrics["rounds"]:
            columns = " ".join(f"{row[name]:10.1f}" for name in metric.HEADLINE)
            print(f"{row['updates']:7} {columns}")

    rows = gallery.rows()
    if processes.is_main():
        write_whole(output / "metrics.json", (json.dumps(metrics, indent=2) + "\n").encode())
        stems = Stems()
        for row in rows:
            path = output / "pictures" / f"{stems.of(row.title)}.png"
            save_picture(path, panel([row], categories))
    if files:
        files.close()
    print(f"wrote {output / 'metrics.json'} and {output / 'pictures'}/")
    return metrics
