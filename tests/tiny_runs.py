"""Models on disk, one a task, that compile in seconds; their weights are random, but see segments."""

from pathlib import Path

import cv2
import jax
import numpy as np

from knet_jax.config.files import load_config, save_config
from knet_jax.model import make_model, variable_shapes
from knet_jax.saved.checkpoints import Checkpoints
from knet_jax.segmentation.segments import Categories

CONFIGS = Path(__file__).parents[1] / "configs"

OVERRIDES = (
    "--config.data.num_val=6",
    "--config.data.image_side=(48, 96)",
    "--config.model.channels=16",
    "--config.model.ffn_channels=32",
    "--config.model.num_heads=2",
    "--config.model.num_stages=1",
    "--config.model.backbone.width=8",
)
OF_TASKS = {
    "panoptic": (
        "--config.data.canvas=(64, 96)",
        "--config.data.short_side=(64, 64)",
        "--config.data.long_side=96",
        "--config.model.num_proposals=12",
        "--config.eval.instance_threshold=0.2",
        "--config.eval.overlap_threshold=0.05",
    ),
    "semantic": ("--config.data.scale=(96, 64)", "--config.data.eval_multiple=32"),
}
OF_TASKS["instance"] = (*OF_TASKS["panoptic"][:4], "--config.eval.num_results=20")

SHAPES = ("circle", "square", "triangle", "star", "cross")
PATTERNS = ("stripes", "checks", "dots", "noise")


def categories(task: str) -> Categories:
    """The classes of the drawn shapes, as the data of a task lists them."""
    names = SHAPES if task == "instance" else SHAPES + PATTERNS
    return Categories(names, tuple(range(1, 1 + len(names))), 0 if task == "semantic" else 5)


def write(workdir: Path, task: str, *overrides: str) -> Path:
    """Writes a run of one step."""
    spec = f"{CONFIGS / f'shapes_{task}.py'}:tiny"
    config = load_config(spec, [*OVERRIDES, *OF_TASKS[task], *overrides])
    workdir.mkdir(parents=True)
    save_config(config, workdir)
    shapes = variable_shapes(make_model(**config.model))
    variables = random_variables(shapes, np.random.default_rng(5))
    with Checkpoints(workdir / "checkpoints", model=config.model.to_dict()) as checkpoints:
        checkpoints.save(1, variables, {"categories": categories(task)._asdict()})
    return workdir


def picture(height: int = 64, width: int = 96, seed: int = 0) -> np.ndarray:
    """Smooth spots, uint8 [height, width, 3]."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 7, 3)).astype(np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def write_video(path: Path, seeds=range(5), size=(64, 96), rate=12, code="mp4v") -> None:
    """Writes a video of pictures."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*code), rate, size[::-1])
    for seed in seeds:
        writer.write(picture(*size, seed))
    writer.release()


def random_variables(shapes, rng: np.random.Generator):
    """Weights that see segments of all sorts, with scores from 0 to 1."""

    def draw(path, shape):
        *_, layer, name = (part.key for part in path)
        spread = 0.1 if len(shape.shape) < 2 else np.prod(shape.shape[:-1]) ** -0.5
        # Strong heads: masks with an outside, and classes that differ.
        spread *= 8 if layer == "output" and len(shape.shape) > 1 else 1
        return (rng.normal(name in ("scale", "var"), spread, shape.shape)).astype(shape.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)
