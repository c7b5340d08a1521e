"""Being stopped by a scheduler: finish the step, save, and say how to go on."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Preempted(Exception):
    """The run was asked to stop and has saved; the message says how to go on."""


class StopRequest:
    """False until the process is asked to stop."""

    def __init__(self) -> None:
        self.received = False

    def __bool__(self) -> bool:
        return self.received


@contextmanager
def stop_on_sigterm() -> Iterator[StopRequest]:
    """Turns SIGTERM into a flag that the training loop reads between two steps."""
    request = StopRequest()

    def receive(signum: int, frame: Any) -> None:
        del signum, frame
        request.received = True

    previous = signal.signal(signal.SIGTERM, receive)
    try:
        yield request
    finally:
        signal.signal(signal.SIGTERM, previous)
