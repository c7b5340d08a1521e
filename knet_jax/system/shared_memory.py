"""Shared memory that is not left behind, whatever ends the processes that share it."""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import functools
import multiprocessing
import re
import secrets
from collections import defaultdict
from multiprocessing import shared_memory
from pathlib import Path

FOLDER = Path("/dev/shm")
"""Where Linux keeps segments of shared memory and semaphores, as files."""
PREFIX = "knet_"
CLAIMED = re.compile(rf"(?:sem\.)?({PREFIX}[0-9a-f]{{16}})(?:[_-].*)?")
"""A claim, or the name of a segment or semaphore that begins with one."""
_held = []
"""The file of the claim of this process, which stays open."""


@functools.cache
def claim() -> str:
    """Creates and locks /dev/shm/knet_<16 hex digits> for the life of this process: its claim.

    Names of its segments and semaphores begin with that name, so what dead processes have left can be
    told from what is in use, by other containers with the same memory, too. It is removed here, with
    the claims that nobody locks any more.

    Returns:
        The name, for `name_segments`; "" where segments are no files.
    """
    if not FOLDER.is_dir():
        return ""
    found = defaultdict(list)
    for path in FOLDER.iterdir():
        if match := CLAIMED.fullmatch(path.name):
            found[match[1]].append(path)
    for name, paths in found.items():
        # It fails where the owner lives, and for what belongs to other users.
        with contextlib.suppress(OSError), (FOLDER / name).open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for left in (*paths, FOLDER / name):
                left.unlink(missing_ok=True)
    name = PREFIX + secrets.token_hex(8)
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
