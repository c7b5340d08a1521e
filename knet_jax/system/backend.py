"""How JAX is started: memory and compiled programs that are kept, and devices."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import jax

from knet_jax.system.errors import UserError, one_line

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
"""Parameters of `mallopt` (malloc.h)."""


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


def keep_memory() -> None:
    """Lets the allocator of the C library (glibc) keep what is freed, for the process's next arrays.

    Otherwise it gives large arrays back to the system at once. A program of JAX on the CPU then gets
    all its working memory anew at every call, page by page and filled with zeros: a quarter of the
    time of a train step. The process stays as large as it once was. Takes effect for threads that
    start later, so it is called before JAX starts its own. Other C libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)
        mallopt(M_ARENA_MAX, 1)  # other arenas, of 64 MiB, map what is larger whatever the limit
