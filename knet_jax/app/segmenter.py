"""Pictures in, segments out: a trained network as a function of pictures of any size."""

from __future__ import annotations

import os
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, partial
from itertools import islice
from numbers import Integral, Real
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from knet_jax.app.tracking import Tracker
from knet_jax.data import recipes, transforms
from knet_jax.data.canvas import empty_batch, fill
from knet_jax.inference.forward import lookahead, predict, with_kernels
from knet_jax.inference.multiscale import both_ways
from knet_jax.inference.resampling import ResultCanvas
from knet_jax.inference.windows import Windows
from knet_jax.saved.checkpoint_record import leaf_paths, make_record
from knet_jax.saved.models import Model, open_model
from knet_jax.segmentation import image_files
from knet_jax.segmentation.result import Result
from knet_jax.segmentation.segments import MIN_SCORE
from knet_jax.structs import EMPTY
from knet_jax.system.backend import start_backend
from knet_jax.system.errors import UserError
from knet_jax.tasks import TASKS

Image = np.ndarray | str | os.PathLike
"""uint8 [H, W, 3], RGB, or the path of a file."""

BATCH_SIZE = 8
"""How many pictures are segmented together, but for the CPU, which takes one at a time."""


class Segmenter:
    """A trained network as a function of pictures.

    The first picture of a size compiles a program, which later ones of about the same size share;
    so does the next process, from the cache on disk.

    Args:
        model: from `open_model`.
        batch_size: how many pictures are segmented together; default: 1 on a CPU, else 8.
    """

    def __init__(self, model: Model, batch_size: int | None = None):
        if batch_size is not None and not (_is_number(batch_size, Integral) and batch_size >= 1):
            raise UserError(
                f"batch_size is {batch_size!r}; accepted: a whole number of at least 1, or None"
            )
        config = model.config
        self.config = config
        self.categories = model.categories
        self.step = model.step
        self.task = config.task
        self.batch_size = int(batch_size or (1 if _platform() == "cpu" else BATCH_SIZE))
        self._task = TASKS[config.task]
        self._variables = jax.device_put(model.variables)
        options = config.eval.to_dict()
        recipe = recipes.find(config.task, config.data)
        self._recipes = recipes.at_ratios(recipe, options.get("scales", (1,)))
        self._flip = options.get("flip", False)
        self.thresholds = {
            "instance_threshold": options.get("instance_threshold", MIN_SCORE),
            "overlap_threshold": options.get("overlap_threshold", 0.0),
        }
        inside, self._windows = self._task.place_windows(options)
        results = partial(
            self._task.predict, **self._task.choose_options(model.network.sizes, options)
        )
        self._predict, self._predict_with_kernels = (
            jax.jit(
                partial(predict, model=model.network, results=each, **inside),
                static_argnames="canvas",
            )
            for each in (results, with_kernels(results))
        )

    @cached_property
    def digest(self) -> str:
        """Names what decides its results: weights, config (with the type of feature maps), classes."""
        arrays = map(np.asarray, jax.tree.leaves(self._variables))
        about = {"config": self.config.to_dict(), "categories": self.categories}
        return make_record(dict(zip(leaf_paths(self._variables), arrays)), **about)["digest"]

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
            overlap: of panoptic models: a segment is dropped where others hide so much of its mask
                that less than this share is left; default: that of the config.

        Returns:
            A result for a picture, a list of results for a list.

        Raises:
            UserError: a file cannot be read, an array is no picture, or a threshold is not from 0
                to 1.
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
        """Segments one picture after the other, any number of them, in constant memory.

        The next pictures are read while one is segmented.

        Args:
            images: the pictures, as for a call of the segmenter.
            threshold: as for a call.
            overlap: as for a call.

        Returns:
            The results in the order of the pictures; drawing one raises what a call raises.

        Raises:
            UserError: a threshold is not from 0 to 1.
        """
        return self._stream(as_images(images), self._thresholds(threshold, overlap))

    def _stream(
        self, images: Iterator[np.ndarray], thresholds: dict[str, float]
    ) -> Iterator[Result]:
        begun: deque[tuple[np.ndarray, Windows, tqdm]] = deque()

        def parts() -> Iterator[np.ndarray]:
            for image in images:
                windows = Windows(image.shape[:2], **self._windows)
                total = len(windows.spans)
                hidden = None if total > 1 else True  # None: unless stderr is a terminal
                bar = tqdm(desc="windows", total=total, leave=False, delay=2, disable=hidden)
                begun.append((image, windows, bar))
                for top, left, bottom, right in windows.spans.tolist():
                    yield image[top:bottom, left:right]

        num_things, overlap = self.categories.num_things, thresholds["overlap_threshold"]
        for part, found in self._see(parts(), thresholds, self._predict):
            image, windows, bar = begun[0]
            bar.update()
            if windows.add(self._task.read(found, np.array(part.shape[:2]))):
                begun.popleft()
                bar.close()
                joined = windows.join(self._task, num_things, overlap)
                yield Result(self.task, self.categories, image, joined)

    def track(
        self,
        frames: Iterable[Image],
        threshold: float | None = None,
        overlap: float | None = None,
        tracker: Tracker | None = None,
    ) -> Iterator[Result]:
        """Segments the frames of a video, and gives every thing an identity that stays.

        It is the `track` of a segment. Frames are taken one after the other, in constant memory.

        Args:
            frames: in their order, as for a call of the segmenter.
            threshold: as for a call.
            overlap: as for a call.
            tracker: tells which thing is which; default: a `Tracker` as it is by default. One that has
                seen earlier frames goes on from these.

        Returns:
            The results in the order of the frames.

        Raises:
            UserError: the model is one of semantic segmentation, or segments window by window; or an
                argument is not accepted.
        """
        if self.task == "semantic":
            raise UserError("a semantic model has no things to track; accepted: panoptic, instance")
        if self.config.eval.get("window"):
            raise UserError(
                f"config.eval.window is {self.config.eval.window}: a thing has a kernel in each window, "
                "and none to be tracked by; accepted: ()"
            )
        tracker, thresholds = tracker or Tracker(), self._thresholds(threshold, overlap)
        seen = self._see(as_images(frames), thresholds, self._predict_with_kernels)
        return (
            tracker.update(self._read(image, found), kernels[found.labels != EMPTY])
            for image, (found, kernels) in seen
        )

    def _thresholds(self, threshold: float | None, overlap: float | None) -> dict[str, float]:
        for name, value in {"threshold": threshold, "overlap": overlap}.items():
            if value is not None and not (_is_number(value, Real) and 0 <= value <= 1):
                raise UserError(f"{name} is {value!r}; accepted: a number from 0 to 1, or None")
        given = {"instance_threshold": threshold, "overlap_threshold": overlap}
        return self.thresholds | {k: float(v) for k, v in given.items() if v is not None}

    def _read(self, image: np.ndarray, found: Any) -> Result:
        read = self._task.read(found, np.array(image.shape[:2]))
        return Result(self.task, self.categories, image, read)

    def _see(
        self,
        images: Iterator[np.ndarray],
        thresholds: dict[str, float],
        program: Callable[..., Any],
    ) -> Iterator[tuple[np.ndarray, Any]]:
        """Yields every picture with the output of a compiled program about it, on the host."""

        def started() -> Iterator[tuple[list[np.ndarray], list[tuple[list[int], Any]]]]:
            while chunk := list(islice(images, self.batch_size)):
                yield chunk, self._start(chunk, thresholds, program)

        for chunk, parts in lookahead(started()):
            outputs = {}
            for members, output in parts:
                arrays = jax.tree.map(np.asarray, output)
                for place, i in enumerate(members):
                    outputs[i] = jax.tree.map(lambda x, place=place: x[place], arrays)
            yield from ((image, outputs[i]) for i, image in enumerate(chunk))

    def _layout(self, image: np.ndarray) -> tuple[tuple[tuple[int, int], ...], ResultCanvas]:
        """Chooses the canvases of a picture: of the input at every scale, and of the result."""
        size = image.shape[:2]
        shown = tuple(tuple(recipe.eval_canvas(size)) for recipe in self._recipes)
        largest = int(np.argmax([np.prod(canvas) for canvas in shown]))
        resized = self._recipes[largest].eval_size(size)
        return shown, ResultCanvas.scaled(shown[largest], resized, size)

    def _start(
        self,
        images: Sequence[np.ndarray],
        thresholds: dict[str, float],
        program: Callable[..., Any],
    ) -> list[tuple[list[int], Any]]:
        """Starts the network, once for the pictures that share their canvases.

        A batch of several pictures is padded to `batch_size`; a single picture is not.

        Returns:
            For every such group, its places among `images` and its output on the device.
        """
        thresholds = {name: thresholds[name] for name in self._task.thresholds}
        groups = defaultdict(list)
        for i, image in enumerate(images):
            groups[self._layout(image)].append(i)
        outputs = []
        for (shown, canvas), members in groups.items():
            count = 1 if len(members) == 1 else self.batch_size
            scales = tuple(empty_batch(count, each) for each in shown)
            for place, i in enumerate(members):
                for batch, recipe in zip(scales, self._recipes):
                    view = transforms.whole(recipe.eval_size(images[i].shape[:2]))
                    fill(batch, place, place, images[i], view)
            passes, mirrored = zip(*both_ways(scales, self._flip))
            with jax.default_matmul_precision(self.config.precision):
                output = program(
                    self._variables,
                    passes,
                    mirrored,
                    scales[0].original_size,
                    thresholds,
                    canvas=canvas,
                )
            outputs.append((members, output))
        return outputs


