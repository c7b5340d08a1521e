"""From a config to batches: the only place that knows file formats.

The order of a run is a function of the seed and of the number of examples seen: nothing else need
be saved to go on exactly. Workers take whole batches in turn, so their number changes nothing.
"""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import logging
import math
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import cv2
import grain
import jax
import numpy as np
from absl import flags

from knet_jax.data import batches, prepared_split, recipes, records, sampler
from knet_jax.data.sources import by_name
from knet_jax.structs import EMPTY, Batch
from knet_jax.system.errors import UserError
from knet_jax.system.library_logs import silenced

LEAST_SEEN = 500
"""A share of broken pictures is judged as if at least so many had been seen."""
ENDLESS = 1 << 48
"""More batches than any training takes."""
QUIET = "ignore:resource_tracker:UserWarning"
"""A filter of warnings for Python's cleaner of shared memory."""

GROUP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
"""What schedulers and terminals send to the whole group; the parent decides when workers end."""

log = logging.getLogger(__name__)


def prepare(config_data, split: str, task: str) -> Path:
    """Converts a split to ArrayRecord, unless that has been done, and prints what it holds.

    A split that is interrupted half-way is never taken for whole: TFDS writes to a directory of
    another name (test_killed_preparation_starts_anew).

    Args:
        config_data: `config.data`.
        split: a name, or a slice of one.
        task: `config.task`, which decides the kind of annotation.

    Returns:
        the directory of the prepared split.

    Raises:
        ValueError: the dataset cannot be found or understood.
    """
    name = prepared_split.split_name(split)
    builder_class, builder_config = by_name.find(config_data, name, task)
    data_dir = by_name.data_dir(config_data)
    version = str(builder_class.VERSION)
    directory = data_dir / builder_class.name / builder_config.name / version
    if directory.exists():
        print(f"{name}: prepared already in {directory} (remove it to prepare anew)", flush=True)
        return directory
    try:
        # TFDS speaks of downloads and configs; bars and what we log ourselves stay.
        with silenced("tensorflow_datasets"), contextlib.redirect_stdout(io.StringIO()):
            builder = builder_class(config=builder_config, data_dir=data_dir)
            builder.download_and_prepare(file_format="array_record")
    except (OSError, RuntimeError) as error:  # array_record raises the latter on a full disk
        if directory.exists():
            # Another process has prepared the same split meanwhile.
            return directory
        raise UserError(
            f"config.data.data_dir: split '{name}' cannot be written to '{data_dir}': {error}"
        ) from error
    print(f"{name}: prepared in {directory}", flush=True)
    print(records.describe(builder.info.metadata), flush=True)
    return directory


def load_split(config_data, split: str, task: str) -> prepared_split.Split:
    """Opens a split, prepared if need be. Raises ValueError as `prepare` does."""
    return prepared_split.Split(prepare(config_data, split, task), split)


def steps_per_epoch(split: prepared_split.Split, config_data, batch_size: int) -> int:
    """How many training batches show every picture of a split once."""
    groups = split.kind.recipe(config_data).groups(split.sizes, split.num_things)
    return sampler.EpochSampler(groups, batch_size, seed=0).batches_per_epoch


