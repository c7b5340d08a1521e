"""Worker processes: they leave signals to their parent, and end with it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker

from knet_jax.system import shared_memory

GROUP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
"""What schedulers and terminals send to all processes of a run; the parent alone acts on them."""
NO_LEAK_WARNING = "ignore:resource_tracker:UserWarning"
"""Python's filter for a warning of its cleaner of shared memory and semaphores."""


@contextmanager
def starting() -> Iterator[None]:
    """Blocks Ctrl-C and SIGTERM in the workers that start inside, until they ignore them.

    Without it a Ctrl-C in the first seconds of a run would end workers before they have come to
    `start`. Signals to this process wait meanwhile, or reach its other threads.
    """
    # At the end the cleaner removes what workers still had ready, and calls that a leak.
    if NO_LEAK_WARNING not in sys.warnoptions:
        sys.warnoptions.append(NO_LEAK_WARNING)
    resource_tracker.ensure_running()  # its own start would unblock them
    shared_memory.claim()  # what they share is removed by the next start, should all be killed
    before = signal.pthread_sigmask(signal.SIG_BLOCK, GROUP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start() -> None:
    """What a worker calls first: it ignores those signals, and ends when its parent does."""
    for signum in GROUP_SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Ends a worker whose parent was killed; it would wait for it, and hold its memory, for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)
