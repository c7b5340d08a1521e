"""The answer to signals while hundreds of modules are being imported."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def ended_by_signals(program: str) -> Iterator[None]:
    """Ends the process on SIGTERM or Ctrl-C in one line, as long as the context lasts.

    A KeyboardInterrupt amid the import of hundreds of modules may come out as any other error.
    """

    def end(signum: int, frame: FrameType | None) -> None:
        print(f"{program}: interrupted", file=sys.stderr, flush=True)
        os._exit(128 + signum)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {}
    for signum in (signal.SIGTERM, signal.SIGINT):
        if signal.getsignal(signum) is not signal.SIG_IGN:  # what a shell started in the background
            before[signum] = signal.signal(signum, end)
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)
