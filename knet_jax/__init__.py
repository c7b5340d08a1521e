"""K-Net (Zhang et al., NeurIPS 2021) in JAX: kernels that segment, and refine themselves."""

__version__ = "0.1.0"
