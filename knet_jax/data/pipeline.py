"""From a config to batches: opens splits, and runs the worker processes that make batches.

The order of a run is a function of the seed and of the number of examples seen: nothing else need
be saved to go on exactly. Workers take whole batches in turn, so their number changes nothing.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import cv2
import grain
import jax
import numpy as np
from absl import flags

from knet_jax.data import batches, prepared_split, recipes, records, sampler, shards
from knet_jax.data.prepared_split import Split
from knet_jax.data.sources import by_name
from knet_jax.inference.multiscale import Pair, corners
from knet_jax.structs import EMPTY, Batch
from knet_jax.system import processes, shared_memory, workers
from knet_jax.system.errors import UserError

LEAST = 500
"""A share of broken pictures is judged as if there were at least so many pictures."""
ENDLESS = 1 << 48
"""Batches of the dataset that a training reads: more than any will take."""

log = logging.getLogger(__name__)


def load_split(
    config_data,
    split: str,
    task: str,
    describe: bool = False,
    write: shards.Write | None = None,
) -> Split:
    """Opens a split, and converts it to ArrayRecord before if that has not been done.

    Of several processes, the main one does so first; others then find it done, or do it on their disk.

    Args:
        config_data: `config.data`.
        split: a name, or a slice of one such as `train[:8]`.
        task: `config.task`, which decides the kind of annotation.
        describe: prints what it holds, which otherwise is done only where it is new.
        write: how a new one is written, as of `prepared_split.prepare`.

    Raises:
        UserError: the dataset cannot be found, understood or written, or other processes have another.
    """
    with processes.main_first():
        source = by_name.find(config_data, prepared_split.split_name(split), task)
        directory, is_new = prepared_split.prepare(source, records.data_dir(config_data), write)
    with processes.together():
        found = Split(directory, split)
    processes.check_same({f"split '{split}'": found.facts()})
    if is_new or describe:
        print(found.description, flush=True)
    return found


def steps_per_epoch(split: Split, config_data, batch_size: int) -> int:
    """How many training batches show every picture of a split once."""
    groups = recipes.find(split.task, config_data).groups(split)
    return sampler.EpochSampler(groups, batch_size, seed=0).batches_per_epoch


def train_batches(
    split: Split,
    config_data,
    batch_size: int,
    seed: int,
    start: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Batches without end, augmented.

    Args:
        split: what to train on.
        config_data: `config.data`.
        batch_size: pictures in a batch, of all processes together.
        seed: of order and augmentation.
        start: how many examples (of all processes) have been seen before, whole batches.
        process_index: which share of every batch this process wants.
        process_count: how many processes share a batch.

    Yields:
        a batch with batch_size / process_count rows.

    Raises:
        UserError: too many pictures are broken.
    """
    recipe = recipes.find(split.task, config_data)
    share = batch_size // process_count
    rows = slice(process_index * share, (process_index + 1) * share)
    overfull = int(np.sum(split.num_things > recipe.max_things))
    if overfull:
        log.warning(
            "%d of %d pictures have more than config.data.max_things = %d things (up to %d): "
            "the largest stay",
            overfull,
            len(split.num_things),
            recipe.max_things,
            split.num_things.max(),
        )
    epochs = sampler.EpochSampler(recipe.groups(split), batch_size, seed)
    make = functools.partial(batches.train_batch, split, recipe, epochs, rows)
    dataset = grain.MapDataset.range(start // batch_size, ENDLESS).map(make)
    results = _run_workers(dataset, recipe, len(split.sizes))
    return (batch for (batch,), _, _ in results)


def eval_batches(
    split: Split,
    config_data,
    batch_size: int,
    limit: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
    ratios: Sequence[float] = (1.0,),
    window: Pair | tuple[()] = (),
    step: Pair | tuple[()] = (),
) -> Iterator[tuple[tuple[Batch, ...], list[tuple[int, Any]]]]:
    """Every picture once, not augmented, grouped by the canvas, flat ones first.

    The last batch of a canvas is filled up with empty images, id `EMPTY`; a broken picture becomes
    one, too.

    Args:
        split: what to evaluate on.
        config_data: `config.data`.
        batch_size: pictures in a batch, of all processes together.
        limit: only the first so many pictures of the split.
        process_index: which share of every batch this process wants.
        process_count: how many processes share a batch.
        ratios: the scales at which pictures are shown, times that of the config.
        window: height and width of the parts in which a larger picture comes, one after the other, as
            pictures of their own; () for whole ones.
        step: from one part to the next.

    Yields:
        (the same pictures at every ratio, batches with batch_size / process_count rows and without
        targets; [(id, truth at original size)] of the pictures that begin in it; the truth is what
        `Split.truth` returns).

    Raises:
        UserError: processes cannot share a batch, or too many pictures are broken.
    """
    recipe = recipes.find(split.task, config_data)
    if batch_size % process_count:
        raise UserError(
            f"config.eval.batch_size {batch_size} must be a multiple of the {process_count} processes"
        )
    share = batch_size // process_count
    rows = slice(process_index * share, (process_index + 1) * share)
    scaled = recipes.at_ratios(recipe, ratios)
    sizes = split.sizes[:limit]
    shown = np.minimum(sizes, window) if window else sizes
    # Millions of pictures have few sizes, and fewer canvases.
    keys, of_key = np.unique(shown.astype(np.int64) @ (1 << 32, 1), return_inverse=True)
    canvases = [recipe.eval_canvas(divmod(key, 1 << 32)) for key in keys.tolist()]
    canvases, of_size = np.unique(canvases, axis=0, return_inverse=True)
    of_picture = of_size.ravel()[of_key]
    positions = []
    for number in range(len(canvases)):
        group = np.flatnonzero(of_picture == number).astype(np.int32)
        padded = np.pad(group, (0, -len(group) % batch_size), constant_values=EMPTY)
        # All parts of a picture are of one process; the others have as many batches.
        each = [
            _parts(pictures.ravel(), sizes, window, step)
            for pictures in padded.reshape(-1, process_count, share).swapaxes(0, 1)
        ]
        length = -(-max(map(len, each)) // share) * share
        padding = [((0, length - len(parts)), (0, 0)) for parts in each]
        each = [np.pad(*both, constant_values=EMPTY) for both in zip(each, padding)]
        positions.append(np.concatenate([parts.reshape(-1, share, 3) for parts in each], axis=1))
    positions = np.concatenate(positions)
    make = functools.partial(batches.eval_batch, split, scaled, positions, rows, window)
    results = _run_workers(grain.MapDataset.range(len(positions)).map(make), recipe, len(sizes))
    # Arrays of a worker lie in shared memory, each an open file. A batch is soon gone, but truths
    # may be kept for long. (A pipe is no way out: Grain waits 25 s for a worker that is stopped
    # while it writes something large.)
    return ((scales, jax.tree.map(_copy_array, truths)) for scales, truths, _ in results)


def _parts(
    pictures: np.ndarray, sizes: np.ndarray, window: Pair | tuple[()], step: Pair | tuple[()]
) -> np.ndarray:
    """int32 [p, 3]: position, top and left of all parts of pictures."""
    if not window:
        return np.pad(pictures[:, None], ((0, 0), (0, 2)))
    parts = [
        (picture, *corner)
        for picture in pictures[pictures != EMPTY].tolist()
        for corner in corners(sizes[picture], window, step)
    ]
    return np.array(parts, np.int32).reshape(-1, 3)


def _copy_array(leaf: Any) -> Any:
    return np.array(leaf) if isinstance(leaf, np.ndarray) else leaf


def _run_workers(
    dataset: grain.MapDataset,
    recipe: recipes.WholePicture | recipes.Crop,
    num_pictures: int,
) -> Iterator[batches.Prepared]:
    """Computes the elements of a dataset in worker processes, in order.

    The recipe says how many workers there are, and which share of the pictures may be broken.

    Raises:
        UserError: too many pictures are broken, or a worker was ended.
    """
    if not flags.FLAGS.is_parsed():
        # Grain reads flags of its own; without absl's `app.run` nobody has parsed them.
        flags.FLAGS.mark_as_parsed()
    # Without workers a thread makes the next batch. (Grain's default would hold 500 batches.)
    ahead = 0 if recipe.num_workers else 1
    elements = dataset.to_iter_dataset(grain.ReadOptions(ahead, prefetch_buffer_size=ahead))
    options = grain.MultiprocessingOptions(num_workers=recipe.num_workers)
    start = functools.partial(_start_worker, shared_memory.claim() if recipe.num_workers else "")
    iterator = iter(elements.mp_prefetch(options, worker_init_fn=start))
    broken = set()
    try:
        with workers.starting() if recipe.num_workers else contextlib.nullcontext():
            first = list(itertools.islice(iterator, 1))
        for prepared in itertools.chain(first, iterator):
            for name, reason in prepared.failures.items():
                if name not in broken:
                    broken.add(name)
                    log.warning("broken picture %s: %s", name, reason)
            allowed = recipe.max_broken_share * max(num_pictures, LEAST)
            if len(broken) > min(allowed, num_pictures - 1):
                raise UserError(
                    f"{len(broken)} of {num_pictures} pictures are broken, more than "
                    f"config.data.max_broken_share = {recipe.max_broken_share} allows: "
                    + ", ".join(sorted(broken)[:10])
                )
            yield prepared
    except (RuntimeError, OSError, EOFError) as error:
        if not recipe.num_workers:
            raise
        raise UserError(
            f"a process that reads pictures was ended: {error} If memory ran out, or that in /dev/shm "
            "(docker run --shm-size=8g), take fewer processes, or none: config.data.num_workers is "
            f"{recipe.num_workers}"
        ) from error
    finally:
        iterator.close()


def _start_worker(segments: str, *_: int) -> None:
    """What Grain calls first in a worker. Names of shared memory begin with `segments`."""
    shared_memory.name_segments(segments)
    cv2.setNumThreads(0)  # the workers are the parallelism
    workers.start()
