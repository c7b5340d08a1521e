"""The training loop, from a config to a trained network in a folder."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from contextlib import closing, nullcontext
from functools import partial
from io import StringIO
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from knet_jax.config.files import SAVED_NAME, check_resume, save_config
from knet_jax.config.schema import flatten
from knet_jax.config.validation import validate
from knet_jax.data import completion, pipeline
from knet_jax.inference.forward import lookahead
from knet_jax.matching import LossWeights
from knet_jax.model import init_variables, make_model
from knet_jax.saved.checkpoint_record import leaf_paths
from knet_jax.saved.checkpoints import Checkpoints, check_writable
from knet_jax.saved.fitting import check_backbone
from knet_jax.saved.models import headline_scores
from knet_jax.segmentation import class_lists
from knet_jax.system import processes
from knet_jax.system.errors import UserError
from knet_jax.system.locks import lock
from knet_jax.system.output_files import local_path
from knet_jax.system.signals import stop_when_asked
from knet_jax.tasks import TASKS
from knet_jax.training import optim, train_step
from knet_jax.training.ending import check_finite, end_early, num_worse
from knet_jax.training.evaluation import Evaluator
from knet_jax.training.logs import Interval, Log, Progress, plot_curves
from knet_jax.training.scoring import describe_scores, score_step
from knet_jax.training.start import find_start
from knet_jax.training.trackers import open_tracker
from knet_jax.training.train_step import Parts

OF_A_MACHINE = ("init_weights", "data.root", "data.data_dir", "data.num_workers")
"""Keys that may differ between the processes of a run, each of which may have a disk of its own."""

LONG_COMPILATION = 10.0
"""Seconds of a first step on the CPU after which its programs are loaded anew, from JAX's cache on disk.
Compiling leaves thousands of holes between what it keeps in memory. The C library searches them at
every allocation, which makes steps of small networks a third slower; loading leaves none."""


class Run(NamedTuple):
    """A run that has come to its end."""

    workdir: Path
    step: int
    """How many steps it was trained."""
    scores: dict[str, float]
    """What its last evaluation found: `val/PQ` and the like, in percent; `val_ema/PQ` of the average."""


def train(config: ConfigDict, workdir: str | Path) -> Run:
    """Trains a network, or goes on with a run that was stopped.

    The run lives in the workdir: config.json, checkpoints/, log.jsonl, events/ for TensorBoard,
    pictures/, analysis/, curve.png. Where it holds an unfinished run of this config, that goes on from
    its last checkpoint, to the same numbers as if it had never stopped.

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
    with processes.main_speaks(), processes.together() as all_ready:
        validate(config, jax.device_count())
        processes.check_same(
            {f"config.{k}": v for k, v in flatten(config).items() if k not in OF_A_MACHINE}
        )
        workdir = local_path("workdir", workdir)
        is_new = processes.is_main() and not workdir.exists()
        if is_new and config.init_weights and not Path(config.init_weights).is_dir():
            check_backbone(config.init_weights, config.model)
        if processes.is_main():
            check_writable(workdir)
        taken = f"another run is using {workdir}; accepted: another --workdir"
        try:
            claim = lock(workdir, taken) if processes.is_main() else nullcontext()
            with claim, jax.default_matmul_precision(config.precision):
                return _run(config, workdir, all_ready)
        except BaseException:
            if is_new and not (workdir / SAVED_NAME).exists():
                shutil.rmtree(workdir)
            raise


