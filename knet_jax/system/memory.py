"""Freed memory that stays with the process."""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
"""Parameters of `mallopt` (malloc.h)."""


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
