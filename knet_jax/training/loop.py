"""The training loop, from a config to a trained network in a folder."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from knet_jax.config.files import SAVED_NAME, check_resume, save_config
from knet_jax.config.validation import validate
from knet_jax.data import pipeline
from knet_jax.data.prepared_split import Split
from knet_jax.inference.forward import lookahead
from knet_jax.matching import LossWeights
from knet_jax.model import init_variables, make_model
from knet_jax.saved.checkpoints import Checkpoints, check_writable
from knet_jax.saved.models import headline_scores, load_init_weights
from knet_jax.segmentation import class_lists
from knet_jax.segmentation.drawing import save_picture
from knet_jax.structs import EMPTY
from knet_jax.system.compilation_cache import keep_programs
from knet_jax.system.errors import UserError
from knet_jax.system.locks import lock
from knet_jax.system.memory import keep_memory
from knet_jax.system.signals import StopRequest, stop_when_asked
from knet_jax.tasks import TASKS
from knet_jax.training import optim, train_step
from knet_jax.training.evaluation import Evaluator, Gallery
from knet_jax.training.logs import Interval, Log, Progress, plot_curves
from knet_jax.training.train_step import Parts, TrainState


class Run(NamedTuple):
    """A run that has come to its end."""

    workdir: Path
    step: int
    """How many steps it was trained."""
    scores: dict[str, float]
    """Of its last evaluation: `val/PQ` and the like, in percent; `val_ema/PQ` of the average."""


def train(config: ConfigDict, workdir: str | Path) -> Run:
    """Trains a network, or goes on with a run that was stopped.

    The run lives in the workdir: config.json, checkpoints/, log.jsonl, events/ for TensorBoard,
    pictures/, curve.png. Where it holds an unfinished run of this config, that goes on from its last
    checkpoint, to the same numbers as if it had never stopped.

    Args:
        config: from `load_config`.
        workdir: a folder, created if need be.

    Returns:
        The workdir, the last step and its scores.

    Raises:
        UserError: the config, the data or the workdir cannot be used as they are, or the loss is
            not finite.
        Preempted: SIGTERM or Ctrl-C came; the step is saved, and the same call goes on.
    """
    keep_programs()
    keep_memory()
    if jax.process_count() > 1:
        raise UserError("several processes: a run has one, with all devices of its machine")
    validate(config, jax.device_count())
    workdir = Path(workdir)
    check_writable(workdir)
    taken = f"another run is using {workdir}; accepted: another --workdir"
    with lock(workdir, taken), jax.default_matmul_precision(config.precision):
        return _run(config, workdir)


def _run(config: ConfigDict, workdir: Path) -> Run:
    """`train`, alone in a workdir that can be written to."""
    if (workdir / SAVED_NAME).exists():
        for difference in check_resume(config, workdir):
            print(difference)

    # The data.
    split = pipeline.load_split(config.data, config.data.train_split, config.task)
    val_split = pipeline.load_split(config.data, config.data.val_split, config.task)
    class_lists.check_same_classes(split.categories, val_split.categories)
    class_lists.check_class_counts(config, split.categories)
    batch_size = config.train.batch_size
    steps_per_epoch = pipeline.steps_per_epoch(split, config.data, batch_size)
    total_steps = config.train.steps or round(config.train.epochs * steps_per_epoch)
    if total_steps < 1:
        raise UserError(
            f"config.train.epochs is {config.train.epochs}, less than one step; an epoch has "
            f"{steps_per_epoch} steps of {batch_size} images"
        )

    # The network and its optimizer.
    task, devices = TASKS[config.task], jax.local_devices()
    share = batch_size // len(devices)
    parts = Parts(len(devices), min(share, config.train.microbatch))
    model = make_model(**config.model)
    variables = init_variables(model, config.seed)
    params = variables["params"]
    optimizer, schedule = optim.make_optimizer(config.optim, params, steps_per_epoch, batch_size)
    take_step = train_step.make_train_step(
        devices,
        model=model,
        task=task,
        optimizer=optimizer,
        trainable=optim.trainable(config.optim.groups, params),
        weights=LossWeights(**config.loss),
        seed=config.seed,
        ema_decay=config.train.ema_decay,
    )
    count = sum(x.size for x in jax.tree.leaves(params))
    summary = (
        f"{count / 1e6:.1f} M parameters, {len(devices)} x {devices[0].device_kind}, {workdir}\n"
        + optim.describe(config.optim, params, steps_per_epoch, total_steps, batch_size)
    )

    # Where it starts.
    checkpoints = Checkpoints(
        workdir / "checkpoints",
        keep=config.train.keep,
        metrics=headline_scores(config),
        model=config.model.to_dict(),
    )
    state, before = find_start(config, variables, optimizer, checkpoints)
    if before:
        class_lists.check_trained_classes(before["categories"], split.categories)
        was = Parts(*before.get("parts", parts))
        if warning := train_step.explain_change(model, was, parts):
            print(warning)
    save_config(config, workdir)
    print(summary)
    start = int(state.step)
    state = train_step.replicate(state, devices)
    del variables, params  # the state has what they held; a large network has no room for it twice

    # The loop: step, log, save, evaluate.
    log = Log(workdir, steps_per_epoch, start)
    progress = Progress(total_steps)
    interval = Interval(batch_size)
    score = partial(
        score_step,
        evaluator=Evaluator(model, val_split, config, devices),
        checkpoints=checkpoints,
        num_pictures=config.eval.num_pictures,
        log=log,
        progress=progress,
        workdir=workdir,
    )
    batches = pipeline.train_batches(
        split, config.data, batch_size, config.seed, start * batch_size
    )
    num_parts = share // parts.num_images
    feed = lookahead((b.id, train_step.to_devices(b, devices, num_parts)) for b, _ in batches)
    unchecked = None

    def is_scored(step: int) -> bool:
        return step >= total_steps or is_due(step, config.train.eval_every)

    with checkpoints, closing(log), closing(progress), stop_when_asked() as stop:
        if before and is_scored(start) and checkpoints.scores(start) is None:
            score(start, state, stop)  # what the run was stopped in
        if start < total_steps:
            progress.print("compiling; the first step can take minutes")
        interval.restart()

        for step in range(start + 1, total_steps + 1):
            began = time.monotonic()
            ids, batch = next(feed)
            interval.waited += time.monotonic() - began
            state, metrics = take_step(state, batch)
            interval.add(metrics)

            # By now the step before is done; to wait for this one would leave the device idle.
            check_finite(unchecked, split, checkpoints)
            unchecked = step, metrics, ids
            progress.update(step, interval.last() | {"lr": schedule(step - 1)})
            stops, evaluates = bool(stop), is_scored(step)
            saves = stops or evaluates or is_due(step, config.train.checkpoint_every)

            if saves or is_due(step, config.train.log_every):
                check_finite(unchecked, split, checkpoints)
                checkpoints.raise_if_failed()
                log.scalars(
                    step, interval.close() | optim.group_rates(config.optim, schedule, step - 1)
                )
            if saves:
                seen = {
                    "examples_seen": step * batch_size,
                    "categories": split.categories._asdict(),
                    "parts": parts,
                }
                checkpoints.save(step, state, seen)
            if evaluates:
                score(step, state, stop)
                interval.restart()
            elif stops:
                end_early(step, checkpoints, stop)

        last = max(start, total_steps)
        scores = checkpoints.scores(last)

    plot_curves(workdir)
    print(
        f"done: {describe_scores(scores, 'val', task.metric.HEADLINE)} in {workdir}; "
        f"evaluate it with: knet eval --workdir {workdir}"
    )
    return Run(workdir, last, scores)


def find_start(
    config: ConfigDict,
    variables: Mapping[str, Any],
    optimizer: optax.GradientTransformation,
    checkpoints: Checkpoints,
) -> tuple[TrainState, dict[str, Any] | None]:
    """The state from which a run goes on.

    That is the last checkpoint, else the initial weights that the config names, else new variables.

    Returns:
        The state, and what was noted at the checkpoint, None where there is none.
    """
    params, has_average = variables["params"], bool(config.train.ema_decay)
    state = TrainState(
        jnp.zeros((), jnp.int32),
        params,
        variables.get("batch_stats", {}),
        jax.jit(optimizer.init)(params),
        params if has_average else None,
    )
    restored = checkpoints.restore_latest(state)
    if restored:
        state, record = restored
        print(f"resuming from step {record['step']} of {checkpoints.directory.parent}")
        return state, record["progress"]
    if config.init_weights:
        loaded, origin = load_init_weights(config.init_weights, variables)
        state = state._replace(**loaded)
        print(origin)
    else:
        print("FROM SCRATCH: config.init_weights names no weights of a backbone")
    if has_average:
        state = state._replace(ema=jax.tree.map(jnp.copy, state.params))
    return state, None


def is_due(step: int, every: int) -> bool:
    """Whether something happens at a step; 0 is never."""
    return every > 0 and step % every == 0


def check_finite(done: Any, split: Split, checkpoints: Checkpoints) -> None:
    """Stops the run at a loss that is no number, before anything of it is saved.

    Args:
        done: (step, its metrics, ids of its pictures), or None before the first step.
        split: that the pictures come from.
        checkpoints: of the run.

    Raises:
        UserError: the loss or the gradient is not finite.
    """
    if done is None:
        return
    step, metrics, ids = done
    if np.isfinite(metrics["loss/total"]) and np.isfinite(metrics["grad_norm"]):
        return
    checkpoints.wait()
    bad = [name for name, value in metrics.items() if not np.isfinite(value)]
    names = ", ".join(split.file_name(i) for i in ids if i != EMPTY)
    last = checkpoints.steps()[-1:] or ["none"]
    raise UserError(
        f"step {step}: {', '.join(bad)} is not finite; images: {names}; last checkpoint: {last[0]}; "
        "a lower config.optim.lr or a longer config.optim.warmup_steps may help"
    )


def score_step(
    step: int,
    state: TrainState,
    stop: StopRequest,
    *,
    evaluator: Evaluator,
    checkpoints: Checkpoints,
    num_pictures: int,
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
    gallery = Gallery(evaluator.split, num_pictures)
    scores = {}
    for name, params in {"val": state.params, "val_ema": state.ema}.items():
        if params is None:
            continue
        variables = {"params": params, "batch_stats": state.batch_stats}
        visit = gallery.add if name == "val" else None
        counts = None if stop else evaluator.evaluate(variables, visit, stop)
        if counts is None:
            end_early(step, checkpoints, stop)
        summary = metric.summarize(counts, categories)
        scores |= {f"{name}/{key}": value for key, value in summary.items()}
        line = describe_scores(scores, name, metric.HEADLINE)
        progress.print(f"step {step}: {line}{' (EMA)' if name != 'val' else ''}")
    log.scalars(step, scores)
    if gallery.rows:
        panel = gallery.panel()
        log.images(step, {"val/pictures": panel})
        save_picture(workdir / "pictures" / f"step_{step:07}.png", panel)
    checkpoints.add_scores(step, scores)


def end_early(step: int, checkpoints: Checkpoints, stop: StopRequest) -> NoReturn:
    """Ends a run that was asked to stop, once the step is on disk."""
    checkpoints.wait()
    raise stop.end(f"stopped at step {step}, which is saved; the same command goes on")


def describe_scores(scores: Mapping[str, float], prefix: str, names: Sequence[str]) -> str:
    """Some numbers of an evaluation in a line."""
    return ", ".join(f"{name} {scores[f'{prefix}/{name}']:.1f}" for name in names)
