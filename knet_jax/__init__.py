"""K-Net (Zhang et al., NeurIPS 2021) in JAX: kernels that segment, and refine themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from knet_jax.results import Result, Segment
    from knet_jax.segmenter import Segmenter, load

__version__ = "0.1.0"
__all__ = ["Result", "Segment", "Segmenter", "load"]


def __getattr__(name: str) -> Any:
    """What a user of a trained model needs, imported when it is asked for: JAX takes seconds."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from knet_jax import results, segmenter

    return getattr(results if name in ("Result", "Segment") else segmenter, name)