def as_images(images: Iterable[Image]) -> Iterator[np.ndarray]:
    """Reads or copies one picture after the other. Raises UserError where they are a single path."""
    if isinstance(images, str | os.PathLike):
        raise UserError(f"{images} is one path; accepted: a list of pictures, or frames of a video")
    return map(as_image, images)


def as_image(image: Image) -> np.ndarray:
    """Reads or copies a picture, as uint8 [H, W, 3]. Raises UserError where it is none."""
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
) -> Segmenter:
    """Opens a trained model, to segment pictures of any size with it.

        knet_jax.load("runs/demo")
        knet_jax.load("demo.safetensors")
        knet_jax.load("knet.pth", config="configs/coco_panoptic.py")

    Compiled programs are kept in the folder that JAX_COMPILATION_CACHE_DIR names, else in
    `knet_jax/programs` of the user's cache, so that the second start is fast.

    Args:
        path: the folder of a run of train.py, or of a conversion; the file that
            `knet_jax.convert` makes of it; or, with a config, a checkpoint of other code, as
            `knet_jax.convert` takes it.
        checkpoint: of a folder: `best`, `latest`, or the number of a step.
        ema: of a folder: the moving average of the parameters instead of the parameters.
        dtype: of the feature maps, `float32` or `bfloat16`; default: bfloat16, on a CPU the config's.
        batch_size: how many pictures are segmented together; default: 1 on a CPU, else 8.
        overrides: `--config.x.y=value` arguments that change the config.
        config: `configs/FILE.py` or `configs/FILE.py:variant,variant`, of a checkpoint of other
            code.

    Raises:
        UserError: an argument is of another kind, there is no such model or checkpoint, or something
            in it does not fit.
    """
    start_backend()
    if dtype is None and _platform() != "cpu":
        dtype = "bfloat16"
    return Segmenter(open_model(path, checkpoint, ema, overrides, dtype, config=config), batch_size)


def _is_number(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _platform() -> str:
    return jax.devices()[0].platform
