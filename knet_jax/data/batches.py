"""What one batch is: records decoded, augmented and laid out on a canvas. Runs in the workers."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from knet_jax.data import records, sampler, splits, transforms
from knet_jax.structs import EMPTY, Batch, Categories, PanopticMap

MAX_REPLACEMENTS = 8
"""How many pictures are tried for one place in a batch."""


class Recipe(NamedTuple):
    """The part of `config.data` that a worker needs."""

    canvas: tuple[int, int]
    """Height and width of the landscape canvas."""
    short_side: tuple[int, int]
    long_side: int
    flip: float
    max_things: int
    num_workers: int
    max_broken_share: float


def make_recipe(config_data) -> Recipe:
    """Checks what the loader needs of `config.data`.

    Raises:
        ValueError: a value that cannot be meant.
    """
    recipe = Recipe(
        tuple(config_data.canvas),
        tuple(config_data.short_side),
        config_data.long_side,
        config_data.flip,
        config_data.max_things,
        config_data.num_workers,
        config_data.max_broken_share,
    )
    height, width = recipe.canvas
    low, high = recipe.short_side
    if height % 32 or width % 32 or not 0 < height <= width:
        raise ValueError(
            f"config.data.canvas {recipe.canvas} must be a landscape (height, width), "
            "multiples of 32"
        )
    if not 0 < low <= high:
        raise ValueError(f"config.data.short_side {recipe.short_side} must be (least, greatest)")
    if high > height or recipe.long_side > width:
        raise ValueError(
            f"config.data.short_side {recipe.short_side} and long_side {recipe.long_side} "
            f"do not fit into config.data.canvas {recipe.canvas}"
        )
    for name in ("flip", "max_broken_share"):
        if not 0 <= getattr(recipe, name) <= 1:
            raise ValueError(f"config.data.{name} {getattr(recipe, name)} must be in [0, 1]")
    for name, least in (("max_things", 1), ("num_workers", 0)):
        if getattr(recipe, name) < least:
            raise ValueError(f"config.data.{name} {getattr(recipe, name)} must be >= {least}")
    return recipe


class Failure(NamedTuple):
    """A picture that was left out."""

    file_name: str
    reason: str


def train_batch(
    split: splits.Split, recipe: Recipe, epochs: sampler.EpochSampler, rows: slice, index: int
) -> tuple[Batch, list, list[Failure]]:
    """Some rows of a training batch, augmented.

    A broken picture is replaced by the next one of its orientation. Where none of several is
    sound, the place stays empty.

    Args:
        split: where the pictures come from.
        recipe: how they are changed.
        epochs: which pictures the batch shows.
        rows: which of them are wanted.
        index: of the batch, from the start of training.

    Returns:
        the batch, no truths, and what was broken.
    """
    number, members = epochs.batch(index)
    group = epochs.groups[number]
    batch, failures = _empty_batch(split, recipe, len(members[rows]), portrait=number == 1), []
    for place, row in enumerate(range(len(members))[rows]):
        member = np.searchsorted(group, members[row])
        for attempt in range(min(MAX_REPLACEMENTS, len(group))):
            position = int(group[(member + attempt) % len(group)])
            record = split.record(position)
            rng = epochs.generator(index, row)
            short_side = rng.integers(*recipe.short_side, endpoint=True)
            size = transforms.resized_size(record.size, short_side, recipe.long_side)
            flip = bool(rng.random() < recipe.flip)
            try:
                _fill(batch, place, position, record, size, flip, split.categories)
                break
            except ValueError as error:
                failures.append(Failure(record.file_name, str(error)))
    return batch, [], failures


def eval_batch(
    split: splits.Split, recipe: Recipe, chunk: tuple[int, np.ndarray]
) -> tuple[Batch, list[tuple[int, PanopticMap]], list[Failure]]:
    """A batch for evaluation, not augmented; a broken picture leaves its place empty.

    Args:
        split: where the pictures come from.
        recipe: how they are resized, by the greatest short side.
        chunk: the group (0 landscape, 1 portrait) and the positions in the split, `EMPTY` for none.

    Returns:
        the batch, position and truth of every picture in it, and what was broken.
    """
    number, positions = chunk
    batch = _empty_batch(split, recipe, len(positions), portrait=number == 1)
    truths, failures = [], []
    for place, position in enumerate(positions.tolist()):
        if position == EMPTY:
            continue
        record = split.record(position)
        size = transforms.resized_size(record.size, recipe.short_side[1], recipe.long_side)
        try:
            truth = splits.panoptic_truth(record)
            _fill(batch, place, position, record, size, False, split.categories)
            truths.append((position, truth))
        except ValueError as error:
            failures.append(Failure(record.file_name, str(error)))
    return batch, truths, failures


def _empty_batch(split: splits.Split, recipe: Recipe, count: int, portrait: bool) -> Batch:
    height, width = recipe.canvas[::-1] if portrait else recipe.canvas
    num_values = 1 + recipe.max_things + split.categories.num_stuff
    return Batch(
        image=np.zeros((count, height, width, 3), np.uint8),
        segment_map=np.zeros(
            (count, height // 2, width // 2), np.uint8 if num_values <= 256 else np.uint16
        ),
        labels=np.full((count, num_values - 1), EMPTY, np.int32),
        size=np.zeros((count, 2), np.int32),
        original_size=np.zeros((count, 2), np.int32),
        id=np.full(count, EMPTY, np.int32),
    )


def _fill(
    batch: Batch,
    place: int,
    position: int,
    record: records.Record,
    size: tuple[int, int],
    flip: bool,
    categories: Categories,
) -> None:
    """Writes one example into a place of a batch. Raises ValueError where the record is broken."""
    image = transforms.load_image(record.image, record.size)
    panoptic = transforms.load_panoptic(record.panoptic, record.size)
    max_things = batch.labels.shape[1] - categories.num_stuff
    shown = [segment for segment in record.segments if not segment.iscrowd]
    stuff = [segment for segment in shown if segment.label >= categories.num_things]
    things = [segment for segment in shown if segment.label < categories.num_things]
    things = sorted(things, key=lambda thing: -thing.area)[:max_things]
    values = [1 + slot for slot in range(len(things))]
    values += [1 + max_things + segment.label - categories.num_things for segment in stuff]

    transforms.place_image(image, size, flip, batch.image[place])
    batch.segment_map[place] = transforms.sample_segments(
        panoptic,
        size,
        flip,
        canvas=batch.image.shape[1:3],
        ids=[segment.id for segment in things + stuff],
        values=values,
        dtype=batch.segment_map.dtype,
    )
    for segment, value in zip(things + stuff, values):
        batch.labels[place, value - 1] = segment.label
    batch.size[place] = size
    batch.original_size[place] = record.size
    batch.id[place] = position
