"""K-Net (Zhang et al., NeurIPS 2021) in JAX: kernels that segment, and refine themselves.

import knet_jax
config = knet_jax.load_config("coco_panoptic:r101", {"optim.lr": 2e-4})
knet_jax.train(config, "runs/r101")
knet_jax.evaluate("runs/r101")
segmenter = knet_jax.load("runs/r101")
"""

from __future__ import annotations

from importlib import import_module

TYPE_CHECKING = False  # as typing's, whose import takes as long as all others here
if TYPE_CHECKING:
    from knet_jax.app.predict import predict_files
    from knet_jax.app.segmenter import Segmenter, load
    from knet_jax.config.files import load_config
    from knet_jax.data.prepare import prepare_dataset
    from knet_jax.segmentation.result import Result, Segment
    from knet_jax.training.evaluation import analyse, evaluate
    from knet_jax.training.loop import train

__version__ = "0.1.0"
__all__ = [
    "Result",
    "Segment",
    "Segmenter",
    "analyse",
    "evaluate",
    "load",
    "load_config",
    "predict_files",
    "prepare_dataset",
    "train",
]

# Imported when they are asked for: JAX takes seconds, and training needs the most.
MODULES = {
    "Result": "knet_jax.segmentation.result",
    "Segment": "knet_jax.segmentation.result",
    "Segmenter": "knet_jax.app.segmenter",
    "analyse": "knet_jax.training.evaluation",
    "evaluate": "knet_jax.training.evaluation",
    "load": "knet_jax.app.segmenter",
    "load_config": "knet_jax.config.files",
    "predict_files": "knet_jax.app.predict",
    "prepare_dataset": "knet_jax.data.prepare",
    "train": "knet_jax.training.loop",
}


def __getattr__(name: str) -> object:
    """Imports a name of the library from the module that defines it."""
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(MODULES[name]), name)
