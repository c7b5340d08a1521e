"""How JAX is started: memory and compiled programs that are kept, and devices."""

from __future__ import annotations

import os
from pathlib import Path

import jax

from knet_jax.system.errors import UserError, one_line
from knet_jax.system.memory import keep_memory


def start_backend() -> None:
    """Starts JAX's devices, with its cache of compiled programs on disk and `keep_memory`.

    The cache is `knet_jax` of the user's cache folder; where the environment
    (JAX_COMPILATION_CACHE_DIR) or the program has named another, that stays.

    Raises:
        UserError: there are no devices of the platform that the environment (JAX_PLATFORMS) names.
    """
    keep_memory()
    if jax.config.jax_compilation_cache_dir is None:
        root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        jax.config.update(
            "jax_compilation_cache_dir",
            str(Path(os.path.expanduser(root)) / "knet_jax" / "programs"),
        )
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # JAX asserts that it has found some
        platforms = jax.config.jax_platforms
        reason = one_line(error) or "there are no such devices here"
        raise UserError(f"JAX_PLATFORMS={platforms}: {reason}") from error
