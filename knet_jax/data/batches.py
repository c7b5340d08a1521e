"""What one batch is: records decoded, augmented and laid out on a canvas. Runs in the workers."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np

from knet_jax.data import records, sampler, splits, transforms
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
    canvas: tuple[int, int]
    """Height and width that all of them fit."""


def train_batch(
    split: splits.Split, recipe: Any, epochs: sampler.EpochSampler, rows: slice, index: int
) -> tuple[Batch, list, list[Failure]]:
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
    batch, failures = _empty_batch(split, recipe, len(members[rows]), canvas), []
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
            _fill(batch, place, position, split, record, image, loaded, view)
            break
    return batch, [], failures


def eval_batch(
    split: splits.Split, recipe: Any, chunk: Chunk
) -> tuple[Batch, list[tuple[int, Any]], list[Failure]]:
    """A batch for evaluation, not augmented; a broken picture leaves its place empty.

    Args:
        split: where the pictures come from.
        recipe: how they are resized, of `split.kind.recipe`.
        chunk: which pictures.

    Returns:
        the batch, position and truth of every picture in it, and what was broken.
    """
    batch = _empty_batch(split, recipe, len(chunk.positions), chunk.canvas)
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
        view = transforms.whole(recipe.eval_size(record.size))
        _fill(batch, place, position, split, record, image, loaded, view)
        truths.append((position, split.kind.truth(loaded, split.categories)))
    return batch, truths, failures


def num_bytes(split: splits.Split, recipe: Any, count: int, canvas: tuple[int, int]) -> int:
    """How large a batch of so many pictures is."""
    one = _empty_batch(split, recipe, 1, canvas)
    return count * sum(leaf.nbytes for leaf in jax.tree.leaves(one))


def _empty_batch(split: splits.Split, recipe: Any, count: int, canvas: tuple[int, int]) -> Batch:
    return Batch(
        image=np.zeros((count, *canvas, 3), np.uint8),
        targets=split.kind.empty(recipe, split.categories, count, canvas),
        size=np.zeros((count, 2), np.int32),
        original_size=np.zeros((count, 2), np.int32),
        id=np.full(count, EMPTY, np.int32),
    )


def _load(split: splits.Split, record: records.Record) -> tuple[np.ndarray, Any]:
    """A picture and its annotation, decoded. Raises ValueError where the record is broken."""
    image = transforms.load_image(record.image, record.size)
    return image, split.kind.load(record.annotation, record.size, split.categories)


def _fill(
    batch: Batch,
    place: int,
    position: int,
    split: splits.Split,
    record: records.Record,
    image: np.ndarray,
    loaded: Any,
    view: transforms.View,
) -> None:
    """Writes one example into a place of a batch."""
    transforms.place_image(image, view, batch.image[place])
    canvas = batch.image.shape[1:3]
    split.kind.fill(batch.targets, place, loaded, view, canvas, split.categories)
    batch.size[place] = view.shown
    batch.original_size[place] = record.size
    batch.id[place] = position
