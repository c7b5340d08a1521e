"""Scores of a run at a step that it has saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from knet_jax.analysis.analysis import Analysis
from knet_jax.analysis.gallery import Gallery
from knet_jax.metrics.counts import Prediction
from knet_jax.saved.checkpoints import Checkpoints
from knet_jax.segmentation.drawing import panel, save_picture
from knet_jax.system import processes
from knet_jax.system.signals import StopRequest
from knet_jax.training.ending import end_early
from knet_jax.training.evaluation import Evaluator
from knet_jax.training.logs import Log, Progress
from knet_jax.training.train_step import TrainState


def score_step(
    step: int,
    state: TrainState,
    stop: StopRequest,
    *,
    evaluator: Evaluator,
    checkpoints: Checkpoints,
    config: ConfigDict,
    log: Log,
    progress: Progress,
    workdir: Path,
) -> None:
    """Scores a step that has been saved, and its moving average if there is one.

    Only when all is done, the scores are logged and attached to the checkpoint.

    Raises:
        Preempted: the run was asked to stop; the evaluation will be made up when it goes on.
    """
    metric, categories = evaluator.task.metric, evaluator.split.categories
    gallery = Gallery(evaluator.split, config.eval.num_pictures, len(evaluator.split))
    analysis = Analysis(evaluator.split, evaluator.task, config.model, config.eval.analysis)
    scores = {}

    def visit(predictions: list[Prediction]) -> None:
        gallery.add(predictions)
        analysis.add(predictions)

    for name, params in {"val": state.params, "val_ema": state.ema}.items():
        if params is None:
            continue
        variables = {"params": params, "batch_stats": state.batch_stats}
        looks = visit if name == "val" else None
        counts = None if processes.any_of(stop) else evaluator.evaluate(variables, looks, stop)
        if counts is None:
            end_early(step, checkpoints, stop)
        summary = metric.summarize(counts, categories)
        scores |= {f"{name}/{k}": score for k, score in summary.items() if not np.isnan(score)}
        line = describe_scores(scores, name, metric.HEADLINE)
        progress.print(f"step {step}: {line}{' (EMA)' if name != 'val' else ''}")
    log.scalars(step, scores)
    if (rows := gallery.rows()) and processes.is_main():
        drawn = panel(rows, categories)
        log.images(step, {"val/pictures": drawn})
        save_picture(workdir / "pictures" / f"step_{step:07}.png", drawn)
    if config.eval.analysis:
        analysis.write(workdir / "analysis", {"step": step, "split": config.data.val_split})
    checkpoints.add_scores(step, scores)


def describe_scores(scores: Mapping[str, float], prefix: str, names: Sequence[str]) -> str:
    """Some numbers of an evaluation in a line."""
    return ", ".join(f"{name} {scores[f'{prefix}/{name}']:.1f}" for name in names)
