"""Hiding what libraries say that helps no user."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import absl.logging


@contextmanager
def silenced(package: str) -> Iterator[None]:
    """Drops what a package logs through absl, as long as the context lasts.

    Args:
        package: the name of its folder, such as "orbax". What other packages log stays.
    """

    def is_wanted(record: logging.LogRecord) -> bool:
        return not _is_of(package, record)

    logger = logging.getLogger("absl")
    logger.addFilter(is_wanted)
    try:
        yield
    finally:
        logger.removeFilter(is_wanted)


def _is_of(package: str, record: logging.LogRecord) -> bool:
    return package in Path(record.pathname).parts


def hide_closed_loops() -> None:
    """Drops, for good, tracebacks of asyncio loops which have ended, and of threads that report to one.

    After a failed write or read the storage library leaves hundreds of them, and Orbax logs those of
    its threads, some when all else has ended. The failure itself is raised where it belongs.
    """
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # "exception was never retrieved"
    logger = absl.logging.get_absl_logger()
    logger.addFilter(lambda record: not (record.exc_info and _is_of("orbax", record)))
    show = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        error = unraisable.exc_value
        if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
            show(unraisable)

    sys.unraisablehook = hook
