"""Libraries that say too much."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def silenced(package: str) -> Iterator[None]:
    """Drops what a package logs by way of absl; what others log, we ourselves too, stays."""

    def is_wanted(record: logging.LogRecord) -> bool:
        return package not in Path(record.pathname).parts

    logger = logging.getLogger("absl")
    logger.addFilter(is_wanted)
    try:
        yield
    finally:
        logger.removeFilter(is_wanted)
