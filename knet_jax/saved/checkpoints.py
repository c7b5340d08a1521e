"""The checkpoints of a run: written in the background, verified when read, safe to interrupt.

A step on disk is a folder of Orbax with two items: `state`, the arrays, and `record`, which has a
digest of each of them (see `checkpoint_record`), taken before anything was written. So whatever
happens to the files is noticed. The scores of a step, which come later, are a file beside the two.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict

from knet_jax.saved.checkpoint_record import (
    DamagedError,
    check_arrays,
    check_fit,
    check_record,
    leaf_paths,
    make_record,
    model_differences,
)
from knet_jax.system.errors import UserError, one_line
from knet_jax.system.library_logs import silenced
from knet_jax.system.output_files import write_json

SCORES_NAME = "scores.json"


def check_writable(folder: str | Path) -> None:
    """Creates a folder and a file in it, so that a run fails before it has cost anything.

    Raises:
        UserError: one of the two is not possible.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0")
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from error


class Checkpoints:
    """The last few steps of a run and the best ones.

    Only one thread may call the methods; `save` goes on in a thread of its own. Of several processes
    one has this to write, and all may read.

    Args:
        directory: where the steps are, a folder each.
        keep: how many of the latest steps stay; the best step of every metric stays too.
        metrics: names of scores by which a step is the best, the larger the better; `best_step` uses
            the first.
        model: `config.model` as a dict. It is saved with every step, so that it can be told in what
            another network differs.
        read_only: nothing is created, removed or moved.

    Raises:
        UserError: the folder cannot be written, or, if `read_only`, does not exist.
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
            raise UserError(f"no checkpoints: {self.directory} does not exist")
        if not read_only:
            check_writable(self.directory)
            # Orbax would do it in a thread that outlives `close` and fails while Python shuts down.
            for path in self.directory.glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*"):
                shutil.rmtree(path, ignore_errors=True)
        self._empty = set()
        for path in filter(Path.is_dir, self.directory.glob("[0-9]*")):
            if not any(path.iterdir()):
                print(f"checkpoint {path} is empty", file=sys.stderr, flush=True)
                if read_only:
                    self._empty.add(path.name)
                else:  # Orbax would refuse to save the step
                    path.rmdir()
        self._manager = self._open()
        # Not as Orbax's own metrics: a damaged file of these keeps its manager from opening.
        self._scores: dict[int, dict[str, float]] = {}
        for step in self.steps():
            with suppress(OSError, ValueError):  # damaged or missing: the step was not evaluated
                record = json.loads(self._scores_path(step).read_bytes())
                check_record(record, step)
                self._scores[step] = record["scores"]

    def _open(self) -> ocp.CheckpointManager:
        # Every process reads or writes alone, whatever the others do meanwhile.
        process = jax.process_index()
        alone = ocp.options.MultiprocessingOptions(
            primary_host=process,
            active_processes={process},
            barrier_sync_key_prefix=f"process{process}",
        )
        with silenced("orbax"):  # its remarks about options set on purpose
            options = ocp.CheckpointManagerOptions(
                create=False,
                read_only=self._read_only,
                enable_async_checkpointing=False,  # a thread of ours does it, digests included
                multiprocessing_options=alone,
            )
            return ocp.CheckpointManager(self.directory, options=options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Closes. If an error is on its way already, a failed save is only printed."""
        try:
            self.close()
        except UserError as failure:
            if error is None:
                raise
            print(failure, file=sys.stderr, flush=True)

    # Writing.

    def save(self, step: int, state: Any, progress: Mapping[str, Any]) -> None:
        """Copies a state to the host and writes it in the background.

        Returns as soon as the state may be donated. Waits for the previous save if it is not done.

        Args:
            step: the number of training steps done. A step that is saved already stays as it is.
            state: a pytree of arrays.
            progress: what else to keep, in JSON: examples seen, categories.

        Raises:
            UserError: the previous save failed, for example on a full disk.
        """
        self.wait()
        latest = self._manager.latest_step()
        if step == latest:
            return
        assert latest is None or step > latest, (step, latest)
        fields = {"step": step, "progress": dict(progress), "model": self._model}
        fields = json.loads(json.dumps(fields))  # a copy, and an error here rather than later
        # Copies share no memory with what the next step overwrites.
        leaves = [np.array(leaf, order="C") for leaf in jax.tree.leaves(jax.device_get(state))]
        arrays = dict(zip(leaf_paths(state), leaves))
        self._pending = self._executor.submit(self._write, arrays, fields)

    def _write(self, arrays: dict[str, np.ndarray], fields: dict[str, Any]) -> None:
        step = fields["step"]
        args = ocp.args.Composite(
            state=ocp.args.PyTreeSave(unflatten_dict(arrays, sep="/")),
            record=ocp.args.JsonSave(make_record(arrays, **fields)),
        )
        try:
            with silenced("orbax"):
                self._manager.save(step, args=args)
                best = set(map(self._best_by, self._metrics))
                for old in set(self.steps()[: -self._keep]) - best:
                    self._manager.delete(old)
        except Exception as error:
            reason = _explain_disk_error(error, self.directory)
            if reason is None:
                raise
            size = sum(array.nbytes for array in arrays.values()) / 2**20
            intact = [f"{s}" for s in self.steps() if s != step]
            raise UserError(
                f"checkpoint of step {step} ({size:.0f} MiB) cannot be written to "
                f"{self.directory}: {reason}; on disk: {', '.join(intact) or 'none'}"
            ) from error

    def add_scores(self, step: int, scores: Mapping[str, float]) -> None:
        """Adds the scores of an evaluation, by name, to a saved step, once that is on disk.

        Raises:
            UserError: the save failed.
        """
        self.wait()
        self._scores[step] = {name: float(value) for name, value in scores.items()}
        record = make_record({}, step=step, scores=self._scores[step])
        write_json(self._scores_path(step), record)

    def _scores_path(self, step: int) -> Path:
        return self.directory / str(step) / SCORES_NAME

    def wait(self) -> None:
        """Waits until the last save is on disk, and raises its error if it failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Waits for the last save and releases the folder."""
        try:
            self.wait()
        finally:
            self._executor.shutdown()
            self._manager.close()

    # Reading.

    def steps(self) -> list[int]:
        """The steps on disk, damaged ones included, empty ones not, in ascending order."""
        return sorted(step for step in self._manager.all_steps() if str(step) not in self._empty)

    def scores(self, step: int) -> dict[str, float] | None:
        """The scores of a step, or None if no evaluation of it has come to its end."""
        return self._scores.get(step)

    def best_step(self) -> int | None:
        """The step with the largest first metric, or None if no step has been evaluated."""
        return self._best_by(self._metrics[0])

    def _best_by(self, metric: str) -> int | None:
        values = ((self._scores.get(step, {}).get(metric), step) for step in self.steps())
        known = [pair for pair in values if pair[0] is not None and math.isfinite(pair[0])]
        return max(known)[1] if known else None

    def restore_latest(self, target: Any) -> tuple[Any, dict[str, Any]] | None:
        """Reads the newest step that is whole.

        A damaged step is reported on stderr and, unless `read_only`, moved to `damaged/`, so that
        the step can be saved again.

        Args:
            target: see `restore`.

        Returns:
            What `restore` returns, or None if there is no step at all.

        Raises:
            UserError: every step is damaged, or the state does not fit.
        """
        damages: dict[int, DamagedError] = {}
        for step in reversed(self.steps()):
            try:
                restored = self.restore(target, step)
            except DamagedError as error:
                damages[step] = error
                continue
            for error in damages.values():
                print(f"{error}; going back to step {step}", file=sys.stderr, flush=True)
            if damages and not self._read_only:
                self.set_aside(damages)
            return restored
        if damages:
            raise UserError(
                f"no checkpoint in {self.directory} is whole: {'; '.join(map(str, damages.values()))}"
            )
        return None

    def saved_shapes(self, step: int) -> dict[str, Any] | None:
        """Shapes of the state of a step, as a target for `restore`: a dict of dicts.

        Returns:
            None if the step was saved with another `model` or without one. A target made of the
            network then shows in what they differ.

        Raises:
            UserError: see `restore`.
        """
        with self._naming(step):
            record = self._read_record(step)
            differences = model_differences(record, self._model).keys() - {"dtype"}
            if differences or not record["model"]:
                return None
            shapes = {
                path: jax.ShapeDtypeStruct(tuple(saved["shape"]), saved["dtype"])
                for path, saved in record["arrays"].items()
            }
            return unflatten_dict(shapes, sep="/")

    def restore(self, target: Any, step: int) -> tuple[Any, dict[str, Any]]:
        """Reads the arrays of a step, bit for bit as they were saved.

        Args:
            target: a pytree of arrays or shapes, the saved state or whole parts of it: a dict of
                `params` and `batch_stats` is read without the optimizer's state.
            step: one of `steps()`.

        Returns:
            The arrays, of numpy, in the structure of `target`, and the record: `step`, `progress`.

        Raises:
            DamagedError: files are missing, or their content is not what was saved.
            UserError: there is no such step, or the saved state does not fit `target`.
        """
        wanted = dict(zip(leaf_paths(target), jax.tree.leaves(target)))
        with self._naming(step):
            record = self._read_record(step)
            check_fit(wanted, record, self._model)
            arrays = self._read_arrays(step, wanted)
            check_arrays(arrays, record)
        leaves = [arrays[path] for path in wanted]
        return jax.tree.unflatten(jax.tree.structure(target), leaves), record

    @contextmanager
    def _naming(self, step: int) -> Iterator[None]:
        """Puts the name of a checkpoint before what is wrong with it.

        Damaged files make the readers raise anything; but a folder without permission is whole.
        """
        if step not in self.steps():
            have = ", ".join(map(str, self.steps())) or "none"
            raise UserError(f"no checkpoint of step {step} in {self.directory}; have: {have}")
        where = f"checkpoint {self.directory / str(step)}"
        try:
            with silenced("orbax"):
                yield
        except PermissionError:
            raise
        except DamagedError as error:
            raise DamagedError(f"{where} is damaged: {error}") from error
        except UserError as error:
            raise UserError(f"{where} does not fit this network: {error}") from error
        except Exception as error:
            line = one_line(error) or type(error).__name__
            raise DamagedError(f"{where} is damaged: {line:.300}") from error

    def _read_record(self, step: int) -> dict[str, Any]:
        args = ocp.args.Composite(record=ocp.args.JsonRestore())
        record = self._manager.restore(step, args=args).record
        check_record(record, step)
        return record

    def _read_arrays(self, step: int, wanted: Mapping[str, Any]) -> dict[str, np.ndarray]:
        item = {path: np.empty(leaf.shape, leaf.dtype) for path, leaf in wanted.items()}
        item = unflatten_dict(item, sep="/")
        restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
        args = ocp.args.PyTreeRestore(item, restore_args=restore_args, partial_restore=True)
        state = self._manager.restore(step, args=ocp.args.Composite(state=args)).state
        return flatten_dict(state, sep="/")

    def set_aside(self, steps: Iterable[int]) -> None:
        """Moves steps that are of no use to `damaged/`, since Orbax would refuse to save them again."""
        self._manager.close()
        folder = self.directory / "damaged"
        folder.mkdir(exist_ok=True)
        for step in steps:
            self._scores.pop(step, None)
            place = folder / str(step)
            shutil.rmtree(place, ignore_errors=True)
            (self.directory / str(step)).rename(place)
        self._manager = self._open()


def _explain_disk_error(error: Exception, directory: Path) -> str | None:
    """What is wrong with the disk, or None if the error is about something else.

    Orbax raises ValueError and the like, with the system's message inside.
    """
    text = f"{error} {error.__cause__ or ''}"
    for message in ("No space left on device", "Disk quota exceeded", "File too large"):
        if message.lower() in text.lower():
            return message[0].lower() + message[1:]
    return None if directory.is_dir() else "the folder has been removed"