def _run(config: ConfigDict, workdir: Path, all_ready: Callable[[], None]) -> Run:
    """`train`, alone in a workdir that can be written to.

    Several processes share the setup, in which one that fails tells the others (until `all_ready`),
    and every step; the main one alone has the workdir and decides.
    """
    # The data.
    split = pipeline.load_split(config.data, config.data.train_split, config.task)
    val_split = pipeline.load_split(config.data, config.data.val_split, config.task)
    class_lists.check_same_classes(split.categories, val_split.categories)
    config = completion.complete(config, split)
    validate(config, jax.device_count())
    if processes.is_main() and (workdir / SAVED_NAME).exists():
        for difference in check_resume(config, workdir):
            print(difference)
    class_lists.check_class_counts(config, split.categories)
    batch_size = config.train.batch_size
    steps_per_epoch, total_steps = completion.lengths(config, split)
    if total_steps < 1:
        raise UserError(
            f"config.train.epochs is {config.train.epochs}, less than one step; an epoch has "
            f"{steps_per_epoch} steps of {batch_size} images"
        )

    for doubt in completion.find_doubts(config, split):
        print(f"WARNING: {doubt}")

    # The network and its optimizer.
    task, devices = TASKS[config.task], jax.local_devices()
    share = batch_size // jax.device_count()
    parts = Parts(jax.device_count(), min(share, config.train.microbatch))
    model = make_model(**config.model)
    variables = init_variables(model, config.seed)
    params = variables["params"]
    optim.check_frozen(config.optim.groups, params, getattr(model.backbone, "frozen", ()))
    optimizer, schedule = optim.make_optimizer(config.optim, params, steps_per_epoch, batch_size)
    make_step = partial(
        train_step.make_train_step,
        jax.devices(),
        model=model,
        task=task,
        optimizer=optimizer,
        trainable=optim.trainable(config.optim.groups, params),
        weights=LossWeights(**config.loss),
        seed=config.seed,
        ema_decay=config.train.ema_decay,
    )
    take_step = make_step()
    count = sum(x.size for x in jax.tree.leaves(params))
    summary = (
        f"{count / 1e6:.1f} M parameters, {jax.device_count()} x {devices[0].device_kind}, {workdir}\n"
        + optim.describe(config.optim, params, steps_per_epoch, total_steps, batch_size)
    )

    # Where it starts.
    checkpoints = processes.on_main(
        lambda: Checkpoints(
            workdir / "checkpoints",
            keep=config.train.keep,
            metrics=headline_scores(config),
            model=config.model.to_dict(),
        )
    )
    state, before = find_start(config, variables, optimizer, checkpoints)
    if before:
        class_lists.check_trained_classes(before["categories"], split.categories)
        was = Parts(*before.get("parts", parts))
        if warning := train_step.explain_change(model, was, parts):
            print(warning)
    if processes.is_main():
        save_config(config, workdir)
    print(summary)
    start = int(state.step)
    state = train_step.replicate(state, devices)
    del variables, params  # the state has what they held; a large network has no room for it twice

    # The loop: step, log, save, evaluate.
    log = processes.on_main(
        lambda: Log(workdir, steps_per_epoch, start, open_tracker(config, workdir))
    )
    progress = Progress(total_steps, stream=None if processes.is_main() else StringIO())
    interval = Interval(batch_size)
    score = partial(
        score_step,
        evaluator=Evaluator(model, val_split, config, devices, inside=config.eval.analysis),
        checkpoints=checkpoints,
        config=config,
        log=log,
        progress=progress,
        workdir=workdir,
    )
    batches = pipeline.train_batches(
        split,
        config.data,
        batch_size,
        config.seed,
        start * batch_size,
        jax.process_index(),
        jax.process_count(),
    )
    num_parts = share // parts.num_images
    feed = lookahead((b.id, train_step.to_devices(b, devices, num_parts)) for b in batches)
    check = partial(check_finite, split=split, checkpoints=checkpoints, start=start)
    unchecked, told, alone = None, 0, processes.is_alone()
    reloads = alone and devices[0].platform == "cpu"

    def is_scored(step: int) -> bool:
        return step >= total_steps or is_due(step, config.train.eval_every)

    def is_over(step: int) -> bool:
        patience, name = config.train.patience, headline_scores(config)[0]
        return processes.from_main(
            lambda: step >= total_steps or 0 < patience <= num_worse(workdir, name)
        )

    with checkpoints, closing(log), closing(batches), closing(progress), stop_when_asked() as stop:
        all_ready()
        scores = processes.from_main(lambda: checkpoints.scores(start))
        if before and scores:
            log.scalars(start, scores)
        elif before and is_scored(start):
            score(start, state, stop)  # what the run was stopped in
        step, is_done = start, is_over(start)
        if not is_done:
            progress.print("compiling; the first step can take minutes")
        interval.restart()

        while not is_done:
            step += 1
            began = time.monotonic()
            ids, batch = next(feed)
            fetched = time.monotonic()
            interval.waited += fetched - began
            first = step == start + 1
            # Several processes tell each other with the metrics, and act on it a step later.
            asked = () if alone else (np.full(len(devices), bool(stop), np.float32),)
            with progress.waiting("compiling the first step") if first else nullcontext():
                state, metrics = take_step(state, batch, *asked)
            interval.add(metrics)
            if first and reloads and time.monotonic() - fetched > LONG_COMPILATION:
                jax.clear_caches()
                take_step = make_step()

            # By now the step before is done; to wait for this one would leave the device idle.
            check(unchecked)
            unchecked = step, metrics, ids
            progress.update(step, interval.last() | {"lr": schedule(step - 1)})
            stops, told = bool(stop) if alone else float(told) > 0, metrics.pop("stops", 0)
            evaluates = is_scored(step)
            saves = stops or evaluates or is_due(step, config.train.checkpoint_every)

            if saves or is_due(step, config.train.log_every):
                check(unchecked)
                log.scalars(
                    step, interval.close() | optim.group_rates(config.optim, schedule, step - 1)
                )
            if saves:
                seen = {
                    "examples_seen": step * batch_size,
                    "categories": split.categories._asdict(),
                    "parts": parts,
                }
                saved = jax.device_get(state)
                check((step, dict(zip(leaf_paths(saved), jax.tree.leaves(saved))), ids))
                checkpoints.save(step, saved, seen)
            if evaluates:
                score(step, state, stop)
                is_done = is_over(step)
                interval.restart()
            elif stops:
                end_early(step, checkpoints, stop)

        scores = processes.from_main(lambda: checkpoints.scores(step))

    with processes.together():
        if processes.is_main():
            plot_curves(workdir)
    print(
        f"done: {describe_scores(scores, 'val', task.metric.HEADLINE)} in {workdir}; "
        f"evaluate it with: knet eval --workdir {workdir}"
    )
    return Run(workdir, step, scores)


def is_due(step: int, every: int) -> bool:
    """Whether something happens at a step; 0 is never."""
    return every > 0 and step % every == 0
