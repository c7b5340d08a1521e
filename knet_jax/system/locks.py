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
        folder: an existing folder.
        message: of the error where another process has claimed it.

    Returns:
        An open file. The claim ends when it is closed, or with the process, however that ends.

    Raises:
        UserError: another process has the folder.
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
