"""Pictures in, segments out: a trained network as a function of pictures of any size.

segmenter = knet_jax.load("runs/demo")  # or a file of weights
result = segmenter("photo.jpg")
for segment in result.segments:
    print(segment.name, segment.score, segment.box)
result.save("segments.png")
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from itertools import islice
from numbers import Integral, Real
from typing import Any

import jax
import numpy as np

from knet_jax.data import recipes, transforms
from knet_jax.data.canvas import empty_eval_batches, fill
from knet_jax.inference.forward import lookahead, predict
from knet_jax.inference.multiscale import both_ways
from knet_jax.inference.resampling import Canvas
from knet_jax.saved.models import Model, open_model
from knet_jax.segmentation import image_files
from knet_jax.segmentation.result import Result
from knet_jax.segmentation.segments import MIN_SCORE
from knet_jax.system.compilation_cache import keep_programs
from knet_jax.system.errors import UserError
from knet_jax.tasks import TASKS

Image = np.ndarray | str | os.PathLike
"""uint8 [H, W, 3], RGB, or the path of a file."""

BATCH_SIZE = 8
"""Pictures that are segmented together, but for the CPU, which takes one at a time."""


class Segmenter:
    """A trained network as a function of pictures.

    The first picture of a size compiles a program, which later ones of about the same size share;
    so does the next process, from the cache on disk.

    Args:
      run: from `open_model`.
      batch_size: how many pictures are segmented together; default: 1 on a CPU, else 8.
    """

    def __init__(self, run: Model, batch_size: int | None = None):
        if batch_size is not None and not (_is_number(batch_size, Integral) and batch_size >= 1):
            raise UserError(
                f"batch_size is {batch_size!r}; accepted: a whole number of at least 1, or None"
            )
        config = run.config
        self.config = config
        self.categories = run.categories
        self.step = run.step
        self.task = config.task
        self.batch_size = int(batch_size or default_batch_size())
        self._task = TASKS[config.task]
        self._run: Model | None = run
        self._shapes = jax.eval_shape(lambda: run.variables)
        options = config.eval.to_dict()
        recipe = recipes.find(config.task, config.data)
        self._recipes = recipes.at_ratios(recipe, options.get("scales", (1,)))
        self._flip = options.get("flip", False)
        self.thresholds = {
            "instance_threshold": options.get("instance_threshold", MIN_SCORE),
            "overlap_threshold": options.get("overlap_threshold", 0.0),
        }
        self._predict = jax.jit(
            partial(predict, model=run.model, task=self._task, options=options),
            static_argnames="canvas",
        )

    @cached_property
    def _variables(self) -> Any:
        variables = jax.device_put(self._run.variables)
        self._run = None  # which holds them on the host
        return variables

    @property
    def num_programs(self) -> int:
        """How many have been called for pictures so far."""
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
        for name, value in {"threshold": threshold, "overlap": overlap}.items():
            if value is not None and not (_is_number(value, Real) and 0 <= value <= 1):
                raise UserError(f"{name} is {value!r}; accepted: a number from 0 to 1, or None")
        given = {"instance_threshold": threshold, "overlap_threshold": overlap}
        thresholds = self.thresholds | {k: float(v) for k, v in given.items() if v is not None}
        return self._stream(iter(images), thresholds)

    def prepare(self, images: Image | Iterable[Image]) -> None:
        """Makes the programs for pictures, or for others of their sizes, before these come.

        Args:
          images: as of a call: those that come together are segmented together, by a program of
            their own.
        """
        images = iter([images] if isinstance(images, Image) else images)
        while chunk := [as_image(image) for image in islice(images, self.batch_size)]:
            for _, args, canvas in self._arguments(chunk, self.thresholds):
                with jax.default_matmul_precision(self.config.precision):
                    self._predict.lower(self._shapes, *args, canvas=canvas).compile()

    def _stream(self, images: Iterator[Image], thresholds: dict[str, float]) -> Iterator[Result]:
        def started() -> Iterator[tuple[list[np.ndarray], list[tuple[list[int], Any]]]]:
            while chunk := [as_image(image) for image in islice(images, self.batch_size)]:
                outputs = []
                for members, args, canvas in self._arguments(chunk, thresholds):
                    with jax.default_matmul_precision(self.config.precision):
                        output = self._predict(self._variables, *args, canvas=canvas)
                    outputs.append((members, output))
                yield chunk, outputs

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

    def _arguments(
        self, images: Sequence[np.ndarray], thresholds: dict[str, float]
    ) -> Iterator[tuple[list[int], tuple[Any, ...], Canvas]]:
        """What the program takes besides the network: once for the pictures that share their canvases,
        with their places among `images`. A picture that is alone on its canvases is never padded."""
        groups = defaultdict(list)
        for i, image in enumerate(images):
            groups[self._layout(image)].append(i)
        for (shown, canvas), members in groups.items():
            count = 1 if len(members) == 1 else self.batch_size
            scales = empty_eval_batches(count, shown)
            for place, i in enumerate(members):
                for batch, recipe in zip(scales, self._recipes):
                    view = transforms.whole(recipe.eval_size(images[i].shape[:2]))
                    fill(batch, place, place, images[i], view)
            passes, mirrored = zip(*both_ways(scales, self._flip))
            yield members, (passes, mirrored, scales[0].original_size, thresholds), canvas


def default_batch_size() -> int:
    """How many pictures are segmented together on this machine, where nothing else is said."""
    return 1 if _platform() == "cpu" else BATCH_SIZE


def as_image(image: Image) -> np.ndarray:
    """A picture as uint8 [H, W, 3], a copy. Raises ValueError where it is none."""
    if isinstance(image, str | os.PathLike):
        return image_files.read_image(image)
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or not array.size:
        raise UserError(
            f"a picture is {array.dtype} {list(array.shape)}; accepted: uint8 [H, W, 3] in RGB, "
            "or the path of a file"
        )
    return array.copy()  # what the caller does to a picture changes no result


def load(
    path: str | os.PathLike,
    checkpoint: str | int = "best",
    ema: bool = False,
    dtype: str | None = None,
    batch_size: int | None = None,
    overrides: Sequence[str] = (),
    config: str | None = None,
    first: Image | Iterable[Image] = (),
) -> Segmenter:
    """Opens a model for pictures of any kind.

    knet_jax.load("runs/demo")
    knet_jax.load("demo.safetensors")
    knet_jax.load("knet.pth", config="configs/coco_panoptic.py")

    Programs that take long to compile are kept in the folder that JAX_COMPILATION_CACHE_DIR names,
    else in `knet_jax` of the user's cache, so that the second start is fast.

    Args:
      path: the folder of a run of train.py, or of a conversion; the file that `knet_jax.convert`
        makes of it; or, with a config, a checkpoint that others wrote, as `knet_jax.convert` takes it.
      checkpoint: of a folder: `best`, `latest`, or the number of a step.
      ema: of a folder: the moving average of the parameters instead of the parameters.
      dtype: of the feature maps, `float32` or `bfloat16`; default: bfloat16, on a CPU the config's.
      batch_size: how many pictures are segmented together; default: 1 on a CPU, else 8.
      overrides: `--config.x.y=value` arguments that change the config.
      config: `configs/FILE.py` or `configs/FILE.py:variant,variant`, of a checkpoint that others
        wrote.
      first: pictures that will come first, or others of their sizes, as for `Segmenter.prepare`.
        Their programs are made while the weights of a folder are read, so that the first result
        comes earlier.

    Raises:
      ValueError: an argument is of another kind, there is no such model or checkpoint, or something
        in it does not fit.
    """
    keep_programs()
    if dtype is None and _platform() != "cpu":
        dtype = "bfloat16"
    run = open_model(path, checkpoint, ema, overrides, dtype, config=config)
    segmenter = Segmenter(run, batch_size)
    with ThreadPoolExecutor(1) as reader:
        reading = reader.submit(lambda: segmenter._variables)
        segmenter.prepare(first)
        reading.result()
    return segmenter


def _is_number(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _platform() -> str:
    return jax.devices()[0].platform
