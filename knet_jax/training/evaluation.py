"""Scoring a network on a split, picture by picture, in constant memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from knet_jax.analysis.analysis import Analysis
from knet_jax.analysis.gallery import Gallery
from knet_jax.analysis.page import PAGE
from knet_jax.config.rules import MOST_STEPS, is_whole
from knet_jax.data import pipeline
from knet_jax.data.prepared_split import Split
from knet_jax.inference.activity import Activity, average, observe
from knet_jax.inference.forward import lookahead, run_windows
from knet_jax.inference.multiscale import both_ways, canvas_of
from knet_jax.inference.resampling import ResultCanvas
from knet_jax.inference.windows import Windows
from knet_jax.knet import KNet
from knet_jax.metrics.counts import Prediction, Rounds, Tally, without_nan
from knet_jax.saved.checkpoints import check_writable
from knet_jax.saved.models import Model, open_model
from knet_jax.segmentation.class_lists import check_class_counts, check_trained_classes
from knet_jax.segmentation.drawing import panel, save_picture
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


class Evaluator:
    """Evaluates a split again and again, with whatever variables a run has reached.

    Args:
        config: of the run; its `task`, `data` and `eval` are read.
        devices: of this process. They share its part of a batch, whose size all devices divide.
        limit: only the first so many pictures.
        inside: of the first so many pictures, predictions also have the `earlier` results, and the
            `activity` of the kernels.
    """

    def __init__(
        self,
        model: KNet,
        split: Split,
        config: ConfigDict,
        devices: list[jax.Device],
        limit: int | None = None,
        inside: int = 0,
    ):
        self.split = split
        self.task = TASKS[config.task]
        self._data = config.data
        self._batch_size = config.eval.batch_size
        self._devices = devices
        self._limit = limit
        self._inside = inside
        on_devices = partial(jax.pmap, devices=devices)
        options = config.eval
        self._scales = options.get("scales", (1.0,))
        self._flip = options.get("flip", False)
        self._overlap = options.get("overlap_threshold", 0.0)
        within, self._windows = self.task.place_windows(options)
        stages = tuple(range(model.num_stages + 1))[0 if inside else -1 :]
        look = partial(run_windows, model=model, stages=stages, **within)
        self._look = on_devices(look, in_axes=(None, 0))
        self._observe = on_devices(partial(observe, num_things=model.sizes.num_things))
        # Pictures come in many sizes: only this small program is compiled for each canvas.
        predict = partial(self.task.predict, **self.task.choose_options(model.sizes, options))
        self._predict = cache(lambda canvas: on_devices(partial(predict, canvas=canvas)))

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
        begun: dict[int, tuple[Any, list[Windows], list[Activity | None]]] = {}

        def split(batch: Any) -> Any:
            """Gives the arrays of a batch a leading axis over devices."""
            return jax.tree.map(lambda x: x.reshape(len(self._devices), -1, *x.shape[1:]), batch)

        def start(scales: Sequence[Batch]) -> Any:
            seen = []
            for batch, mirrored in both_ways(scales, self._flip):
                how = split((batch.size, canvas_of(batch), mirrored))
                stages = self._look(variables, split(batch))
                seen.append([Pass(stage, *how) for stage in stages])
            canvas = ResultCanvas.of(
                np.max([batch.size for batch in scales], 0), batch.original_size
            )
            is_inside = ((batch.id != EMPTY) & (batch.id < self._inside)).any()
            rounds = list(zip(*seen))[0 if is_inside else -1 :]  # the passes of each
            predict, sizes = self._predict(canvas), split(batch.original_size)
            activity = self._observe(rounds[-1][0]) if is_inside else None
            return [predict(passes, sizes) for passes in rounds], activity

        num_things = self.split.categories.num_things
        for batch, truths, results in lookahead((b[0], t, start(b)) for b, t in elements):
            results = jax.tree.map(lambda x: np.asarray(x).reshape(-1, *x.shape[2:]), results)
            for index, truth in truths:
                count = len(results[0]) if index < self._inside else 1
                size = self.split.sizes[index]
                begun[index] = truth, [Windows(size, **self._windows) for _ in range(count)], []
            predictions = []
            for i, index in enumerate(batch.id.tolist()):
                if index == EMPTY:
                    continue
                truth, windows, activities = begun[index]
                rounds, activity = jax.tree.map(lambda x, i=i: x[i], results)
                activities.append(activity)
                shown = [
                    each.add(self.task.read(one, batch.original_size[i]))
                    for each, one in zip(windows, rounds[-len(windows) :])
                ]
                if all(shown):
                    *earlier, last = (
                        each.join(self.task, num_things, self._overlap) for each in windows
                    )
                    activity = average(activities) if index < self._inside else None
                    predictions.append(Prediction(index, truth, last, earlier, activity))
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
        tally = Tally(self.task.metric, self.split.categories)
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
                for one in predictions:
                    image_id = self.split.image_id(one.index)
                    tally.add(one.index, one.truth, one.prediction, image_id)
                if visit:
                    visit(predictions)
                bar.update(len(predictions) * jax.process_count())
            return tally.total()


def describe_model(model: Model) -> str:
    """A text that tells models of other steps or variables apart."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(model.variables):
        digest.update(np.asarray(leaf).tobytes())
    return f"step {model.step}, {digest.hexdigest()[:10]}"


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
    analysis: bool = False,
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
        analysis: also write what `analyse` does.
        overrides: `--config.x.y=value` arguments, where the model is not yet opened.

    Returns:
        What metrics.json holds: PQ, AP or mIoU and their like in percent, `step`, `ema`, `split`,
        `num_images`, `num_broken`, `per_class`, and `rounds` and `boundary` if asked for. So is
        `analysis`, which has a file of its own.

    Raises:
        UserError: there is no such model or checkpoint, or it does not fit the data or the output.
    """
    folder = None if isinstance(model, Model) else local_path("workdir", model)
    if not (limit is None or is_whole(limit, 1, MOST_STEPS)):
        raise UserError(f"limit is {limit!r}; accepted: a whole number of at least 1, or None")
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
    num_scored, boundaries = 0, Tally(metric, categories)
    num_updates = model.network.num_stages
    inside = Analysis(split, task, config.model, num_images) if analysis else None
    after = inside.rounds if analysis else Rounds(metric, categories, num_updates)
    files = None
    if results:
        files = processes.on_main(
            lambda: task.result_files(output / f"{config.task}.json", categories)
        )

    def visit(predictions: list[Prediction]) -> None:
        nonlocal num_scored
        num_scored += len(predictions)
        gallery.add(predictions)
        for index, truth, result, *_ in predictions if boundary else ():
            boundaries.add(index, truth, result, split.image_id(index), metric.boundary_iou)
        if analysis:
            inside.add(predictions)
        elif rounds:
            for one in predictions:
                after.add(one, split.image_id(one.index))
        if files:
            found = [(one.index, one.prediction) for one in predictions]
            for index, result in chain.from_iterable(processes.exchange(found)):
                files.add(split.image_id(index), split.file_name(index), result)

    num_inside = num_images if rounds or analysis else 0
    evaluator = Evaluator(model.network, split, config, devices, limit, num_inside)
    with jax.default_matmul_precision(config.precision):
        counts = evaluator.evaluate(model.variables, visit)
    num_scored = sum(processes.exchange(num_scored))
    if num_scored < num_images:
        num_broken = num_images - num_scored
        print(f"WARNING: {num_broken} of {num_images} images are broken and left out")
    print(metric.table(counts, categories))
    metrics = without_nan(metric.summarize(counts, categories)) | {
        "step": model.step,
        "ema": ema,
        "split": config.data.val_split,
        "num_images": num_scored,
        "num_broken": num_images - num_scored,
        "per_class": metric.per_class(counts, categories),
    }
    if boundary:
        merged = boundaries.total()
        print(f"\nBoundaries\n{metric.table(merged, categories)}")
        metrics["boundary"] = without_nan(metric.summarize(merged, categories))
    if rounds:
        metrics["rounds"] = after.rows()
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
    if analysis:
        about = {"step": model.step, "split": config.data.val_split}
        metrics["analysis"] = inside.write(output / "analysis", about)
        print(f"wrote {output / 'analysis' / PAGE}: open it in a browser")
    return metrics


def analyse(
    model: str | Path | Model,
    *,
    checkpoint: str | int = "best",
    ema: bool = False,
    limit: int | None = None,
    output: str | Path | None = None,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Looks inside a model: what it does right and wrong on the validation split, and how.

    Does what `evaluate` does, of which all arguments are, and writes to the folder analysis/ of the
    output the page index.html, which any browser shows without a server, with its pictures, and
    analysis.json. docs/beyond_the_paper.md shows what is on the page.

    Returns:
        What analysis.json holds, see `knet_jax.analysis.analysis.Analysis.write`.

    Raises:
        UserError: as `evaluate`.
    """
    how = {"checkpoint": checkpoint, "ema": ema, "limit": limit, "output": output}
    return evaluate(model, analysis=True, overrides=overrides, **how)["analysis"]
