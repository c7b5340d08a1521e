"""A prepared dataset looked at before training: what it shows, in numbers and in a picture."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
import tqdm

from knet_jax.data import recipes, shards
from knet_jax.data.prepared_split import Split
from knet_jax.segmentation import drawing, rle
from knet_jax.system.errors import UserError

CELL = 480
"""Longer side, in pixels, of a picture on the sheet."""
MOST_DRAWN = 12
"""How many pictures are drawn on it."""
NO_CLASS = {"void", "background", "unlabeled", "unlabelled", "ignore", "ignored"}
"""Names of classes that may be none."""


class Finding(NamedTuple):
    """What one picture shows."""

    pixels: np.ndarray
    """int64 [1 + number of classes]: pixels without a class (void, crowds), then of each class."""
    covered: int
    """Pixels of instance masks that other masks cover."""
    hidden: int
    """Segments of which no pixel is seen."""


def find_suspicious(split: Split, config_data: Any) -> list[str]:
    """What of a split is likely to be a mistake, a line each, with what mends it.

    Args:
        split: is not decoded; what was counted when it was prepared is read.
        config_data: `config.data`, completed.
    """
    names = split.categories.names
    counts = np.array(split.columns["pixels" if split.task == "semantic" else "segments"])
    found = []
    if absent := [name for name, count in zip(names, counts) if not count]:
        more = f" and {len(absent) - 10} more" if len(absent) > 10 else ""
        found.append(f"nothing is annotated as {', '.join(absent[:10])}{more}")
    if split.task == "semantic":
        most, ignored = names[counts.argmax()], split.num_pixels - counts.sum()
        if ignored and (counts > 0).sum() == 1:
            found.append(
                f"beside {most!r} there are only ignored pixels; if they are a class (masks of 0 and "
                "255, say), give colors in config.data.classes: 'NAME 0 0 0', 'NAME 255 255 255'"
            )
        elif counts.max() >= 0.99 * counts.sum():
            found.append(f"{most!r} has 99 % of the pixels or more")
        for name, index in zip(names, split.categories.dataset_ids):
            if not ignored and name.lower() in NO_CLASS:
                found.append(
                    f"no pixel is ignored; if {name!r} is no class but unknown, use "
                    f"--config.data.ignore_index={index}"
                )
    elif most := int(split.num_things.max()):
        slots = config_data.max_things
        if overfull := int((split.num_things > slots).sum()):
            found.append(
                f"{overfull} pictures have more than config.data.max_things = {slots} things (up to "
                f"{most}), of which the largest stay: --config.data.max_things={most} "
                f"--config.model.num_proposals={most}"
            )
    elif sum(split.columns["crowds"]):
        found.append("all things are crowds (iscrowd: 1), which are not learned")
    height, width = np.median(split.sizes, axis=0).astype(int).tolist()
    shown = recipes.find(split.task, config_data).eval_size((height, width))
    if height > 2 * shown[0]:
        found.append(
            f"pictures are {width} x {height} (median) and shown at {shown[1]} x {shown[0]}, where what "
            "is small is lost: raise config.data."
            + ("scale and crop" if split.task == "semantic" else "short_side, long_side and canvas")
            + ", or cut the pictures into tiles"
        )
    return found


def report(split: Split) -> str:
    """Decodes every picture of a split, with progress, and says what they show.

    Returns:
        several lines: broken pictures, the share of ignored pixels and, where there are segments,
        overlaps, hidden masks, and the share of the pixels by class.
    """
    inspect = functools.partial(_inspect, split)
    with shards.in_threads(inspect, range(len(split))) as found:
        results = list(tqdm.tqdm(found, f"Checking {split.name}", len(split), unit="img"))
    broken = [result for result in results if isinstance(result, str)]
    findings = [result for result in results if isinstance(result, Finding)]
    lines = [f"{len(findings)} pictures decoded"]
    lines += [f"{len(broken)} broken pictures" + (":" if broken else "")]
    lines += [f"  {line}" for line in broken]
    if findings:
        lines += _summarize(findings, split)
    return "\n".join(lines)


def _inspect(split: Split, index: int) -> Finding | str:
    """What a picture shows, or what is wrong with it."""
    try:
        split.image(index)
        truth = split.truth(index)
    except UserError as error:
        return f"{split.file_name(index)}: {error}"
    painted = drawing.as_panoptic(truth, tuple(split.sizes[index].tolist()))
    ids, counts = np.unique(painted.ids, return_counts=True)
    seen = dict(zip(ids.tolist(), counts.tolist()))
    pixels = np.zeros(1 + len(split.categories.names), np.int64)
    for segment in painted.segments:
        if not segment.iscrowd:
            pixels[1 + segment.label] += seen.get(segment.id, 0)
    labelled = int(pixels.sum())
    pixels[0] = painted.ids.size - labelled
    covered = 0
    if split.task == "instance":  # only these may overlap
        covered = sum(rle.area(one.rle) for one in truth if not one.iscrowd) - labelled
    hidden = sum(segment.id not in seen for segment in painted.segments)
    return Finding(pixels, covered, hidden)


def _summarize(findings: list[Finding], split: Split) -> list[str]:
    pixels = sum(finding.pixels for finding in findings)
    total, labelled = int(pixels.sum()), int(pixels[1:].sum())
    blank = sum(not finding.pixels[1:].any() for finding in findings)
    ignored = (
        f"ignored: {100 * pixels[0] / total:.2f} % of the pixels; {blank} pictures have no label"
    )
    if split.task == "semantic":  # nothing overlaps, and preparing has counted the pixels
        return [ignored]
    covered = [finding.covered for finding in findings if finding.covered]
    overlaps = (
        f"overlaps: {100 * sum(covered) / max(labelled, 1):.2f} % of the labelled pixels, in "
        f"{len(covered)} pictures; {sum(f.hidden for f in findings)} segments are hidden"
    )
    names = split.categories.names
    width = max(map(len, names))
    return [
        ignored,
        overlaps,
        "share of the pixels by class:",
        *(
            f"  {name:<{width}}  {100 * count / total:7.3f} %"
            for name, count in zip(names, pixels[1:])
        ),
    ]


def sheet(split: Split) -> np.ndarray:
    """Draws annotated pictures from all over a split, side by side. Broken ones are left out.

    Returns:
        uint8 [H, W, 3], RGB.

    Raises:
        UserError: all of them are broken.
    """
    cells = []
    for index in np.unique(np.linspace(0, len(split) - 1, MOST_DRAWN).round().astype(int)):
        try:
            image, truth = split.image(index), split.truth(index)
        except UserError:
            continue
        painted = drawing.as_panoptic(truth, image.shape[:2])
        image, [painted] = drawing.at_side(CELL, image, painted)
        cell = np.full((CELL, CELL, 3), 255, np.uint8)
        cell[: image.shape[0], : image.shape[1]] = drawing.draw(image, painted, split.categories)
        cells.append(cell)
    if not cells:
        raise UserError(f"config.data: split '{split.name}' has no sound picture to draw")
    return drawing.contact_sheet(cells)
