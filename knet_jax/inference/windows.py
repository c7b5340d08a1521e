"""Large pictures window by window: each is segmented as a picture of its own, and what they show is
joined.

Windows overlap. A thing that the border of a window cuts off counts where another window shows all of
it; one that no window shows whole is put together of pieces that agree where their windows overlap. At
each pixel of a panoptic map the windows vote, each for its own segment by its score and by how far
inside the window the pixel lies. Masks are kept as run lengths: beyond the picture and its map the
memory grows with the number of segments only.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache, partial
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from knet_jax.inference.multiscale import Pair, corners
from knet_jax.segmentation import rle
from knet_jax.segmentation.segments import Instance, PanopticMap, SegmentInfo

SAME = 0.5
"""The IoU, where two windows overlap, from which on pieces of one class are the same thing."""

Seen = Sequence[Sequence[Instance]]
"""The segments of every window, masks of the window's size."""


class Windows:
    """The results of the windows of one picture, in their order.

    Args:
        size: height and width of the picture.
        window: height and width of the windows; () for the whole picture.
        step: from one window to the next.
    """

    def __init__(self, size: Pair, window: Pair | tuple[()], step: Pair | tuple[()]):
        self.size = tuple(map(int, size))
        shown = np.minimum(self.size, window or self.size)
        starts = np.array(corners(self.size, window, step) if window else [(0, 0)])
        self.spans = np.concatenate([starts, starts + shown], axis=1)
        """int [v, 4]: top, left, bottom and right of each window."""
        self._seen: list[Any] = []

    def add(self, prediction: Any) -> bool:
        """Takes the result of the next window. Returns whether it was the last."""
        if len(self.spans) > 1 and isinstance(prediction, PanopticMap):
            ids, segments = prediction
            prediction = [Instance(rle.encode(ids == s.id), s.label, s.score) for s in segments]
        self._seen.append(prediction)
        return len(self._seen) == len(self.spans)

    def join(self, task: Any, num_things: int, overlap_threshold: float) -> Any:
        """The result of the picture, by a row of `TASKS`; that of a single window as it is."""
        if len(self.spans) == 1:
            return self._seen[0]
        return task.join(self._seen, self.spans, self.size, num_things, overlap_threshold)


class Piece(NamedTuple):
    """What one window shows of a segment."""

    window: int
    place: int
    """Among the segments of its window."""
    label: int
    score: float
    rle: dict[str, Any]
    """The mask: of things of the picture's size, of stuff of the window's."""
    box: np.ndarray | None = None
    """int [4]: top, left, bottom and right in the picture."""
    is_whole: bool = False
    """Whether no border of its window cuts the thing off."""


def join_instances(
    seen: Seen, spans: np.ndarray, size: Pair, num_things: int, overlap_threshold: float
) -> tuple[Instance, ...]:
    """The instances of a picture from those of its windows, best score first."""
    found = []
    for pieces in join_things(seen, spans, size, num_things):
        mask = rle.merge([piece.rle for piece in pieces])
        area = float(rle.area(mask))
        found.append(Instance(mask, pieces[0].label, mean_score(pieces), area=area))
    return tuple(sorted(found, key=lambda one: -one.score))


def join_panoptic(
    seen: Seen, spans: np.ndarray, size: Pair, num_things: int, overlap_threshold: float
) -> PanopticMap:
    """The panoptic map of a picture from the segments of its windows, best score first.

    Every pixel goes to the segment with the most votes. A segment that gets less than a share of
    `overlap_threshold` of the pixels that any window gave it is dropped, and its votes with it.
    """
    stuff = defaultdict(list)
    for window, segments in enumerate(seen):
        for place, one in enumerate(segments):
            if one.label >= num_things:
                stuff[one.label].append(Piece(window, place, one.label, one.score, one.rle))
    found = [*join_things(seen, spans, size, num_things), *stuff.values()]
    found = sorted(((mean_score(pieces), pieces) for pieces in found), key=lambda one: -one[0])
    numbers = [np.zeros(1 + len(segments), np.int32) for segments in seen]
    for number, (_, pieces) in enumerate(found, 1):
        for piece in pieces:
            numbers[piece.window][1 + piece.place] = number
    ids, owned, claimed = _vote(seen, spans, size, numbers)
    kept = owned >= np.maximum(overlap_threshold * claimed, 1)
    if not kept[owned > 0].all():
        ids, owned, _ = _vote(seen, spans, size, [np.where(kept[n], n, 0) for n in numbers])
    kept = np.flatnonzero(owned[1:])
    table = np.zeros(len(owned), np.int32)
    table[1 + kept] = np.arange(1, 1 + len(kept))
    for row in ids:
        row[:] = table[row]
    infos = (
        SegmentInfo(i, found[number][1][0].label, score=found[number][0])
        for i, number in enumerate(kept, 1)
    )
    return PanopticMap(ids, tuple(infos))


