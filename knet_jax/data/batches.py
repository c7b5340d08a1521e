"""What one batch is: records decoded, augmented and laid out on a canvas. Runs in the workers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from knet_jax.data import prepared_split, records, sampler, transforms
from knet_jax.data.canvas import empty_batch, empty_eval_batches, fill
from knet_jax.segmentation import image_files
from knet_jax.structs import EMPTY, Batch

MAX_REPLACEMENTS = 8
"""How many pictures are tried for one place in a batch."""


class Failure(NamedTuple):
    """A picture that was left out."""

    file_name: str
    reason: str


class Chunk(NamedTuple):
    """The pictures of a batch for evaluation."""

    positions: np.ndarray
    """int [b]: in the split, `EMPTY` for none."""
    canvases: tuple[tuple[int, int], ...]
    """Height and width that all of them fit, at every scale."""


def train_batch(
    split: prepared_split.Split, recipe: Any, epochs: sampler.EpochSampler, rows: slice, index: int
) -> tuple[tuple[Batch], list, list[Failure]]:
    """Some rows of a training batch, augmented.

    A broken picture is replaced by the next one of its group. Where none of several is sound, the
    place stays empty.

    Args:
        split: where the pictures come from.
        recipe: how they are changed, of `split.kind.recipe`.
        epochs: which pictures the batch shows.
        rows: which of them are wanted.
        index: of the batch, from the start of training.

    Returns:
        the batch, no truths, and what was broken.
    """
    number, members = epochs.batch(index)
    group = epochs.groups[number]
    canvas = recipe.train_canvas(number)
    batch, failures = empty_train_batch(split, recipe, len(members[rows]), canvas), []
    for place, row in enumerate(range(len(members))[rows]):
        member = np.searchsorted(group, members[row])
        for attempt in range(min(MAX_REPLACEMENTS, len(group))):
            position = int(group[(member + attempt) % len(group)])
            record = split.record(position)
            rng = epochs.generator(index, row)
            try:
                image, loaded = _load(split, record)
            except ValueError as error:
                failures.append(Failure(record.file_name, str(error)))
                continue
            view = split.kind.train_view(recipe, loaded, record.size, rng)
            fill(batch, place, position, image, view)
            split.kind.fill(batch.targets, place, loaded, view, canvas, split.categories)
            break
    return (batch,), [], failures


def eval_batch(
    split: prepared_split.Split, recipes: Sequence[Any], chunk: Chunk
) -> tuple[tuple[Batch, ...], list[tuple[int, Any]], list[Failure]]:
    """A batch for evaluation at every scale, not augmented and without targets.

    A broken picture leaves its place empty.

    Args:
        split: where the pictures come from.
        recipes: how they are resized, one for every scale.
        chunk: which pictures.

    Returns:
        the batches, position and truth of every picture in them, and what was broken.
    """
    scales = empty_eval_batches(len(chunk.positions), chunk.canvases)
    truths, failures = [], []
    for place, position in enumerate(chunk.positions.tolist()):
        if position == EMPTY:
            continue
        record = split.record(position)
        try:
            image, loaded = _load(split, record)
        except ValueError as error:
            failures.append(Failure(record.file_name, str(error)))
            continue
        for batch, recipe in zip(scales, recipes):
            view = transforms.whole(recipe.eval_size(record.size))
            fill(batch, place, position, image, view)
        truths.append((position, split.kind.truth(loaded, split.categories)))
    return scales, truths, failures


def empty_train_batch(
    split: prepared_split.Split, recipe: Any, count: int, canvas: tuple[int, int]
) -> Batch:
    """Of so many places, with targets."""
    targets = split.kind.empty(recipe, split.categories, count, canvas)
    return empty_batch(count, canvas)._replace(targets=targets)


def _load(split: prepared_split.Split, record: records.Record) -> tuple[np.ndarray, Any]:
    """A picture and its annotation, decoded. Raises ValueError where the record is broken."""
    image = image_files.load_image(record.image, record.size)
    return image, split.kind.load(record.annotation, record.size, split.categories)
