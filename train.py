"""Trains K-Net, or goes on with a run that was stopped.

python train.py --config configs/coco_panoptic.py --config.data.root=/data/coco
python train.py --config configs/coco_panoptic.py:r101,ms3x --workdir runs/r101 --config.optim.lr=2e-4

A run lives in its workdir: config.json, checkpoints/, log.jsonl, events/ for TensorBoard, pictures/.
The same command again resumes it where it stopped, to the same numbers.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from knet_jax.cli.commandline import CommandLine, run
from knet_jax.config.files import (
    SAVED_NAME,
    check_resume,
    default_workdir,
    load_config,
    save_config,
)
from knet_jax.config.validation import validate
from knet_jax.data import pipeline
from knet_jax.data.prepared_split import Split
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
from knet_jax.system.signals import StopRequest, stop_when_asked
from knet_jax.tasks import TASKS
from knet_jax.training import optim, train_step
from knet_jax.training.evaluation import Evaluator, Gallery, lookahead
from knet_jax.training.logs import Log, Progress, plot_curves

CONFIG = flags.DEFINE_string("config", None, "configs/FILE.py or configs/FILE.py:variant,variant")
WORKDIR = flags.DEFINE_string("workdir", None, "where the run lives; default: runs/NAME_VARIANT")


def main(command: CommandLine) -> None:
    # The run.
    if CONFIG.value is None:
        raise UserError("--config is missing, such as --config configs/coco_panoptic.py")
    config = load_config(CONFIG.value, command.overrides)
    devices = jax.local_devices()
    if jax.process_count() > 1:
        raise UserError("several processes: a run has one, with all devices of its machine")
    validate(config, jax.device_count())
    task = TASKS[config.task]
    metric = task.metric
    jax.config.update("jax_default_matmul_precision", config.precision)
    keep_programs()
    workdir = Path(WORKDIR.value or default_workdir(CONFIG.value))
    check_writable(workdir)
    # As long as it is referred to.
    claim = lock(workdir, f"another run is using {workdir}; accepted: another --workdir")
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
    model = make_model(**config.model)
    variables = init_variables(model, config.seed)
    params, batch_stats = variables["params"], variables.get("batch_stats", {})
    optimizer, schedule = optim.make_optimizer(config.optim, params, steps_per_epoch, batch_size)
    ema_decay = config.train.ema_decay
    state = train_step.TrainState(
        jnp.zeros((), jnp.int32),
        params,
        batch_stats,
        optimizer.init(params),
        params if ema_decay else None,
    )
    take_step = train_step.make_train_step(
        devices,
        model=model,
        task=task,
        optimizer=optimizer,
        trainable=optim.trainable(config.optim.groups, params),
        weights=LossWeights(**config.loss),
        seed=config.seed,
        ema_decay=ema_decay,
    )

    share = batch_size // len(devices)
    parts = train_step.Parts(len(devices), min(share, config.train.microbatch))

    # Where it starts.
    checkpoints = Checkpoints(
        workdir / "checkpoints",
        keep=config.train.keep,
        metrics=headline_scores(config),
        model=config.model.to_dict(),
    )
    restored = checkpoints.restore_latest(state)
    if restored:
        state, record = restored
        class_lists.check_trained_classes(record["progress"]["categories"], split.categories)
        print(f"resuming from step {record['step']} of {workdir}")
        was = train_step.Parts(*record["progress"].get("parts", parts))
        if warning := train_step.explain_change(model, was, parts):
            print(warning)
    elif config.init_weights:
        loaded, origin = load_init_weights(config.init_weights, variables)
        state = state._replace(**loaded)
        print(origin)
    else:
        print("FROM SCRATCH: config.init_weights names no weights of a backbone")
    is_resumed = restored is not None
    if ema_decay and not is_resumed:
        state = state._replace(ema=jax.tree.map(jnp.copy, state.params))
    save_config(config, workdir)
    start = int(state.step)
    state = train_step.replicate(state, devices)
    count = sum(x.size for x in jax.tree.leaves(params))
    print(f"{count / 1e6:.1f} M parameters, {len(devices)} x {devices[0].device_kind}, {workdir}")
    print(optim.describe(config.optim, params, steps_per_epoch, total_steps, batch_size))
    # The state has what they held; a large network has no room for it twice.
    restored = loaded = variables = params = batch_stats = None

    # The loop: step, log, save, evaluate.
    log = Log(workdir, steps_per_epoch, start)
    progress = Progress(total_steps)
    score = partial(
        evaluate,
        evaluator=Evaluator(model, val_split, config, devices),
        checkpoints=checkpoints,
        num_pictures=config.eval.num_pictures,
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
    )
    num_parts = share // parts.num_images
    feed = lookahead((b.id, train_step.to_devices(b, devices, num_parts)) for b, _ in batches)
    unchecked = None

    def is_scored(step: int) -> bool:
        return step >= total_steps or is_due(step, config.train.eval_every)

    with checkpoints, closing(log), closing(progress), stop_when_asked() as stop:
        if is_resumed and is_scored(start) and checkpoints.scores(start) is None:
            score(start, state, stop)  # what the run was stopped in
        if start < total_steps:
            progress.print("compiling; the first step can take minutes")
        interval = Interval(batch_size)

        for step in range(start + 1, total_steps + 1):
            with interval.waiting():
                ids, batch = next(feed)
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
                values = interval.close() | optim.group_rates(config.optim, schedule, step - 1)
                log.scalars(step, values)
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

        scores = checkpoints.scores(max(start, total_steps))

    plot_curves(workdir)
    claim.close()
    print(
        f"done: {describe(scores, 'val', metric.HEADLINE)} in {workdir}; "
        f"evaluate it with: python eval.py --workdir {workdir}"
    )


def is_due(step: int, every: int) -> bool:
    """Whether something happens at a step; 0 is never."""
    return every > 0 and step % every == 0


def check_finite(done: Any, split: Split, checkpoints: Checkpoints) -> None:
    """Stops the run at a loss that is no number, before anything of it is saved."""
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


class Interval:
    """What the log says about the steps since its last record: means, speed, waiting for data."""

    def __init__(self, batch_size: int):
        self._batch_size = batch_size
        self._speed_before: dict[str, float] = {}
        self.restart()

    def restart(self) -> None:
        """Forgets what came before."""
        self._metrics: list[Mapping[str, jax.Array]] = []
        self._waited = 0.0
        self._began = time.monotonic()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Measures the wait for a batch."""
        began = time.monotonic()
        yield
        self._waited += time.monotonic() - began

    def add(self, metrics: Mapping[str, jax.Array]) -> None:
        """Takes the metrics of a step, which the device may still be computing."""
        self._metrics.append(metrics)

    def last(self) -> dict[str, Any]:
        """For the progress line; the loss is that of the last step which is surely done."""
        known = self._metrics[-2:][0]
        speed = self._speed()
        # Steps are handed to the device before they are done: a few of them seem fast.
        if len(self._metrics) < 5:
            speed |= self._speed_before
        return {"loss": known["loss/total"]} | speed

    def close(self) -> dict[str, float]:
        """The record of the interval, which ends here."""
        metrics = jax.device_get(self._metrics)
        means = {name: float(np.mean([m[name] for m in metrics])) for name in metrics[0]}
        self._speed_before = self._speed()
        self.restart()
        return means | self._speed_before

    def _speed(self) -> dict[str, float]:
        seconds = time.monotonic() - self._began
        rate = len(self._metrics) * self._batch_size / seconds
        return {"images_per_second": rate, "data_wait_share": self._waited / seconds}


