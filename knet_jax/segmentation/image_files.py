"""Reads pictures, and annotations that are stored as pictures."""

from __future__ import annotations

import contextlib
import io
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import cv2
import numpy as np
from PIL import Image, ImageOps

from knet_jax.system.errors import UserError

PICTURES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
"""The endings of file names that are taken for pictures."""
KINDS = {b"\xff\xd8": "a JPEG", b"BM": "a BMP", b"GIF": "a GIF", b"RIFF": "a WebP"}
KINDS |= dict.fromkeys((b"II*\0", b"MM\0*"), "a TIFF")
"""Formats by the first bytes of a file."""
MAX_MEGAPIXELS = 50
"""Pictures of more are not decoded unless asked for: a few hundred bytes can claim gigabytes."""
LEAST_SIDE = 128
"""A picture costs as if each side had at least so many pixels, and the limit counts them so."""
NUM_IDS = 1 << 24
"""How many segment ids three bytes can tell apart, void (0) included."""


def decode_image(data: bytes) -> np.ndarray:
    """Decodes a picture of any kind that cv2 or Pillow reads: grey, CMYK, 16 bits, alpha, palette.

    It is turned as its orientation says, as in the reference.

    Returns:
        uint8 [height, width, 3], RGB.

    Raises:
        UserError: the picture is damaged.
    """
    if _may_be_truncated(data):
        # cv2 would fill up with grey; Pillow refuses to.
        try:
            Image.open(io.BytesIO(data)).load()
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise UserError("the picture is truncated") from error
    try:
        if data[:2] in (b"II", b"MM"):
            # cv2 multiplies the alpha of a TIFF into its colors, but not that of a PNG.
            with contextlib.suppress(OSError), Image.open(io.BytesIO(data)) as image:
                if image.mode == "RGBA":
                    return _decode_by_pillow(data)
        return _decode(data, cv2.IMREAD_COLOR_RGB)
    except UserError:
        return _decode_by_pillow(data)


def read_image(path: str | Path) -> np.ndarray:
    """Reads a picture from a file, see `decode_image`. Raises UserError, which names the file."""
    try:
        return decode_image(Path(path).read_bytes())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


def check_megapixels(
    file: str | Path | IO[bytes], most: float, formats: Sequence[str] | None = None
) -> None:
    """Reads the head of a file, before anything of the picture's size is in memory.

    A side of fewer than `LEAST_SIDE` pixels counts as one of so many.

    Args:
        file: an open file, or its path.
        most: megapixels that are accepted.
        formats: the only ones that are accepted, by Pillow's names; default: what Pillow does not
            know passes.

    Raises:
        UserError: the picture is larger, or of none of the formats.
    """
    try:
        # Pillow has a limit of its own, and warns of half of it.
        with warnings.catch_warnings(action="ignore"), Image.open(file, formats=formats) as head:
            sides = head.size
    except Image.DecompressionBombError:
        sides = (math.inf, math.inf)
    except Exception as error:
        if formats is None or isinstance(error, FileNotFoundError):
            return  # who reads it tells what is wrong
        raise UserError(f"no picture that can be read; accepted: {', '.join(PICTURES)}") from error
    found, cost = (math.prod(max(side, least) for side in sides) / 1e6 for least in (1, LEAST_SIDE))
    if cost > most:
        shown = f"{found:.1f} megapixels" if found < math.inf else "far too many megapixels"
        if found <= most:
            shown = f"with a side of {min(sides)} as costly as {cost:.1f} megapixels"
        raise UserError(f"{shown}; accepted: up to {most:g} (--max_megapixels)")


def load_image(data: bytes, size: tuple[int, int] | None = None) -> np.ndarray:
    """Decodes a picture, and checks that it has the size of its annotation.

    It is turned as its EXIF orientation says, unless only the unturned one has the size of the
    annotation (test_exif_follows_the_annotation).

    Returns:
        uint8 [height, width, 3], RGB.

    Raises:
        UserError: the picture is damaged, or of another size.
    """
    image = decode_image(data)
    if size and image.shape[:2] == (size[1], size[0]) != tuple(size):
        image = _decode(data, cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
    _check_size(image, size or image.shape[:2])
    return image


def load_panoptic(data: bytes, size: tuple[int, int] | None = None) -> np.ndarray:
    """Decodes a panoptic PNG to uint8 [height, width, 3], RGB, which `segment_ids` reads.

    Raises:
        UserError: it is no PNG, is damaged, or of another size.
    """
    check_png(data)
    rgb = _decode(data, cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
    _check_size(rgb, size or rgb.shape[:2])
    return rgb


def check_png(data: bytes) -> None:
    """Raises UserError where annotations are no PNG: JPEG, say, would change their numbers."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        kind = next((kind for start, kind in KINDS.items() if data.startswith(start)), "")
        raise UserError(f"is {kind or 'no picture'}; accepted: PNG, which keeps every number")


def load_label_map(data: bytes, size: tuple[int, int]) -> np.ndarray:
    """Decodes a grey PNG whose pixels are numbers to uint8 or uint16 [height, width].

    Raises:
        UserError: the PNG is damaged, in color, or of another size.
    """
    label_map = _decode(data, cv2.IMREAD_UNCHANGED)
    if label_map.ndim != 2:
        raise UserError(f"has {label_map.shape[2]} channels where one is expected")
    _check_size(label_map, size)
    return label_map


def segment_ids(rgb: np.ndarray) -> np.ndarray:
    """The ids R + 256 G + 65536 B of COCO's panoptic colors: uint8 [h, w, 3] -> int32 [h, w]."""
    if not rgb.size:
        # Nothing is sampled of a picture that is one pixel wide. cv2 refuses empty arrays.
        return np.zeros(rgb.shape[:2], np.int32)
    # Four bytes, the last one 255, read as one little-endian number.
    rgba = cv2.cvtColor(rgb, cv2.COLOR_RGB2RGBA)
    return rgba.view("<i4")[..., 0] & (NUM_IDS - 1)


def segment_colors(ids: np.ndarray) -> np.ndarray:
    """COCO's panoptic colors for ids [...], uint8 [..., 3]: the inverse of `segment_ids`."""
    return np.stack([ids & 255, (ids >> 8) & 255, (ids >> 16) & 255], -1).astype(np.uint8)


def _decode(data: bytes, flags: int) -> np.ndarray:
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error:
        image = None
    if image is None:
        raise UserError("cannot be decoded")
    return image


def _decode_by_pillow(data: bytes) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.mode[0] not in "IF":  # numbers of an unknown range
                return np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except Exception as error:  # whatever a damaged file leads a plugin to
        raise UserError("cannot be decoded") from error
    raise UserError("cannot be decoded")


def _may_be_truncated(data: bytes) -> bool:
    """Whether a JPEG's last scan has no end marker. Neither marker can occur within a scan, but
    both can in what some cameras append."""
    return data[:2] == b"\xff\xd8" and data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda")


def _check_size(image: np.ndarray, size: tuple[int, int]) -> None:
    if image.shape[:2] != tuple(size):
        raise UserError(
            f"is {image.shape[1]}x{image.shape[0]} where {size[1]}x{size[0]} is expected"
        )
