"""K-Net (Zhang et al., NeurIPS 2021) in JAX: kernels that segment, and refine themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from knet_jax.app.segmenter import Segmenter, load
    from knet_jax.segmentation.result import Result, Segment

__version__ = "0.1.0"
__all__ = ["Result", "Segment", "Segmenter", "load"]


def __getattr__(name: str) -> Any:
    """What a user of a trained model needs, imported when it is asked for: JAX takes seconds."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from knet_jax.app import segmenter
    from knet_jax.segmentation import result

    return getattr(result if name in ("Result", "Segment") else segmenter, name)
