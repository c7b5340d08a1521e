"""Evaluates a run: PQ, AP or mIoU of its best checkpoint on the validation split.

python eval.py --workdir runs/coco_panoptic
python eval.py --workdir runs/coco_panoptic --checkpoint latest --limit 500 --results
python eval.py --workdir runs/coco_panoptic --rounds

Reads everything from the workdir, prints the tables, and writes metrics.json and pictures/ to the
workdir (or to --output).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
from absl import flags

from knet_jax.cli.commandline import CommandLine, run
from knet_jax.data import pipeline
from knet_jax.saved.checkpoints import check_writable
from knet_jax.saved.models import open_model
from knet_jax.segmentation.class_lists import check_class_counts, check_trained_classes
from knet_jax.segmentation.drawing import panel, save_picture
from knet_jax.system.compilation_cache import keep_programs
from knet_jax.system.errors import UserError
from knet_jax.system.output_files import Stems, write_whole
from knet_jax.tasks import TASKS
from knet_jax.training.evaluation import Evaluator, Gallery, Prediction

WORKDIR = flags.DEFINE_string("workdir", None, "of the run")
CHECKPOINT = flags.DEFINE_string("checkpoint", "best", "best, latest, or the number of a step")
LIMIT = flags.DEFINE_integer("limit", None, "evaluate only the first so many pictures", 1)
OUTPUT = flags.DEFINE_string("output", None, "where results go; default: the workdir")
RESULTS = flags.DEFINE_boolean(
    "results", False, "write the results in files, as the test servers of COCO and ADE20K take them"
)
EMA = flags.DEFINE_boolean("ema", False, "evaluate the moving average of the parameters")
BOUNDARY = flags.DEFINE_boolean("boundary", False, "also boundary AP, for the task instance")
ROUNDS = flags.DEFINE_boolean("rounds", False, "also evaluate the masks of every earlier update")


def main(command: CommandLine) -> None:
    if WORKDIR.value is None:
        raise UserError("--workdir is missing: the folder of a run of train.py")
    workdir, output = Path(WORKDIR.value), Path(OUTPUT.value or WORKDIR.value)
    if output.is_file():
        if OUTPUT.value:
            raise UserError(f"--output={output} is a file; accepted: a folder")
        raise UserError(f"--output is missing: --workdir={workdir} is no folder for results")
    keep_programs()
    devices = jax.local_devices()
    trained = open_model(
        workdir, CHECKPOINT.value, EMA.value, command.overrides, num_devices=jax.device_count()
    )
    check_writable(output)
    config, step = trained.config, trained.step
    jax.config.update("jax_default_matmul_precision", config.precision)

    task = TASKS[config.task]
    metric = task.metric
    if BOUNDARY.value and not hasattr(metric, "boundary_iou"):
        raise UserError(f"--boundary: config.task is {config.task!r}; accepted: instance")
    split = pipeline.load_split(config.data, config.data.val_split, config.task)
    check_class_counts(config, split.categories)
    check_trained_classes(trained.categories._asdict(), split.categories)

    num_images = min(len(split), LIMIT.value or len(split))
    print(
        f"evaluating step {step} on {num_images} images, {len(devices)} x {devices[0].device_kind}"
    )
    evaluator = Evaluator(trained.model, split, config, devices, LIMIT.value)
    gallery = Gallery(split, config.eval.num_pictures)
    results = None
    if RESULTS.value:
        results = task.results(output / f"{config.task}.json", split.categories)

    num_classes = len(split.categories.names)
    boundaries = [metric.no_counts(num_classes)]

    num_scored = 0

    def visit(prediction: Prediction) -> None:
        nonlocal num_scored
        num_scored += 1
        gallery.add(prediction)
        index, truth, result = prediction
        if results:
            name = split.file_name(index)
            results.add(split.image_id(index), name, result)
        if BOUNDARY.value:
            image_id, overlap = split.image_id(index), metric.boundary_iou
            boundaries.append(metric.count(truth, result, num_classes, image_id, overlap))

    counts = evaluator.evaluate(trained.variables, visit)

    num_broken = num_images - num_scored
    if num_broken:
        print(f"WARNING: {num_broken} of {num_images} images are broken and left out")
    print(metric.table(counts, split.categories))
    metrics = {
        **metric.summarize(counts, split.categories),
        "step": step,
        "ema": EMA.value,
        "split": config.data.val_split,
        "num_images": num_scored,
        "num_broken": num_broken,
        "per_class": metric.per_class(counts, split.categories),
    }
    if BOUNDARY.value:
        boundary = metric.merge(*boundaries)
        print(f"\nBoundaries\n{metric.table(boundary, split.categories)}")
        metrics["boundary"] = metric.summarize(boundary, split.categories)
    if ROUNDS.value:
        metrics["rounds"] = rounds = []
        for stage in range(config.model.num_stages):
            evaluator = Evaluator(trained.model, split, config, devices, LIMIT.value, stage)
            summary = metric.summarize(evaluator.evaluate(trained.variables), split.categories)
            rounds.append({"updates": stage, **summary})
        rounds.append(
            {"updates": config.model.num_stages, **metric.summarize(counts, split.categories)}
        )
        print_rounds(rounds, metric.HEADLINE)
    write_whole(output / "metrics.json", (json.dumps(metrics, indent=2) + "\n").encode())
    folder, stems = output / "pictures", Stems()
    for row in gallery.rows:
        path = folder / f"{stems.of(row.title)}.png"
        save_picture(path, panel([row], split.categories))
    if results:
        results.close()
    print(f"wrote {output / 'metrics.json'} and {folder}/")


def print_rounds(rounds: Sequence[Mapping[str, float]], names: Sequence[str]) -> None:
    """A line for the masks after every update."""
    print(f"\n{'updates':>7} " + " ".join(f"{name:>10}" for name in names))
    for row in rounds:
        print(f"{row['updates']:7} " + " ".join(f"{row[name]:10.1f}" for name in names))


if __name__ == "__main__":
    run(main)
