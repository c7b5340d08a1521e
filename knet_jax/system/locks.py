"""Keeping a second process out of a folder."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import IO

from knet_jax.system.errors import UserError

LOCK_NAME = ".lock"


def lock(folder: str | Path, message: str) -> IO[str]:
    """Claims a folder, where two processes would remove or mix up what each other writes.

    Args:
      folder: that exists.
      message: of the error where it is in use.

    Returns:
      a file; the lock goes with it, however the process ends.

    Raises:
      ValueError: another process has the folder.
    """
    file = (Path(folder) / LOCK_NAME).open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise UserError(message) from error
    except OSError:
        pass  # a file system without locks
    return file
