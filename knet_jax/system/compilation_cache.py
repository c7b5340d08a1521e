"""Compiled programs that are kept on disk for the next process."""

from __future__ import annotations

import os
from pathlib import Path

import jax


def keep_programs() -> None:
    """Turns on JAX's cache on disk, unless the environment or the program already has its own."""
    if jax.config.jax_compilation_cache_dir is None:
        root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        jax.config.update(
            "jax_compilation_cache_dir",
            str(Path(os.path.expanduser(root)) / "knet_jax" / "programs"),
        )