def train_batches(
    split: prepared_split.Split,
    config_data,
    batch_size: int,
    seed: int,
    start: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[tuple[Batch, tuple[str, ...]]]:
    """Batches without end, augmented, each on one canvas.

    Args:
        split: what to train on.
        config_data: `config.data`.
        batch_size: of all processes together.
        seed: of order and augmentation.
        start: how many examples (of all processes) have been seen before.
        process_index: which rows of every batch are wanted.
        process_count: how many processes share a batch.

    Yields:
        (batch with batch_size / process_count rows, names of the files that were broken and
        replaced in it).

    Raises:
        ValueError: the sizes do not agree, or too many pictures are broken.
    """
    recipe = split.kind.recipe(config_data)
    rows = _process_rows(batch_size, process_index, process_count)
    if start % batch_size:
        raise UserError(
            f"{start} examples have been seen, which config.train.batch_size {batch_size} does not "
            "divide: only such a batch size can go on from here"
        )
    if seed < 0:
        raise UserError(f"config.seed {seed} must not be negative")
    crowded = int(np.sum(split.num_things > recipe.max_things))
    if crowded:
        log.warning(
            "%d of %d pictures have more than config.data.max_things = %d things (up to %d): "
            "the largest stay",
            crowded,
            len(split),
            recipe.max_things,
            split.num_things.max(),
        )
    groups = recipe.groups(split.sizes, split.num_things)
    epochs = sampler.EpochSampler(groups, batch_size, seed)
    make = functools.partial(batches.train_batch, split, recipe, epochs, rows)
    dataset = grain.MapDataset.range(start // batch_size, ENDLESS).map(make)
    largest = max(map(recipe.train_canvas, range(len(groups))), key=math.prod)
    one = batches.empty_train_batch(split, recipe, 1, largest)
    results = _results(dataset, recipe, (rows.stop - rows.start) * _num_bytes(one))
    return ((batch, tuple(f.file_name for f in failures)) for (batch,), _, failures in results)


def eval_batches(
    split: prepared_split.Split,
    config_data,
    batch_size: int,
    limit: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
    ratios: Sequence[float] = (1.0,),
) -> Iterator[tuple[tuple[Batch, ...], list[tuple[int, Any]]]]:
    """Every picture once, not augmented, grouped by the canvas, flat ones first.

    The last batch of a canvas is filled up with empty images, id `EMPTY`; a broken picture becomes
    one, too.

    Args:
        split: what to evaluate on.
        config_data: `config.data`.
        batch_size: of all processes together.
        limit: only the first so many pictures of the split.
        process_index: which rows of every batch are wanted.
        process_count: how many processes share a batch.
        ratios: pictures are so many times as large.

    Yields:
        (the same pictures at every ratio, batches with batch_size / process_count rows and without
        targets; [(id, truth at original size)] of the images that are not empty; the truth is what
        `Split.truth` returns).

    Raises:
        ValueError: the sizes do not agree, or too many pictures are broken.
    """
    recipe = split.kind.recipe(config_data)
    rows = _process_rows(batch_size, process_index, process_count)
    scaled = recipes.at_ratios(recipe, ratios)
    sizes = [tuple(size) for size in split.sizes[:limit].tolist()]
    canvases = np.array([recipe.eval_canvas(size) for size in sizes])
    chunks = []
    for canvas in np.unique(canvases, axis=0):
        [group] = np.nonzero((canvases == canvas).all(1))
        padded = np.pad(group, (0, -len(group) % batch_size), constant_values=EMPTY)
        for positions in padded.reshape(-1, batch_size):
            real = [sizes[i] for i in positions if i != EMPTY]
            fits = np.max([[s.eval_canvas(size) for s in scaled] for size in real], axis=0)
            chunks.append(batches.Chunk(positions[rows], tuple(map(tuple, fits.tolist()))))
    make = functools.partial(batches.eval_batch, split, scaled)
    largest = max((chunk.canvases for chunk in chunks), key=lambda c: sum(map(math.prod, c)))
    needed = _num_bytes(canvas.empty_eval_batches(rows.stop - rows.start, largest))
    results = _results(grain.MapDataset.source(chunks).map(make), recipe, needed)
    # Arrays of a worker lie in shared memory, each an open file. A batch is soon gone, but truths
    # may be kept for long. (A pipe is no way out: Grain waits 25 s for a worker that is stopped
    # while it writes something large.)
    return ((scales, jax.tree.map(_own, truths)) for scales, truths, _ in results)


def _num_bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def _own(leaf: Any) -> Any:
    """A leaf of a truth, in memory of this process."""
    return np.array(leaf) if isinstance(leaf, np.ndarray) else leaf


def _process_rows(batch_size: int, process_index: int, process_count: int) -> slice:
    if batch_size < 1 or batch_size % process_count:
        raise UserError(
            f"config.train.batch_size {batch_size} must be a multiple of the "
            f"{process_count} processes"
        )
    share = batch_size // process_count
    return slice(process_index * share, (process_index + 1) * share)


def _results(
    dataset: grain.MapDataset, recipe: Any, num_bytes: int
) -> Iterator[tuple[tuple[Batch, ...], list, list[batches.Failure]]]:
    """Computes the elements of a dataset in the workers, in order, and watches for failures.

    num_bytes: of the largest batches of an element.
    """
    if not flags.FLAGS.is_parsed():
        # Grain reads flags of its own; without absl's `app.run` nobody has parsed them.
        flags.FLAGS.mark_as_parsed()
    if recipe.num_workers:
        _check_shared_memory(recipe, num_bytes)
        # Python's cleaner removes at the end what Grain still had ready, and need not call it a leak.
        if QUIET not in sys.warnoptions:
            sys.warnoptions.append(QUIET)
    # Grain's default would hold 500 batches.
    elements = dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    workers = grain.MultiprocessingOptions(num_workers=recipe.num_workers)
    iterator = iter(elements.mp_prefetch(workers, worker_init_fn=_start_worker))
    seen, broken, named = 0, 0, set()
    try:
        with _group_signals_blocked() if recipe.num_workers else contextlib.nullcontext():
            first = list(itertools.islice(iterator, 1))
        for scales, truths, failures in itertools.chain(first, iterator):
            seen += int(np.sum(scales[0].id != EMPTY)) + len(failures)
            broken += len(failures)
            for failure in failures:
                if failure.file_name not in named:
                    named.add(failure.file_name)
                    log.warning("broken picture %s: %s", failure.file_name, failure.reason)
            if broken > recipe.max_broken_share * max(seen, LEAST_SEEN):
                raise UserError(
                    f"{broken} of {seen} pictures are broken, more than "
                    f"config.data.max_broken_share = {recipe.max_broken_share} allows: "
                    + ", ".join(sorted(named)[:10])
                )
            yield scales, truths, failures
    finally:
        iterator.close()


@contextlib.contextmanager
def _group_signals_blocked() -> Iterator[None]:
    """For workers that start inside: what is blocked here is so in them, and a signal to the whole
    group does not end one before it has come to `_start_worker`. Other threads hear it meanwhile."""
    resource_tracker.ensure_running()  # its own start would unblock them
    before = signal.pthread_sigmask(signal.SIG_BLOCK, GROUP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(index: int, count: int) -> None:
    del index, count
    # The workers are the parallelism.
    cv2.setNumThreads(0)
    for signum in GROUP_SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Ends a worker whose parent was killed; it would wait for it, and hold its memory, for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _check_shared_memory(recipe: Any, num_bytes: int) -> None:
    """Raises ValueError where the workers' batches would not fit; Linux would kill them."""
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return
    # Each worker fills one batch while another waits; two more are in use at the other end.
    held = 2 * recipe.num_workers + 2
    needed = held * num_bytes
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"config.data.num_workers {recipe.num_workers} need {needed >> 20} MiB in {folder}, "
            f"which has {free >> 20} MiB free: enlarge it (docker run --shm-size), or set 0 workers"
        )
