"""Hiding what libraries say that helps no user."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def silenced(package: str) -> Iterator[None]:
    """Drops what a package logs through absl, as long as the context lasts.

    Args:
        package: the name of its folder, such as "orbax". What other packages log stays.
    """

    def is_wanted(record: logging.LogRecord) -> bool:
        return package not in Path(record.pathname).parts

    logger = logging.getLogger("absl")
    logger.addFilter(is_wanted)
    try:
        yield
    finally:
        logger.removeFilter(is_wanted)


def hide_closed_loops() -> None:
    """Drops, for good, tracebacks of asyncio loops which have ended, and of threads that report to one.

    After a failed write or read the storage library leaves hundreds of them. The failure itself is
    raised where it belongs.
    """
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # "exception was never retrieved"
    show = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        error = unraisable.exc_value
        if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
            show(unraisable)

    sys.unraisablehook = hook
