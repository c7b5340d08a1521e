"""Pictures in, segments out: a trained network as a function of pictures of any size.

segmenter = knet_jax.load("runs/demo")
result = segmenter("photo.jpg")
for segment in result.segments:
    print(segment.name, segment.score, segment.box)
result.save("segments.png")
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import numpy as np
from scipy import ndimage

from knet_jax import rle
from knet_jax.data import batches, kinds, transforms
from knet_jax.inference import lookahead, predict
from knet_jax.passes import both_ways
from knet_jax.resampling import Canvas
from knet_jax.runs import Run, open_run
from knet_jax.structs import EMPTY, Categories, Instance, PanopticMap
from knet_jax.tasks import TASKS

Image = np.ndarray | str | os.PathLike
"""uint8 [H, W, 3], RGB, or the path of a file."""

Box = tuple[int, int, int, int]
"""Left, top, width and height, in pixels."""

THRESHOLD = 0.3
"""Least score of a thing, where the config has none."""

BATCH_SIZE = 8
"""Pictures that are segmented together, but for the CPU, which takes one at a time."""


@dataclass(frozen=True, eq=False)
class Segment:
    """A thing or a kind of stuff in a picture."""

    id: int
    """In the panoptic map or, of instances, their number; from 1 on."""
    label: int
    """Class, the position of its name among the categories."""
    name: str
    is_thing: bool
    score: float
    """From 0 to 1; 1 for a class of semantic segmentation, which has none."""
    area: int
    """Pixels."""
    box: Box
    _source: Any = field(repr=False)
    """A map of ids [H, W], or run lengths."""

    @property
    def mask(self) -> np.ndarray:
        """bool [H, W]."""
        if isinstance(self._source, dict):
            return rle.decode(self._source).astype(bool)
        return self._source == self.id

    @property
    def rle(self) -> dict[str, Any]:
        """COCO's compressed run lengths of the mask: {"size": [height, width], "counts": bytes}."""
        return self._source if isinstance(self._source, dict) else rle.encode(self.mask)


@dataclass(frozen=True, eq=False)
class Result:
    """What a network sees in a picture."""

    task: str
    """`panoptic`, `instance` or `semantic`."""
    categories: Categories
    image: np.ndarray = field(repr=False)
    """uint8 [H, W, 3], RGB."""
    prediction: PanopticMap | tuple[Instance, ...] | np.ndarray = field(repr=False)
    """As metrics and files take it: a panoptic map, instances, or labels [H, W] (0 none, 1 + class)."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the picture."""
        return self.image.shape[:2]

    @property
    def panoptic(self) -> PanopticMap | None:
        """The picture cut into segments; None from other networks than panoptic ones."""
        return self.prediction if isinstance(self.prediction, PanopticMap) else None

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """Things and stuff of the picture, best score first; of semantic segmentation its classes."""
        if self.panoptic:
            return self._measure(
                self.panoptic.ids, [(s.id, s.label, s.score) for s in self.panoptic.segments]
            )
        if isinstance(self.prediction, np.ndarray):
            present = np.unique(self.prediction[self.prediction > 0]).tolist()
            return self._measure(
                self.prediction.astype(np.int32), [(value, value - 1, 1.0) for value in present]
            )
        return tuple(
            self._segment(i, one.label, one.score, int(one.area), rle.box(one.rle), one.rle)
            for i, one in enumerate(self.prediction, 1)
            if one.area  # a kernel may be sure of its class and claim no pixel
        )

    def _measure(
        self, ids: np.ndarray, found: Sequence[tuple[int, int, float]]
    ) -> tuple[Segment, ...]:
        """Segments of a map from (id, label, score)."""
        areas, boxes = np.bincount(ids.ravel()), ndimage.find_objects(ids)
        return tuple(
            self._segment(id, label, score, int(areas[id]), _box(boxes[id - 1]), ids)
            for id, label, score in found
        )

    def _segment(
        self, id: int, label: int, score: float, area: int, box: Box, source: Any
    ) -> Segment:
        names, num_things = self.categories.names, self.categories.num_things
        return Segment(id, label, names[label], label < num_things, score, area, box, source)

    @property
    def instances(self) -> tuple[Segment, ...] | None:
        """The things, best score first; None from a semantic network. Those of an instance network
        may overlap."""
        if isinstance(self.prediction, np.ndarray):
            return None
        return tuple(segment for segment in self.segments if segment.is_thing)

    @cached_property
    def semantic(self) -> np.ndarray | None:
        """int32 [H, W]: the class of every pixel, -1 = none; None from an instance network."""
        if isinstance(self.prediction, np.ndarray):
            return self.prediction.astype(np.int32) - 1
        if not self.panoptic:
            return None
        labels = np.full(1 + max((s.id for s in self.panoptic.segments), default=0), EMPTY)
        for segment in self.panoptic.segments:
            labels[segment.id] = segment.label
        return labels.astype(np.int32)[self.panoptic.ids]

    def above(self, threshold: float) -> Result:
        """The same without the things whose score is below a threshold."""
        if self.panoptic:
            kept = tuple(
                s
                for s in self.panoptic.segments
                if s.score >= threshold or s.label >= self.categories.num_things
            )
            values = np.zeros(1 + max((s.id for s in self.panoptic.segments), default=0), np.int32)
            for segment in kept:
                values[segment.id] = segment.id
            return replace(self, prediction=PanopticMap(values[self.panoptic.ids], kept))
        if isinstance(self.prediction, tuple):
            return replace(
                self, prediction=tuple(s for s in self.prediction if s.score >= threshold)
            )
        return self

    def draw(self, side: int | None = None) -> np.ndarray:
        """The picture under its segments, with outlines, names and scores: uint8 [h, w, 3], RGB.

        Args:
          side: the longer one of what is drawn, in pixels; default: that of the picture.
        """
        from knet_jax.visualize import overlay

        return overlay(self.image, self.prediction, self.categories, side)

    def save(self, path: str | os.PathLike) -> None:
        """Writes what `draw` gives, or, where the name ends in `.json`, what `to_coco` gives.

        Raises:
          ValueError: the name ends in something else.
          OSError: the file cannot be written.
        """
        path = Path(path)
        suffix = path.suffix.lower()
        if suffix == ".json":
            path.write_text(json.dumps(self.to_coco()) + "\n")
        elif suffix in transforms.PICTURES:
            from knet_jax.visualize import save_picture

            save_picture(path, self.draw())
        else:
            raise ValueError(
                f"{path} ends in {suffix!r}; accepted: .json, {', '.join(transforms.PICTURES)}"
            )

    def to_coco(self, image_id: int = 0) -> dict[str, Any] | list[dict[str, Any]]:
        """The segments as in COCO's results, masks as run lengths, ready for JSON.

        Of instances and of semantic classes a list of annotations; of a panoptic map one annotation
        with `segments_info`, each of which has its mask too.

        Args:
          image_id: of the picture.
        """
        records = [
            {
                "category_id": int(self.categories.dataset_ids[segment.label]),
                "segmentation": rle.to_json(segment.rle),
                "bbox": list(segment.box),
                "area": segment.area,
                "score": segment.score,
            }
            for segment in self.segments
        ]
        if not self.panoptic:
            return [{"image_id": image_id, **record} for record in records]
        infos = [
            {"id": segment.id, "isthing": int(segment.is_thing), "iscrowd": 0, **record}
            for segment, record in zip(self.segments, records)
        ]
        return {"image_id": image_id, "segments_info": infos}


