"""Libraries that say too much."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


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


def hide_closed_loops() -> None:
    """Drops, for good, what threads of the storage library say of an event loop that has ended.

    After a failed write they report to it for a while, a traceback each, from C. The failure itself
    is raised where it belongs.
    """
    show = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        error = unraisable.exc_value
        if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
            show(unraisable)

    sys.unraisablehook = hook
