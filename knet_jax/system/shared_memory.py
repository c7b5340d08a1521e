"""Shared memory that is not left behind, whatever ends the processes that share it."""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import functools
import secrets
from multiprocessing import shared_memory
from pathlib import Path

FOLDER = Path("/dev/shm")
"""Where Linux keeps segments of shared memory, as files."""
PREFIX = "knet_"
LENGTH = len(PREFIX) + 16
"""Letters of a claim."""
_held = []
"""The file of the claim of this process, which stays open."""


@functools.cache
def claim() -> str:
    """Begins names that segments of this process, and of its workers, can have.

    A file of that name is locked as long as this process lives, so that others can tell what is left
    of dead ones, in other containers with the same memory too. What there is of those is removed.

    Returns:
        The beginning, or "" where segments are no files.
    """
    if not FOLDER.is_dir():
        return ""
    for owner in {FOLDER / path.name[:LENGTH] for path in FOLDER.glob(f"{PREFIX}*")}:
        # It fails where the owner lives, and for what belongs to other users.
        with contextlib.suppress(OSError), owner.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for left in (*FOLDER.glob(f"{owner.name}_*"), owner):
                left.unlink(missing_ok=True)
    name = PREFIX + secrets.token_hex((LENGTH - len(PREFIX)) // 2)
    unlocked = FOLDER / f".{name}"
    file = unlocked.open("w")
    fcntl.flock(file, fcntl.LOCK_EX)
    unlocked.rename(FOLDER / name)
    _held.append(file)
    atexit.register((FOLDER / name).unlink, missing_ok=True)
    return name


def name_segments(beginning: str) -> None:
    """Lets the names of all segments that this process makes begin as `claim` said.

    Python offers nothing for that, and Grain, which makes them, neither.
    """
    if beginning:
        shared_memory._make_filename = lambda: f"/{beginning}_{secrets.token_hex(8)}"