def mean_score(pieces: Sequence[Piece]) -> float:
    """The mean of the scores of pieces by their areas."""
    areas = [rle.area(piece.rle) for piece in pieces]
    return float(np.average([piece.score for piece in pieces], weights=areas))


def join_things(
    seen: Seen, spans: np.ndarray, size: Pair, num_things: int
) -> Iterable[Sequence[Piece]]:
    """The things of a picture, each as what its windows show of it.

    Pieces of one class are the same thing where their IoU within both windows is at least `SAME`, the
    surest first; a thing has at most one piece of a window.
    """
    pieces = [list(_place(i, own, num_things, spans, size)) for i, own in enumerate(seen)]
    matches = []
    for a, span in enumerate(spans):
        strips, shared = _overlap(span, spans[a + 1 :])
        for b in np.flatnonzero(shared):
            both = pieces[a], pieces[a + 1 + b]
            matches += _match(both, spans[[a, a + 1 + b]], strips[b], size)
    groups = {id(piece): [piece] for own in pieces for piece in own}
    for _, a, b in sorted(matches, key=lambda match: -match[0]):
        one, other = groups[id(a)], groups[id(b)]
        if {piece.window for piece in one}.isdisjoint(piece.window for piece in other):
            one += other
            groups |= {id(piece): one for piece in other}
    return {id(group): group for group in groups.values()}.values()


def _place(
    window: int, segments: Sequence[Instance], num_things: int, spans: np.ndarray, size: Pair
) -> Iterator[Piece]:
    """The pieces of a window's things, but for those that it cuts off and another one shows whole."""
    placed = {}
    for place, one in enumerate(segments):
        if one.label >= num_things:
            continue
        if id(one.rle) not in placed:  # a mask may stand for several classes
            mask = rle.move(one.rle, spans[window, :2].tolist(), size)
            left, top, width, height = rle.box(mask)
            box = np.array([top, left, top + height, left + width])
            shown = _shows(spans, box, size)
            is_seen = width > 0 and (shown[window] or not shown.any())
            placed[id(one.rle)] = is_seen, mask, box, bool(shown[window])
        is_seen, *about = placed[id(one.rle)]
        if is_seen:
            yield Piece(window, place, one.label, one.score, *about)


def _shows(spans: np.ndarray, boxes: np.ndarray, size: Pair) -> np.ndarray:
    """Whether windows show all of boxes, [..., 4] of both: these touch none of their borders but the
    picture's."""
    starts = (spans[..., :2] < boxes[..., :2]) | (spans[..., :2] == 0)
    ends = (spans[..., 2:] > boxes[..., 2:]) | (spans[..., 2:] == size)
    return starts.all(-1) & ends.all(-1)


