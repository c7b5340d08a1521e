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
from collections.abc import Iterator, Sequence
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


class Span(NamedTuple):
    """The part of a picture that a window shows, in pixels."""

    top: int
    left: int
    bottom: int
    right: int


class Windows:
    """The results of the windows of one picture, in their order.

    Args:
        size: height and width of the picture.
        window: height and width of the windows; () for the whole picture.
        step: from one window to the next.
    """

    def __init__(self, size: Pair, window: Pair | tuple[()], step: Pair | tuple[()]):
        self.size = tuple(map(int, size))
        height, width = map(min, self.size, window or self.size)
        starts = corners(self.size, window, step) if window else [(0, 0)]
        self.spans = [Span(top, left, top + height, left + width) for top, left in starts]
        self._seen: list[Any] = []

    def add(self, prediction: Any) -> bool:
        """Takes the result of the next window. Returns whether it was the last."""
        if len(self.spans) > 1 and isinstance(prediction, PanopticMap):
            prediction = tuple(
                Instance(rle.encode(prediction.ids == s.id), s.label, s.score)
                for s in prediction.segments
            )
        self._seen.append(prediction)
        return len(self._seen) == len(self.spans)

    def join(self, task: Any, num_things: int, overlap_threshold: float) -> Any:
        """The result of the picture; that of a single window as it is.

        Args:
            task: a row of `tasks.TASKS`.
            num_things: how many classes are things; they come first.
            overlap_threshold: as of `join_panoptic`.
        """
        if len(self.spans) == 1:
            return self._seen[0]
        return task.join(self._seen, self.spans, self.size, num_things, overlap_threshold)


class Piece(NamedTuple):
    """What one window shows of a thing."""

    window: int
    place: int
    """Among the segments of its window."""
    rle: dict[str, Any]
    """The mask, of the picture's size."""
    box: Span
    is_whole: bool
    """Whether no border of its window cuts it off."""
    label: int
    score: float


class Thing(NamedTuple):
    """A thing of the picture."""

    pieces: tuple[Piece, ...]
    rle: dict[str, Any]
    label: int
    score: float


def join_instances(
    seen: Seen, spans: Sequence[Span], size: Pair, num_things: int, overlap_threshold: float = 0.0
) -> tuple[Instance, ...]:
    """The instances of a picture from those of its windows, best score first."""
    things = sorted(join_things(seen, spans, size, num_things), key=lambda thing: -thing.score)
    return tuple(
        Instance(thing.rle, thing.label, thing.score, area=float(rle.area(thing.rle)))
        for thing in things
    )


def join_panoptic(
    seen: Seen, spans: Sequence[Span], size: Pair, num_things: int, overlap_threshold: float
) -> PanopticMap:
    """The panoptic map of a picture from the segments of its windows.

    Every pixel goes to the segment with the most votes. A segment that gets less than a share of
    `overlap_threshold` of the pixels that any window gave it is dropped, and its votes with it. Segments
    are numbered from the best score on; that of stuff is the mean over windows by area.
    """
    things = join_things(seen, spans, size, num_things)
    numbers = [np.zeros(1 + len(segments), np.int32) for segments in seen]
    for number, thing in enumerate(things, 1):
        for piece in thing.pieces:
            numbers[piece.window][1 + piece.place] = number
    stuff = defaultdict(list)
    for window, segments in enumerate(seen):
        for place, one in enumerate(segments):
            if one.label >= num_things:
                numbers[window][1 + place] = 1 + len(things) + one.label - num_things
                stuff[one.label].append((one.score, rle.area(one.rle)))
    found = [(thing.score, number, thing.label) for number, thing in enumerate(things, 1)]
    for label, shown in stuff.items():
        scores, areas = zip(*shown)
        score = float(np.average(scores, weights=areas))
        found.append((score, 1 + len(things) + label - num_things, label))
    ids, owned, claimed = _vote(seen, spans, size, numbers)
    kept = (owned > 0) & (owned >= overlap_threshold * claimed)
    if not kept[owned > 0].all():
        ids, owned, _ = _vote(seen, spans, size, [np.where(kept[n], n, 0) for n in numbers])
    found = [one for one in found if kept[one[1]] and owned[one[1]]]
    found.sort(key=lambda one: (-one[0], one[1]))
    table = np.zeros(len(owned), np.int32)
    table[[number for _, number, _ in found]] = np.arange(1, 1 + len(found))
    for row in ids:
        row[:] = table[row]
    infos = (SegmentInfo(i, label, score=score) for i, (score, _, label) in enumerate(found, 1))
    return PanopticMap(ids, tuple(infos))