def _box(found: tuple[slice, slice]) -> Box:
    rows, columns = found
    return columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start


class Segmenter:
    """A trained network as a function of pictures.

    The first picture of a size compiles a program, which later ones of about the same size share;
    so does the next process, from the cache on disk.

    Args:
      run: from `open_run`.
      batch_size: how many pictures are segmented together; default: 1 on a CPU, else 8.
    """

    def __init__(self, run: Run, batch_size: int | None = None):
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; accepted: a number of at least 1")
        config = run.config
        self.config = config
        self.categories = run.categories
        self.step = run.step
        self.task = config.task
        self.batch_size = batch_size or (1 if _platform() == "cpu" else BATCH_SIZE)
        self._task = TASKS[config.task]
        self._variables = jax.device_put(run.variables)
        options = config.eval.to_dict()
        recipe = kinds.find(config.task).recipe(config.data)
        self._recipes = [
            recipe.scaled(ratio) if ratio != 1 else recipe for ratio in options.get("scales", (1,))
        ]
        self._flip = options.get("flip", False)
        self.thresholds = {
            "instance_threshold": options.get("instance_threshold", THRESHOLD),
            "overlap_threshold": options.get("overlap_threshold", 0.0),
        }
        self._predict = jax.jit(
            partial(predict, model=run.model, task=self._task, options=options),
            static_argnames="canvas",
        )

    @property
    def num_programs(self) -> int:
        """How many have been compiled, or read from the cache on disk, for pictures so far."""
        return self._predict._cache_size()

    def __call__(
        self,
        images: Image | Sequence[Image],
        threshold: float | None = None,
        overlap: float | None = None,
    ) -> Result | list[Result]:
        """Segments a picture, or several.

        Args:
          images: a picture as uint8 [H, W, 3], RGB, or as the path of a file; or a list of such.
          threshold: least score of a thing; default: that of the config, else 0.3.
          overlap: least share of a mask that others leave it, for panoptic maps; default: that of
            the config.

        Returns:
          a result, or a list of results.

        Raises:
          ValueError: a file that cannot be read, or an array that is no picture.
        """
        if isinstance(images, list | tuple):
            return list(self.stream(images, threshold, overlap))
        [result] = self.stream([images], threshold, overlap)
        return result

    def stream(
        self,
        images: Iterable[Image],
        threshold: float | None = None,
        overlap: float | None = None,
    ) -> Iterator[Result]:
        """The results of pictures without end, in order, in constant memory.

        Args and errors as of a call. The next pictures are read while one is segmented.
        """
        given = {"instance_threshold": threshold, "overlap_threshold": overlap}
        for name, value in given.items():
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} is {value!r}; accepted: a number from 0 to 1")
        thresholds = self.thresholds | {k: v for k, v in given.items() if v is not None}
        return self._stream(iter(images), thresholds)

    def _stream(self, images: Iterator[Image], thresholds: dict[str, float]) -> Iterator[Result]:
        def started() -> Iterator[tuple[list[np.ndarray], list[tuple[list[int], Any]]]]:
            while chunk := [as_image(image) for image in islice(images, self.batch_size)]:
                groups = defaultdict(list)
                for i, image in enumerate(chunk):
                    groups[self._layout(image)].append(i)
                yield (
                    chunk,
                    [
                        (members, self._start([chunk[i] for i in members], *layout, thresholds))
                        for layout, members in groups.items()
                    ],
                )

        threshold = thresholds["instance_threshold"]
        for chunk, parts in lookahead(started()):
            results = {}
            for members, output in parts:
                arrays = jax.tree.map(np.asarray, output)
                for place, i in enumerate(members):
                    one = jax.tree.map(lambda x, place=place: x[place], arrays)
                    read = self._task.read(one, np.array(chunk[i].shape[:2]), threshold)
                    results[i] = Result(self.task, self.categories, chunk[i], read)
            yield from (results[i] for i in range(len(chunk)))

    def _layout(self, image: np.ndarray) -> tuple[tuple[tuple[int, int], ...], Canvas]:
        """The canvases of a picture: what the network is shown at every scale, and of the result."""
        size = image.shape[:2]
        shown = tuple(tuple(recipe.eval_canvas(size)) for recipe in self._recipes)
        largest = int(np.argmax([np.prod(canvas) for canvas in shown]))
        resized = self._recipes[largest].eval_size(size)
        return shown, Canvas.scaled(shown[largest], resized, size)

    def _start(
        self,
        images: Sequence[np.ndarray],
        shown: Sequence[tuple[int, int]],
        canvas: Canvas,
        thresholds: dict[str, float],
    ) -> Any:
        """Starts the program on pictures that share their canvases; those of one are never padded."""
        count = 1 if len(images) == 1 else self.batch_size
        scales = batches.empty_eval_batches(count, shown)
        for place, image in enumerate(images):
            for batch, recipe in zip(scales, self._recipes):
                view = transforms.whole(recipe.eval_size(image.shape[:2]))
                batches.fill(batch, place, place, image, view)
        passes, mirrored = zip(*both_ways(scales, self._flip))
        with jax.default_matmul_precision(self.config.precision):
            return self._predict(
                self._variables,
                passes,
                mirrored,
                scales[0].original_size,
                thresholds,
                canvas=canvas,
            )


