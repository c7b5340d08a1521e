"""What one batch is: records decoded, augmented and laid out on a canvas. Runs in the workers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from knet_jax.data import sampler, transforms
from knet_jax.data.annotations.kind import Record
from knet_jax.data.canvas import empty_batch, fill
from knet_jax.data.prepared_split import Split
from knet_jax.data.recipes import Crop, WholePicture
from knet_jax.segmentation import image_files
from knet_jax.structs import EMPTY, Batch
from knet_jax.system.errors import UserError

MAX_REPLACEMENTS = 8
"""How many pictures are tried for one place in a batch."""


class Prepared(NamedTuple):
    """What a worker hands over."""

    batches: tuple[Batch, ...]
    """The same pictures prepared by each recipe; one batch in training."""
    truths: list[tuple[int, Any]]
    """(position, truth) of the pictures; none in training."""
    failures: dict[str, str]
    """What is wrong with the pictures that were left out, by the names of their files."""


def train_batch(
    split: Split,
    recipe: WholePicture | Crop,
    epochs: sampler.EpochSampler,
    rows: slice,
    index: int,
) -> Prepared:
    """Some rows of a training batch, augmented.

    A broken picture is replaced by the next one of its group. Where none of several is sound, the
    place stays empty. The index is counted from the start of training.
    """
    number, members = epochs.batch(index)
    group = epochs.groups[number]
    wanted = range(len(members))[rows]
    batch = empty_batch(len(wanted), recipe.train_canvases[number])
    batch = batch._replace(targets=split.kind.empty(recipe, number, len(wanted)))
    failures = {}
    for place, row in enumerate(wanted):
        member = np.searchsorted(group, members[row])
        for attempt in range(min(MAX_REPLACEMENTS, len(group))):
            position = int(group[(member + attempt) % len(group)])
            record = split.record(position)
            rng = epochs.generator(index, row)
            try:
                image, loaded = _load(split, record)
            except UserError as error:
                failures[record.file_name] = str(error)
                continue
            view = split.kind.train_view(recipe, loaded, rng)
            fill(batch, place, position, image, view)
            split.kind.fill(batch.targets, place, loaded, view)
            break
    return Prepared((batch,), [], failures)


def eval_batch(
    split: Split,
    recipes: Sequence[WholePicture | Crop],
    positions: np.ndarray,
    rows: slice,
    window: tuple[int, int] | tuple[()],
    index: int,
) -> Prepared:
    """Some rows of a batch for evaluation by each of the recipes, not augmented and without targets.

    A broken picture leaves its place empty.

    Args:
        split: where the pictures come from.
        recipes: how they are shown.
        positions: int [batches, pictures, 3], of the pictures in the split, and top and left of the
            part that is shown; the position is `EMPTY` where there is none.
        rows: which of a batch are wanted.
        window: height and width of the parts; () shows whole pictures.
        index: of the batch.
    """
    shown = positions[index]
    sizes = split.sizes[shown[shown[:, 0] != EMPTY, 0]]
    sizes = map(tuple, np.minimum(sizes, window or sizes).tolist())
    # The canvases of a batch hold each of its pictures.
    fits = np.max([[recipe.eval_canvas(size) for recipe in recipes] for size in sizes], axis=0)
    scales = tuple(empty_batch(len(shown[rows]), canvas) for canvas in map(tuple, fits.tolist()))
    truths, failures = [], {}
    opened = EMPTY
    for place, (position, top, left) in enumerate(shown[rows].tolist()):
        if position == EMPTY:
            continue
        if position != opened:  # parts of a picture follow each other
            record = split.record(position)
            try:
                image, loaded = _load(split, record)
            except UserError as error:
                failures[record.file_name] = str(error)
                continue
            opened = position
        height, width = window or record.size
        part = image[top : top + height, left : left + width]
        for batch, recipe in zip(scales, recipes):
            view = transforms.whole(recipe.eval_size(part.shape[:2]))
            fill(batch, place, position, part, view)
        if (top, left) == (0, 0):
            truths.append((position, split.kind.truth(loaded)))
    return Prepared(scales, truths, failures)


def _load(split: Split, record: Record) -> tuple[np.ndarray, Any]:
    """A picture and its annotation, decoded. Raises UserError where the record is broken."""
    return image_files.load_image(record.image, record.size), split.kind.load(record)