def join_things(seen: Seen, spans: Sequence[Span], size: Pair, num_things: int) -> list[Thing]:
    """The things of a picture from what its windows show of them.

    Pieces of one class are the same thing where their IoU within both windows is at least `SAME`, the
    surest first; a thing has at most one piece of a window. Its mask is the union of its pieces, its
    score their mean by area.
    """
    every = np.array(spans)
    by_window = [
        list(_place(number, every, segments, size, num_things))
        for number, segments in enumerate(seen)
    ]
    matches = [
        match
        for a, b, strip in _overlaps(every)
        for match in _match((by_window[a], by_window[b]), every[[a, b]], strip, size)
    ]
    groups = {id(piece): [piece] for pieces in by_window for piece in pieces}
    for _, a, b in sorted(matches, key=lambda match: -match[0]):
        one, other = groups[id(a)], groups[id(b)]
        if {piece.window for piece in one}.isdisjoint(piece.window for piece in other):
            one += other
            groups |= {id(piece): one for piece in other}
    things = []
    for group in {id(group): group for group in groups.values()}.values():
        masks = [piece.rle for piece in group]
        areas = list(map(rle.area, masks))
        score = float(np.average([piece.score for piece in group], weights=areas))
        things.append(Thing(tuple(group), rle.union(masks), group[0].label, score))
    return things


def _place(
    number: int, every: np.ndarray, segments: Sequence[Instance], size: Pair, num_things: int
) -> Iterator[Piece]:
    """The pieces of a window's things, but for those that it cuts off and another one shows whole."""
    placed = {}
    for place, one in enumerate(segments):
        if one.label >= num_things:
            continue
        if id(one.rle) not in placed:  # a mask may stand for several classes
            mask = rle.move(one.rle, every[number, :2].tolist(), size)
            left, top, width, height = rle.box(mask)
            box = Span(top, left, top + height, left + width)
            shown = _shows(every, np.array(box), size)
            is_seen = width > 0 and (shown[number] or not shown.any())
            placed[id(one.rle)] = is_seen, mask, box, bool(shown[number])
        is_seen, *about = placed[id(one.rle)]
        if is_seen:
            yield Piece(number, place, *about, one.label, one.score)


def _shows(spans: np.ndarray, boxes: np.ndarray, size: Pair) -> np.ndarray:
    """Whether windows show all of boxes, [..., 4] of both: these touch none of their borders but the
    picture's."""
    starts = (spans[..., :2] < boxes[..., :2]) | (spans[..., :2] == 0)
    ends = (spans[..., 2:] > boxes[..., 2:]) | (spans[..., 2:] == size)
    return starts.all(-1) & ends.all(-1)


def _overlaps(every: np.ndarray) -> Iterator[tuple[int, int, Span]]:
    """The pairs of windows that overlap, and where."""
    for a, span in enumerate(every):
        start = np.maximum(span[:2], every[a + 1 :, :2])
        end = np.minimum(span[2:], every[a + 1 :, 2:])
        for b in np.flatnonzero((start < end).all(1)):
            yield a, a + 1 + int(b), Span(*start[b].tolist(), *end[b].tolist())


