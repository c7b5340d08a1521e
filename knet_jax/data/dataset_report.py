"""Looking at a dataset before training on it: what its pixels show, in numbers and in a picture."""

from __future__ import annotations

import functools
import os
from multiprocessing import pool
from typing import NamedTuple

import numpy as np
import tqdm

from knet_jax.data import prepared_split
from knet_jax.segmentation import drawing, rle
from knet_jax.segmentation.segments import PanopticMap
from knet_jax.system.errors import UserError

CELL = 480
"""Longer side, in pixels, of a picture of the sheet."""
COLUMNS = 3
GAP = 8
"""Pixels between the pictures of the sheet."""


class Finding(NamedTuple):
    """What one picture shows."""

    pixels: np.ndarray
    """int64 [1 + k]: pixels without a class (void, crowds), then those of each class."""
    doubled: int
    """Pixels of masks that other masks hide."""
    hidden: int
    """Segments of which no pixel is seen."""


def report(split: prepared_split.Split) -> str:
    """Decodes every picture of a split, with progress, and says what they show.

    A text of several lines: what was noted when the split was prepared (problems included), then
    the share of ignored pixels, overlaps, hidden masks, and pixels by class.
    """
    with pool.ThreadPool(os.cpu_count()) as threads:
        inspect = functools.partial(_inspect, split)
        results = threads.imap(inspect, range(len(split)))
        title = f"Checking {split.name}"
        results = list(tqdm.tqdm(results, title, len(split), unit="img", leave=False))
    broken = [result for result in results if isinstance(result, str)]
    findings = [result for result in results if isinstance(result, Finding)]
    lines = [split.description, f"{len(findings)} pictures decoded"]
    lines += [f"{len(broken)} broken pictures" + (":" if broken else "")]
    lines += [f"  {line}" for line in broken]
    if findings:
        lines += _summarize(findings, split.categories.names)
    return "\n".join(lines)


def _inspect(split: prepared_split.Split, index: int) -> Finding | str:
    """What a picture shows, or what is wrong with it."""
    try:
        split.image(index)
        truth = split.truth(index)
    except ValueError as error:
        return f"{split.file_name(index)}: {error}"
    size = tuple(split.sizes[index].tolist())
    painted = drawing.as_panoptic(truth, size)
    counts = np.bincount(painted.ids.ravel(), minlength=1)
    pixels = np.zeros(1 + len(split.categories.names), np.int64)
    hidden = 0
    for segment in painted.segments:
        count = int(counts[segment.id]) if segment.id < len(counts) else 0
        hidden += not count
        if not segment.iscrowd:
            pixels[1 + segment.label] += count
    pixels[0] = painted.ids.size - pixels.sum()
    return Finding(pixels, _hidden_pixels(truth, int(pixels[1:].sum())), hidden)


def _hidden_pixels(truth: drawing.Segmentation, labelled: int) -> int:
    """How many pixels of masks other masks hide, given how many are seen: only instances overlap."""
    if isinstance(truth, PanopticMap | np.ndarray):
        return 0
    return sum(rle.area(one.rle) for one in truth if not one.iscrowd) - labelled


def _summarize(findings: list[Finding], names: tuple[str, ...]) -> list[str]:
    pixels = sum(finding.pixels for finding in findings)
    total, labelled = int(pixels.sum()), int(pixels[1:].sum())
    blank = sum(not finding.pixels[1:].any() for finding in findings)
    doubled = [finding.doubled for finding in findings if finding.doubled]
    overlaps = (
        f"overlaps: {100 * sum(doubled) / max(labelled, 1):.2f} % of the labelled pixels, in "
        f"{len(doubled)} pictures; {sum(f.hidden for f in findings)} segments are hidden"
    )
    width = max(map(len, names))
    return [
        f"ignored: {100 * pixels[0] / total:.2f} % of the pixels; {blank} pictures have no label",
        overlaps,
        "share of the pixels by class:",
        *(
            f"  {name:<{width}}  {100 * count / total:7.3f} %"
            for name, count in zip(names, pixels[1:])
        ),
    ]


def sheet(split: prepared_split.Split, count: int = 12) -> np.ndarray:
    """Annotated pictures from all over a split, side by side: uint8 [H, W, 3], RGB.

    Broken pictures are left out. Raises ValueError where all are broken.
    """
    cells = []
    for index in np.unique(np.linspace(0, len(split) - 1, count).round().astype(int)):
        try:
            image, truth = split.image(index), split.truth(index)
        except ValueError:
            continue
        painted = drawing.as_panoptic(truth, image.shape[:2])
        image, [painted] = drawing.at_side(CELL, image, painted)
        cells.append(drawing.draw(image, painted, split.categories))
    if not cells:
        raise UserError(f"config.data: split '{split.name}' has no sound picture to draw")
    rows = [cells[i : i + COLUMNS] for i in range(0, len(cells), COLUMNS)]
    heights = [max(len(cell) for cell in row) + GAP for row in rows]
    width = min(COLUMNS, len(cells)) * (CELL + GAP)
    canvas = np.full((sum(heights), width, 3), 255, np.uint8)
    for top, row in zip(np.cumsum([0, *heights]), rows):
        for column, cell in enumerate(row):
            left = column * (CELL + GAP)
            canvas[top : top + cell.shape[0], left : left + cell.shape[1]] = cell
    return canvas
