"""Checkpoints that are written behind the training loop, verified when read, and safe to interrupt.

A step on disk is an Orbax folder of two items, the `state` and the `record` of `snapshot.py`. Its
digests are those of the values that trained, so whatever happens to the files is seen. The scores of
a step, which come later than its state, are a file beside the two.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict

from knet_jax.saved.checkpoint_record import (
    CheckpointError,
    DamagedError,
    check_arrays,
    check_fit,
    check_record,
    copy_to_host,
    leaf_paths,
    make_record,
    network_code,
    saved_shapes,
)
from knet_jax.system.library_logs import silenced
from knet_jax.system.output_files import write_json

SCORES_NAME = "scores.json"


def check_writable(workdir: str | Path) -> None:
    """Creates the workdir and a file in it, so that a run fails before it has cost anything.

    Raises:
      CheckpointError: one of the two is not possible.
    """
    try:
        Path(workdir).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workdir) as file:
            file.write(b"0")
    except OSError as error:
        raise CheckpointError(f"cannot write to {workdir}: {error.strerror}") from error


class Checkpoints:
    """The checkpoints of a run: the last few and the best.

    Only the loop's thread may call the methods; `save` works on in one of its own. Process 0 writes,
    every process reads.

    Args:
      directory: one folder a step is made here.
      keep: how many of the latest steps stay; the best of every metric stays too.
      metrics: names of scores by which a step is the best, the larger the better; `best_step` goes by
        the first.
      model: `config.model` as a dict, kept with every step: it tells whether the saved network is
        this one, and in what it is not.
      read_only: for evaluation: nothing is created, cleaned or moved.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        keep: int = 3,
        metrics: Sequence[str] = ("val/PQ",),
        model: Mapping[str, Any] | None = None,
        read_only: bool = False,
    ):
        self.directory = Path(directory).absolute()
        self._metrics = tuple(metrics)
        self._model = dict(model or {})
        self._read_only = read_only
        self._executor = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None
        self._keep = keep
        if read_only and not self.directory.is_dir():
            raise CheckpointError(f"no checkpoints: {self.directory} does not exist")
        if not read_only:
            check_writable(self.directory)
            self._remove_unfinished()
        self._manager = self._open()
        # Not as Orbax's own metrics: a damaged file of these keeps its manager from opening.
        self._scores: dict[int, dict[str, float]] = {}
        for step in self.steps():
            with suppress(OSError, ValueError):  # damaged or missing: the step was not evaluated
                record = json.loads(self._scores_path(step).read_bytes())
                check_record(record)
                self._scores[step] = record["scores"]

    def _open(self) -> ocp.CheckpointManager:
        # One process alone reads or writes, whatever the others do meanwhile.
        process = jax.process_index()
        alone = ocp.options.MultiprocessingOptions(
            primary_host=process,
            active_processes={process},
            barrier_sync_key_prefix=f"process{process}",
        )
        with silenced("orbax"):  # its remarks about options set on purpose
            options = ocp.CheckpointManagerOptions(
                preservation_policy=_LatestAndBest(self._keep, self._best_steps),
                create=False,
                read_only=self._read_only,
                enable_async_checkpointing=False,  # a thread of ours does it, digests included
                multiprocessing_options=alone,
            )
            return ocp.CheckpointManager(self.directory, options=options)

    def _remove_unfinished(self) -> None:
        # Orbax would do it in a thread that outlives `close` and fails while Python shuts down.
        if jax.process_index() == 0:
            for path in self.directory.glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*"):
                shutil.rmtree(path, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Closes; on the way out with an error, which speaks first, a failed save is only told."""
        try:
            self.close()
        except CheckpointError as failure:
            if error is None:
                raise
            print(failure, file=sys.stderr, flush=True)

    # Writing.

    def save(self, step: int, state: Any, progress: Mapping[str, Any]) -> None:
        """Copies the state to the host and writes it in the background.

        Returns as soon as the state may be donated. Waits for the previous save if it is not done.

        Args:
          step: training steps done, never less than before; a step that is saved stays as it is.
          state: a pytree of arrays.
          progress: whatever JSON holds: examples seen, class counts, categories.

        Raises:
          CheckpointError: the previous save failed, such as on a full disk.
        """
        self.wait()
        latest = self._manager.latest_step()
        if step == latest or jax.process_index() != 0:
            return
        assert latest is None or step > latest, (step, latest)
        fields = {"step": step, "progress": dict(progress)}
        fields |= {"model": self._model, "code": network_code()}
        fields = json.loads(json.dumps(fields))  # a copy, and an error here rather than later
        self._pending = self._executor.submit(self._write, copy_to_host(state), fields)

    def _write(self, arrays: dict[str, np.ndarray], fields: dict[str, Any]) -> None:
        step, record = fields["step"], make_record(arrays, **fields)
        # Orbax refuses arrays without elements; their description is all there is to them.
        state = unflatten_dict({path: a for path, a in arrays.items() if a.size}, sep="/")
        args = ocp.args.Composite(
            state=ocp.args.PyTreeSave(state), record=ocp.args.JsonSave(record)
        )
        try:
            with silenced("orbax"):
                self._manager.save(step, args=args)
        except Exception as error:
            reason = _disk_trouble(error, self.directory)
            if reason is None:
                raise
            size = sum(array.nbytes for array in arrays.values()) / 2**20
            intact = [f"{s}" for s in self._manager.all_steps() if s != step]
            raise CheckpointError(
                f"checkpoint of step {step} ({size:.0f} MiB) cannot be written to "
                f"{self.directory}: {reason}; on disk: {', '.join(intact) or 'none'}"
            ) from error

    def add_scores(self, step: int, scores: Mapping[str, float]) -> None:
        """Notes what an evaluation of a step gave, once the step is on disk.

        Args:
          step: that has been saved.
          scores: numbers by the names of their plots, that of the metric among them.

        Raises:
          CheckpointError: the save failed.
        """
        self.wait()
        self._scores[step] = {name: float(value) for name, value in scores.items()}
        if jax.process_index() == 0:
            record = make_record({}, step=step, scores=self._scores[step])
            write_json(self._scores_path(step), record)

    def _scores_path(self, step: int) -> Path:
        return self.directory / str(step) / SCORES_NAME

    def raise_if_failed(self) -> None:
        """Raises the error of a save that has failed meanwhile; costs nothing, never waits."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Waits until the last save is on disk, and raises its error if it failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Waits for the last save and lets go of the folder."""
        try:
            self.wait()
        finally:
            self._executor.shutdown()
            self._manager.close()

    # Reading.

    def steps(self) -> list[int]:
        """Steps on disk, in ascending order, damaged or not."""
        return sorted(self._manager.all_steps())

    def scores(self, step: int) -> dict[str, float] | None:
        """What the evaluation of a step gave, None where there was none that came to its end."""
        return self._scores.get(step)

    def best_step(self) -> int | None:
        """The step with the largest first metric among those that were evaluated."""
        return self._best_by(self._metrics[0])

    def _best_steps(self) -> set[int]:
        return {step for step in map(self._best_by, self._metrics) if step is not None}

    def _best_by(self, metric: str) -> int | None:
        values = ((self._scores.get(step, {}).get(metric), step) for step in self.steps())
        known = [pair for pair in values if pair[0] is not None and math.isfinite(pair[0])]
        return max(known)[1] if known else None

    def restore_latest(self, target: Any) -> tuple[Any, dict[str, Any]] | None:
        """The newest step that is whole, or None where there is no step at all.

        A damaged step is reported on stderr and, unless `read_only`, moved to `damaged/`, so that
        the step can be saved again.

        Raises:
          CheckpointError: every step is damaged, or the state does not fit.
        """
        steps = self.steps()
        damages = []
        for step in reversed(steps):
            try:
                restored = self.restore(target, step)
            except DamagedError as error:
                damages.append((step, error))
                continue
            for _, error in damages:
                print(f"{error}; going back to step {step}", file=sys.stderr, flush=True)
            if damages and not self._read_only:
                self._set_aside([step for step, _ in damages])
            return restored
        if damages:
            raise CheckpointError(
                f"no checkpoint in {self.directory} is whole: "
                + "; ".join(str(error) for _, error in damages)
            )
        return None

    def shapes(self, step: int) -> dict[str, Any] | None:
        """Shapes of the state of a step, a dict of dicts, as a target for `restore`.

        Returns:
          None where the step holds another network, or one of other code: a target made of the
          network then tells in what they differ.

        Raises:
          CheckpointError: as `restore`.
        """
        with self._naming(step):
            return saved_shapes(self._read_record(step), self._model)

    def check(self, target: Any, step: int) -> dict[str, Any]:
        """The record of a step: `step`, `progress`. Its arrays are not read.

        Args and errors as of `restore`.
        """
        wanted = dict(zip(leaf_paths(target), jax.tree.leaves(target)))
        with self._naming(step):
            record = self._read_record(step)
            check_fit(wanted, record, self._model)
        return record

    def restore(self, target: Any, step: int) -> tuple[Any, dict[str, Any]]:
        """The arrays that `target` asks for, of numpy, bit for bit as they were saved.

        Args:
          target: a pytree of arrays or shapes, the saved state or a part of it: a dict with only
            `params` and `batch_stats` is read without the optimizer's state.
          step: one of `steps()`.

        Returns:
          The arrays, in the structure of `target`, and the record: `step`, `progress`.

        Raises:
          DamagedError: files are missing, or their content is not what was saved.
          CheckpointError: there is no such step, or the saved state does not fit `target`.
        """
        record = self.check(target, step)
        leaves, treedef = jax.tree.flatten(target)
        shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
        wanted = dict(zip(leaf_paths(target), shapes))
        with self._naming(step):
            arrays = self._read_arrays(step, wanted)
            check_arrays(arrays, record)
        restored = [
            arrays.get(path, np.empty(leaf.shape, leaf.dtype)) for path, leaf in wanted.items()
        ]
        return jax.tree.unflatten(treedef, restored), record

    @contextmanager
    def _naming(self, step: int) -> Iterator[None]:
        """Puts the name of the checkpoint before what is wrong with it.

        Damaged files make the readers raise anything; but a folder without permission is whole.
        """
        if step not in self.steps():
            have = ", ".join(map(str, self.steps())) or "none"
            raise CheckpointError(f"no checkpoint of step {step} in {self.directory}; have: {have}")
        where = f"checkpoint {self.directory / str(step)}"
        try:
            with silenced("orbax"):
                yield
        except PermissionError:
            raise
        except DamagedError as error:
            raise DamagedError(f"{where} is damaged: {error}") from error
        except CheckpointError as error:
            raise CheckpointError(f"{where} does not fit this network: {error}") from error
        except Exception as error:
            line = (str(error).splitlines() or [type(error).__name__])[0]
            raise DamagedError(f"{where} is damaged: {line[:300]}") from error

    def _read_record(self, step: int) -> dict[str, Any]:
        args = ocp.args.Composite(record=ocp.args.JsonRestore())
        record = self._manager.restore(step, args=args).record
        check_record(record)
        return record

    def _read_arrays(self, step: int, wanted: Mapping[str, Any]) -> dict[str, np.ndarray]:
        item = {
            path: np.empty(leaf.shape, leaf.dtype) for path, leaf in wanted.items() if leaf.size
        }
        item = unflatten_dict(item, sep="/")
        restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
        args = ocp.args.PyTreeRestore(item, restore_args=restore_args, partial_restore=True)
        state = self._manager.restore(step, args=ocp.args.Composite(state=args)).state
        return flatten_dict(state, sep="/")

    def _set_aside(self, steps: list[int]) -> None:
        """Moves damaged steps out of the way; Orbax would refuse to save them again."""
        if jax.process_index() == 0:
            self._manager.close()
            folder = self.directory / "damaged"
            folder.mkdir(exist_ok=True)
            for step in steps:
                self._scores.pop(step, None)
                place = folder / str(step)
                shutil.rmtree(place, ignore_errors=True)
                (self.directory / str(step)).rename(place)
        self._manager = self._open()


class _LatestAndBest:
    """Which steps Orbax keeps: the last `num_latest`, and the best ones."""

    def __init__(self, num_latest: int, best_steps: Callable[[], set[int]]):
        self._num_latest = num_latest
        self._best_steps = best_steps

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """See `orbax.checkpoint.checkpoint_managers.PreservationPolicy`."""
        del context
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = self._best_steps() | set(sorted(steps)[-self._num_latest :])
        return [step in kept for step in steps]


def _disk_trouble(error: Exception, directory: Path) -> str | None:
    """What is wrong with the disk, None if the error is about something else.

    The storage library raises ValueError and the like, with the system's message inside.
    """
    text = f"{error} {error.__cause__ or ''}".lower()
    messages = (
        "No space left on device",
        "Disk quota exceeded",
        "File too large",
        "Permission denied",
        "Read-only file system",
        "Input/output error",
    )
    for message in messages:
        if message.lower() in text:
            return message[0].lower() + message[1:]
    if not directory.is_dir():
        return "the folder has been removed"
    return None
