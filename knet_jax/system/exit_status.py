"""How a command ends: in one line for what a user did or the disk, and with a status that says which.

Only light modules are imported here: this holds while all others are being imported.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from knet_jax.system.errors import UserError, one_line
from knet_jax.system.signals import Preempted


@contextmanager
def exit_statuses(program: str) -> Iterator[None]:
    """Turns errors into a line on stderr and a status of the process.

    Mistakes of the user end in status 2, errors of the system in 1, Ctrl-C in 130, SIGTERM in 143.
    Other exceptions are bugs and keep their traceback.
    """
    try:
        yield
    except KeyboardInterrupt:
        message, status = "interrupted", 130
    except Preempted as error:
        message, status = one_line(error), 128 + error.signum
    except UserError as error:
        message, status = one_line(error), 2
    except OSError as error:
        where = "" if error.filename is None else f": {error.filename}"
        message, status = f"{error.strerror or one_line(error)}{where}", 1
    else:
        return
    print(f"{program}: {message}", file=sys.stderr, flush=True)
    sys.exit(status)


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