def evaluate(
    step: int,
    state: train_step.TrainState,
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
        line = describe(scores, name, metric.HEADLINE)
        progress.print(f"step {step}: {line}{' (EMA)' if name != 'val' else ''}")
    log.scalars(step, scores)
    show(gallery, log, step, workdir)
    checkpoints.add_scores(step, scores)


def end_early(step: int, checkpoints: Checkpoints, stop: StopRequest) -> NoReturn:
    """Ends a run that was asked to stop, once the step is on disk."""
    checkpoints.wait()
    raise stop.end(f"stopped at step {step}, which is saved; the same command goes on")


def describe(scores: Mapping[str, float], prefix: str, names: Sequence[str]) -> str:
    """Some numbers of an evaluation in a line."""
    return ", ".join(f"{name} {scores[f'{prefix}/{name}']:.1f}" for name in names)


def show(gallery: Gallery, log: Log, step: int, workdir: Path) -> None:
    """Puts predicted pictures into TensorBoard and into the workdir."""
    if not gallery.rows:
        return
    panel = gallery.panel()
    log.images(step, {"val/pictures": panel})
    folder = workdir / "pictures"
    folder.mkdir(exist_ok=True)
    save_picture(folder / f"step_{step:07}.png", panel)


if __name__ == "__main__":
    run(main)
