"""K-Net (Zhang et al., NeurIPS 2021) in JAX: kernels that segment, and refine themselves."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from knet_jax.app.segmenter import Segmenter, load
    from knet_jax.config.files import load_config
    from knet_jax.segmentation.result import Result, Segment

__version__ = "0.1.0"
__all__ = ["Result", "Segment", "Segmenter", "load", "load_config"]

# Imported when they are asked for: JAX takes seconds.
MODULES = {
    "Result": "knet_jax.segmentation.result",
    "Segment": "knet_jax.segmentation.result",
    "Segmenter": "knet_jax.app.segmenter",
    "load": "knet_jax.app.segmenter",
    "load_config": "knet_jax.config.files",
}


def __getattr__(name: str) -> Any:
    """Imports a name of the library from the module that defines it."""
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(MODULES[name]), name)
