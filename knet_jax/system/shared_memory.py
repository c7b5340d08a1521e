"""Shared memory that is not left behind, whatever ends the processes that share it."""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import functools
import multiprocessing
import secrets
from multiprocessing import shared_memory
from pathlib import Path

FOLDER = Path("/dev/shm")
"""Where Linux keeps segments of shared memory and semaphores, as files."""
PREFIX = "knet_"
LENGTH = len(PREFIX) + 16
"""Letters of a claim."""
_held = []
"""The file of the claim of this process, which stays open."""


@functools.cache
def claim() -> str:
    """Gives segments and semaphores of this process names by which others know that it lives.

    A file of that name is locked for as long, so that what dead processes have left can be told, in
    other containers with the same memory too. It is removed here.

    Returns:
        How the names begin, for `name_segments`; "" where segments are no files.
    """
    if not FOLDER.is_dir():
        return ""
    found = [*FOLDER.glob(f"{PREFIX}*"), *FOLDER.glob(f"sem.{PREFIX}*")]
    for name in {path.name.removeprefix("sem.")[:LENGTH] for path in found}:
        # It fails where the owner lives, and for what belongs to other users.
        with contextlib.suppress(OSError), (FOLDER / name).open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for left in (*FOLDER.glob(f"sem.{name}-*"), *FOLDER.glob(f"{name}*")):
                left.unlink(missing_ok=True)
    name = PREFIX + secrets.token_hex((LENGTH - len(PREFIX)) // 2)
    unlocked = FOLDER / f".{name}"
    file = unlocked.open("w")
    fcntl.flock(file, fcntl.LOCK_EX)
    unlocked.rename(FOLDER / name)
    _held.append(file)
    atexit.register((FOLDER / name).unlink, missing_ok=True)
    name_segments(name)
    return name


def name_segments(beginning: str) -> None:
    """Lets names of segments and semaphores that this process makes begin as `claim` said.

    Python offers nothing for that, and Grain, which makes them, neither.
    """
    if beginning:
        shared_memory._make_filename = lambda: f"/{beginning}_{secrets.token_hex(8)}"
        multiprocessing.current_process()._config["semprefix"] = f"/{beginning}"
