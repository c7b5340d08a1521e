"""Compiled programs that are kept on disk for the next process."""

from __future__ import annotations

import os
from pathlib import Path

import jax


def keep_programs() -> None:
    """Turns on JAX's cache on disk, in `knet_jax` of the user's cache folder.

    Where the environment (JAX_COMPILATION_CACHE_DIR) or the program has named another, it stays.
    """
    if jax.config.jax_compilation_cache_dir is None:
        root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        jax.config.update(
            "jax_compilation_cache_dir",
            str(Path(os.path.expanduser(root)) / "knet_jax" / "programs"),
        )
