"""Reading the files of a dataset: what is whole, and what tells that something has changed."""

from __future__ import annotations

from pathlib import Path

from knet_jax.segmentation import image_files
from knet_jax.system.errors import UserError


def read_file(path: Path) -> bytes:
    """The content of a file. Raises UserError where there is none."""
    if not path.is_file():
        raise UserError(f"{path} is missing")
    return path.read_bytes()


def read_picture(path: Path, size: tuple[int, int] | None = None) -> tuple[bytes, tuple[int, int]]:
    """Reads a picture, and decodes it to see that it can be.

    Args:
        path: of the picture.
        size: height and width of its annotation, where these are known.

    Returns:
        the content of the file; and `size`, or else the picture's height and width, turned as its
        orientation says.

    Raises:
        UserError: the picture is missing or broken, or has another size.
    """
    data = read_file(path)
    return data, image_files.load_image(data, size).shape[:2]


def state(path: Path) -> tuple[str, int, int]:
    """What changes when a file or a folder does: its path, size and time of modification."""
    found = path.stat()
    return str(path.resolve()), found.st_size, found.st_mtime_ns
