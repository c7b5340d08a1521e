"""Looking inside a network: what is gathered over an evaluation, and the folder that shows it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from knet_jax.analysis import findings, page
from knet_jax.analysis.findings import KINDS, MISSED, NUM_BINS, RIGHT, SIDES, Findings, Verdict
from knet_jax.analysis.gallery import Gallery
from knet_jax.data.prepared_split import Split
from knet_jax.metrics.counts import Prediction, Rounds, rows_of_classes
from knet_jax.segmentation import rle
from knet_jax.segmentation.drawing import Segmentation, draw_all, save_picture, strip
from knet_jax.segmentation.segments import PanopticMap
from knet_jax.system import processes
from knet_jax.system.output_files import write_whole
from knet_jax.tasks import Task

NUM_SHOWN = 4
"""How many pictures are shown after every update."""
NUM_WORST = 12
"""How many of the worst pictures are shown."""
NUM_PAIRS = 20
"""How many pairs of confused classes are listed."""
NUMBERS = (0, 1, 2, 3, 5, 9, 17, 33)
"""Ranges of the number of objects in a picture begin here."""
SIDE = 400
"""Longer side of a picture that is shown, in pixels."""


class Judged(NamedTuple):
    """A picture, how good it is, and what is wrong with it."""

    quality: float
    one: Prediction
    verdicts: list[Verdict]


class Analysis:
    """Gathers what an evaluation shows of a network, picture by picture.

    But for the few pictures that will be shown it keeps sums, and the counts of the task's metric.

    Args:
        model: `config.model`.
        num_images: only the first so many pictures are looked at; their predictions have `earlier`
            results and `activity`.
    """

    def __init__(self, split: Split, task: Task, model: Mapping[str, Any], num_images: int):
        self._split, self._task, self._model = split, task, model
        self._num_images = min(num_images, len(split))
        categories, num_kernels = split.categories, model["num_proposals"] + model["num_stuff"]
        self.rounds = Rounds(task.metric, categories, model["num_stages"])
        """Scores of the pictures that are looked at, after every update."""
        self._found = findings.no_findings(len(categories.names), num_kernels)
        self._num_objects: dict[int, int] = {}
        self._gallery = Gallery(split, NUM_SHOWN, self._num_images)
        self._worst: list[Judged] = []

    def add(self, predictions: Sequence[Prediction]) -> None:
        """Looks at those of some predictions that are among the first pictures."""
        predictions = [one for one in predictions if one.index < self._num_images]
        self._gallery.add(predictions)
        for one in predictions:
            self.rounds.add(one, self._split.image_id(one.index))
            overlaps = findings.compare(one.truth, one.prediction)
            verdicts = findings.judge(overlaps)
            maps = (one.truth, one.prediction) if isinstance(one.truth, np.ndarray) else None
            categories = self._split.categories
            found = findings.find(overlaps, verdicts, categories, one.activity, maps)
            for total, part in zip(self._found, found):
                np.add(total, part, out=total)
            self._num_objects[one.index] = int(overlaps.objects(categories).sum())
            small = one._replace(earlier=(), activity=None)
            judged = Judged(findings.quality(overlaps, verdicts), small, verdicts)
            self._worst = _worst([*self._worst, judged])

    def write(self, folder: Path, about: Mapping[str, Any]) -> dict[str, Any]:
        """Writes analysis.json, the page and its pictures. Every process must call it.

        Args:
            folder: created if need be.
            about: what else analysis.json shall hold: the step, the split.

        Returns:
            What analysis.json holds: `about`; `num_images`; `rounds`, what the metric says after 0, 1 …
            updates; `classes`, how many segments of each are right, confused …; `confusion`, `sizes`,
            `num_objects`, `calibration` (None where results have no scores), `kernels`; and the
            pictures, `shown` and `worst` with their mistakes. Shares and scores are in percent.
        """
        found = Findings(*map(sum, zip(*processes.exchange(self._found))))
        shown = self._gallery.kept()
        worst = _worst(chain.from_iterable(processes.exchange(self._worst)))
        names, has_proposals = self._split.categories.names, self._model["num_proposals"] > 0
        report = dict(about) | {
            "num_images": int(found.pictures),
            "rounds": self.rounds.rows(),
            "classes": rows_of_classes(self._split.categories, dict(zip(KINDS, found.kinds.T))),
            "confusion": _confusion(found, names, "segments" if has_proposals else "pixels"),
            "sizes": _sizes(found),
            "num_objects": self._by_number(),
            "calibration": _calibration(found),
            "kernels": self._kernels(found),
            "shown": [
                {"image": self._split.file_name(one.index), "picture": f"shown/{i}.jpg"}
                for i, one in enumerate(shown)
            ],
            "worst": [
                {
                    "image": self._split.file_name(judged.one.index),
                    "picture": f"worst/{i}.jpg",
                    "quality": round(100 * judged.quality, 1),
                    "mistakes": _mistakes(judged.verdicts, names),
                }
                for i, judged in enumerate(worst)
            ],
        }
        if processes.is_main():
            for entry, one in zip(report["shown"], shown):
                save_picture(folder / entry["picture"], self._draw_rounds(one))
            for entry, judged in zip(report["worst"], worst):
                save_picture(folder / entry["picture"], self._draw_mistakes(judged))
            maps = found.activity / (255 * max(1, int(found.pictures)))
            write_whole(folder / "analysis.json", (json.dumps(report, indent=1) + "\n").encode())
            write_whole(folder / page.PAGE, page.render(report, maps).encode())
        return report

    def _by_number(self) -> list[dict[str, Any]]:
        """The first number of the metric of the pictures with so many objects; None without truth."""
        rows, [name, *_] = [], self._task.metric.HEADLINE
        for low, high in zip(NUMBERS, (*NUMBERS[1:], None)):
            only = {i for i, n in self._num_objects.items() if low <= n < (high or np.inf)}
            count = sum(processes.exchange(len(only)))
            score = self.rounds.scores(only)[name]
            has_truth = count and (low or self._model["num_stuff"])
            row = {"from": low, "below": high, "images": count, name: score if has_truth else None}
            rows.append(row)
        return rows

    def _kernels(self, found: Findings) -> list[dict[str, Any]]:
        """Mean activity and classes of every kernel."""
        categories, num_proposals = self._split.categories, self._model["num_proposals"]
        stuff = categories.names[categories.num_things if num_proposals else 0 :]
        pictures = max(1, int(found.pictures))
        means = 100 * found.activity.mean((1, 2)) / (255 * pictures)
        return [
            {
                "kernel": i,
                "stuff": stuff[i - num_proposals] if i >= num_proposals else None,
                "activity": round(float(mean), 3),
                "serves": serves.tolist(),
            }
            for i, (mean, serves) in enumerate(zip(means, found.serves))
        ]

    def _draw_rounds(self, one: Prediction) -> np.ndarray:
        """A picture, its masks after 0, 1 … updates, and the truth."""
        title, image = self._split.file_name(one.index), self._split.image(one.index)
        rounds = enumerate((*one.earlier, one.prediction))
        results = {f"after update {i}" if i else "before updates": result for i, result in rounds}
        results["truth"] = one.truth
        return strip(draw_all(title, image, results, self._split.categories, SIDE))

    def _draw_mistakes(self, judged: Judged) -> np.ndarray:
        """A picture, its truth, its prediction, and outlines of what is wrong."""
        one = judged.one
        title, image = self._split.file_name(one.index), self._split.image(one.index)
        both = {"truth": one.truth, "prediction": one.prediction}
        drawn = draw_all(title, image, both, self._split.categories, SIDE)
        marked = drawn[0][1].copy()
        for verdict in judged.verdicts:
            if verdict.kind == RIGHT:
                continue
            side = "truth" if verdict.kind == MISSED else "prediction"
            mask = _mask(getattr(one, side), getattr(verdict, side))
            mask = cv2.resize(mask, marked.shape[1::-1], interpolation=cv2.INTER_NEAREST)
            lines, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
            cv2.drawContours(marked, lines, -1, page.COLORS[verdict.kind], 3)
        return strip([*drawn, ("mistakes", marked)])


def _worst(judged: Iterable[Judged]) -> list[Judged]:
    """The worst pictures that are not perfect, the worst first."""
    flawed = (each for each in judged if each.quality < 1)
    return sorted(flawed, key=lambda each: (each.quality, each.one.index))[:NUM_WORST]


def _mask(segmentation: Segmentation, position: int) -> np.ndarray:
    """The mask of a segment, uint8 [H, W], at its position in `Overlaps`."""
    if isinstance(segmentation, np.ndarray):
        segmentation = PanopticMap.of_labels(segmentation)
    if isinstance(segmentation, PanopticMap):
        return (segmentation.ids == segmentation.segments[position].id).astype(np.uint8)
    return rle.decode(segmentation[position].rle)


def _share(part: float, whole: float) -> float | None:
    """A share in percent, None of nothing."""
    return round(100 * float(part) / float(whole), 2) if whole else None


def _confusion(found: Findings, names: Sequence[str], unit: str) -> dict[str, Any]:
    """The matrix, and the pairs of classes that are most often confused."""
    counts = found.confusion
    between = counts[:-1, :-1].copy()
    np.fill_diagonal(between, 0)
    pairs = [divmod(int(i), len(names)) for i in np.argsort(-between, axis=None, kind="stable")]
    return {
        "unit": unit,
        "names": [*names, page.NOTHING],
        "counts": counts.tolist(),
        "pairs": [
            {
                "true": names[true],
                "predicted": names[predicted],
                "count": int(between[true, predicted]),
                "share": _share(between[true, predicted], counts[true].sum()),
            }
            for true, predicted in pairs[:NUM_PAIRS]
            if between[true, predicted]
        ],
    }


def _sizes(found: Findings) -> list[dict[str, Any]]:
    """Objects by the side of a square of their area."""
    return [
        {
            "from": low,
            "below": high,
            "objects": int(count),
            "found": _share(hits, count),
            "IoU": _share(iou, count),
        }
        for low, high, (count, hits, iou) in zip(SIDES, (*SIDES[1:], None), found.sizes)
    ]


def _calibration(found: Findings) -> dict[str, Any] | None:
    """Mean score and mean IoU by score, and by how much they differ on average."""
    counts, scores, ious = found.calibration.T
    if not counts.any():
        return None
    bins = [
        {
            "from": i / NUM_BINS,
            "below": (i + 1) / NUM_BINS,
            "predictions": int(count),
            "score": _share(score, count),
            "IoU": _share(iou, count),
        }
        for i, (count, score, iou) in enumerate(zip(counts, scores, ious))
    ]
    return {"error": _share(np.abs(scores - ious).sum(), counts.sum()), "bins": bins}


def _mistakes(verdicts: Sequence[Verdict], names: Sequence[str]) -> list[dict[str, Any]]:
    """What is wrong, the kinds in their order."""
    return [
        {
            "kind": KINDS[verdict.kind],
            "true": None if verdict.true_label is None else names[verdict.true_label],
            "predicted": None if verdict.label is None else names[verdict.label],
            "IoU": round(100 * verdict.iou, 1),
        }
        for verdict in sorted(verdicts, key=lambda verdict: verdict.kind)
        if verdict.kind != RIGHT
    ]