def _overlap(box: np.ndarray, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What a box [4] shares with others [..., 4], as boxes, and whether there is any."""
    start = np.maximum(box[:2], boxes[..., :2])
    end = np.minimum(box[2:], boxes[..., 2:])
    return np.concatenate([start, end], -1), (start < end).all(-1)


def _match(
    pieces: Sequence[Sequence[Piece]], spans: np.ndarray, strip: np.ndarray, size: Pair
) -> Iterator[tuple[float, Piece, Piece]]:
    """(how sure, piece, piece) of one class that are alike in the strip that two windows share."""
    frame = rle.move(rle.encode(np.ones(strip[2:] - strip[:2])), strip[:2].tolist(), size)
    cut, sides = {}, (defaultdict(list), defaultdict(list))
    for side, own in zip(sides, pieces):
        for piece in own:
            if _overlap(strip, piece.box)[1]:
                if id(piece.rle) not in cut:
                    cut[id(piece.rle)] = rle.merge([piece.rle, frame], intersect=True)
                side[piece.label].append(piece)
    for label in sides[0].keys() & sides[1].keys():
        ours, theirs = (side[label] for side in sides)
        iou = rle.iou(*([cut[id(piece.rle)] for piece in own] for own in (ours, theirs)))
        for i, j in np.argwhere(iou >= SAME):
            one, other = ours[i], theirs[j]
            # What ends in one window does not go on beyond the other, which would show it too.
            shown = _shows(spans, np.array([other.box, one.box]), size).any()
            if shown or not (one.is_whole or other.is_whole):
                yield one.score * other.score * iou[i, j], one, other


def _vote(
    seen: Seen, spans: np.ndarray, size: Pair, numbers: Sequence[np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What most votes are for at every pixel of a picture.

    Args:
        seen: segments of windows, which share no pixel within one.
        numbers: of every window int32 [1 + segments], what a vote for each counts for; the first is
            that of void, 0, and so is that of a segment that does not count.

    Returns:
        int32 [H, W], how many pixels each number has there, and for how many it had any vote.
    """
    tops, lefts = (sorted(set(starts)) for starts in spans[:, :2].T.tolist())
    rows_at_once = 1 + np.searchsorted(tops, spans[0, 2])

    @lru_cache(maxsize=int(rows_at_once) * len(lefts))
    def paint(window: int) -> np.ndarray:
        index = np.zeros(spans[window, 2:] - spans[window, :2], np.uint16)
        for place, one in enumerate(seen[window], 1):
            index[rle.decode(one.rle) > 0] = place
        return index

    ids = np.zeros(size, np.int32)
    count = partial(np.bincount, minlength=1 + max(int(each.max()) for each in numbers))
    owned, claimed = 0, 0
    rows, columns = zip(tops, [*tops[1:], size[0]]), zip(lefts, [*lefts[1:], size[1]])
    for (top, bottom), (left, right) in product(rows, columns):
        parts, shared = _overlap(np.array([top, left, bottom, right]), spans)
        shape = shared.sum(), bottom - top, right - left
        choice, votes = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
        for voter, window in enumerate(np.flatnonzero(shared).tolist()):
            start, end = parts[window].reshape(2, 2)
            here, there = (
                tuple(map(slice, start - corner, end - corner))
                for corner in ((top, left), spans[window, :2])
            )
            index = paint(window)[there]
            scores = np.array([0, *(one.score for one in seen[window])], np.float32)
            y, x = (_inside(*spans[window, axis::2], size[axis]) for axis in (0, 1))
            choice[voter][here] = numbers[window][index]
            votes[voter][here] = np.outer(y, x)[there] * (scores * (numbers[window] > 0))[index]
        total = sum(np.where(choice == own, vote, 0) for own, vote in zip(choice, votes))
        chosen = np.take_along_axis(choice, total.argmax(0)[None], 0)[0]
        ids[top:bottom, left:right] = chosen
        owned += count(chosen.ravel())
        for voter, own in enumerate(choice):
            claimed += count(own[(own != choice[:voter]).all(0)])
    return ids, owned, claimed


def _inside(start: int, end: int, side: int) -> np.ndarray:
    """How far inside a window the pixels of an axis lie, from each border that is not the picture's:
    above 0, 1 in the middle."""
    half, at = (end - start) / 2, np.arange(end - start) + 0.5
    depth = np.full(end - start, half, np.float32)
    if start > 0:
        depth = np.minimum(depth, at)
    if end < side:
        depth = np.minimum(depth, at[::-1])
    return depth / half