def as_image(image: Image) -> np.ndarray:
    """A picture as uint8 [H, W, 3]. Raises ValueError where it is none."""
    if isinstance(image, str | os.PathLike):
        return transforms.read_image(image)
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or not array.size:
        raise ValueError(
            f"a picture is {array.dtype} {list(array.shape)}; accepted: uint8 [H, W, 3] in RGB, "
            "or the path of a file"
        )
    return array


def load(
    path: str | os.PathLike,
    checkpoint: str | int = "best",
    ema: bool = False,
    dtype: str | None = None,
    batch_size: int | None = None,
    overrides: Sequence[str] = (),
) -> Segmenter:
    """Opens a model for pictures of any kind.

    Programs that take long to compile are kept in the folder that JAX_COMPILATION_CACHE_DIR names,
    else in `knet_jax` of the user's cache, so that the second start is fast.

    Args:
      path: the folder of a run of train.py, or of a conversion.
      checkpoint: `best`, `latest`, or the number of a step.
      ema: the moving average of the parameters instead of the parameters.
      dtype: of the feature maps, `float32` or `bfloat16`; default: bfloat16, on a CPU the config's.
      batch_size: how many pictures are segmented together; default: 1 on a CPU, else 8.
      overrides: `--config.x.y=value` arguments that change the config.

    Raises:
      ValueError: there is no such model or checkpoint, or something in it does not fit.
    """
    keep_programs()
    if dtype is None and _platform() != "cpu":
        dtype = "bfloat16"
    return Segmenter(open_run(path, checkpoint, ema, overrides, dtype), batch_size)


def keep_programs() -> None:
    """Turns on JAX's cache on disk, unless the environment or the program already has its own."""
    if jax.config.jax_compilation_cache_dir is None:
        root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        jax.config.update(
            "jax_compilation_cache_dir", str(Path(root).expanduser() / "knet_jax" / "programs")
        )


def _platform() -> str:
    return jax.devices()[0].platform