def _match(
    pieces: Sequence[Sequence[Piece]], spans: np.ndarray, strip: Span, size: Pair
) -> Iterator[tuple[float, Piece, Piece]]:
    """(how sure, piece, piece) of one class that are alike in the strip that two windows share."""
    cut, sides, frame = {}, (defaultdict(list), defaultdict(list)), None
    for side, own in zip(sides, pieces):
        for piece in own:
            box = piece.box
            if not all(x < y for x, y in zip((*box[:2], *strip[:2]), (*strip[2:], *box[2:]))):
                continue
            if id(piece.rle) not in cut:
                frame = frame or rle.move(
                    rle.encode(np.ones(np.subtract(strip[2:], strip[:2]))), strip[:2], size
                )
                cut[id(piece.rle)] = rle.intersection([piece.rle, frame])
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
    seen: Seen, spans: Sequence[Span], size: Pair, numbers: Sequence[np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What most votes are for at every pixel of a picture.

    Args:
        seen: segments of windows, which share no pixel within one.
        spans: of the windows.
        size: height and width of the picture.
        numbers: of every window int32 [1 + segments], what a vote for each counts for; the first is
            that of void, 0, and so is that of a segment that does not count.

    Returns:
        int32 [H, W], how many pixels each number has there, and for how many it had any vote.
    """
    tops, lefts = (sorted(set(starts)) for starts in list(zip(*spans))[:2])
    rows_at_once = sum(top < spans[0].bottom for top in tops) + 1

    @lru_cache(maxsize=rows_at_once * len(lefts))
    def paint(window: int) -> np.ndarray:
        span = spans[window]
        index = np.zeros((span.bottom - span.top, span.right - span.left), np.uint16)
        for place, one in enumerate(seen[window], 1):
            index[rle.decode(one.rle) > 0] = place
        return index

    ids = np.zeros(size, np.int32)
    count = partial(np.bincount, minlength=1 + max(int(each.max()) for each in numbers))
    owned, claimed = 0, 0
    scores = [np.array([0, *(one.score for one in segments)], np.float32) for segments in seen]
    every = np.array(spans)
    ends = [*tops[1:], size[0]], [*lefts[1:], size[1]]
    for (top, bottom), (left, right) in product(zip(tops, ends[0]), zip(lefts, ends[1])):
        near = (every[:, :2] < (bottom, right)).all(1) & (every[:, 2:] > (top, left)).all(1)
        near = np.flatnonzero(near).tolist()
        shape = len(near), bottom - top, right - left
        choice, votes = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
        for voter, window in enumerate(near):
            span = spans[window]
            rows = slice(max(top, span.top), min(bottom, span.bottom))
            columns = slice(max(left, span.left), min(right, span.right))
            index = paint(window)[_shift(rows, span.top), _shift(columns, span.left)]
            weight = _inside(rows, span.top, span.bottom, size[0])[:, None]
            weight = weight * _inside(columns, span.left, span.right, size[1])
            here = voter, _shift(rows, top), _shift(columns, left)
            choice[here] = numbers[window][index]
            votes[here] = np.where(choice[here] > 0, weight * scores[window][index], 0)
        total = sum(np.where(choice == choice[u], votes[u], 0) for u in range(len(near)))
        chosen = np.take_along_axis(choice, total.argmax(0)[None], 0)[0]
        ids[top:bottom, left:right] = chosen
        owned += count(chosen.ravel())
        for voter, own in enumerate(choice):
            claimed += count(own[(own != choice[:voter]).all(0)])
    return ids, owned, claimed


def _shift(part: slice, start: int) -> slice:
    return slice(part.start - start, part.stop - start)


def _inside(pixels: slice, start: int, end: int, side: int) -> np.ndarray:
    """How far inside a window the pixels of an axis lie, from each border that is not the picture's:
    above 0, 1 in the middle."""
    at, half = np.arange(pixels.start, pixels.stop) + 0.5, (end - start) / 2
    depth = np.full(len(at), half, np.float32)
    if start > 0:
        depth = np.minimum(depth, at - start)
    if end < side:
        depth = np.minimum(depth, end - at)
    return depth / half
