"""Stopping in order: SIGTERM and Ctrl-C become a flag that a loop looks at between two rounds."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType

PATIENCE = 5.0
"""Seconds that a second Ctrl-C leaves the process to close its files, before it is ended at once."""


class Preempted(Exception):
    """The process was asked to stop and has kept what it did; the message says how to go on.

    Args:
        message: for the user.
        signum: the signal that asked; the status of the program is 128 more.
    """

    def __init__(self, message: str, signum: int = signal.SIGTERM):
        super().__init__(message)
        self.signum = signum


class StopRequest:
    """False until the process is asked to stop; `signum` is the first signal that did."""

    def __init__(self) -> None:
        self.signum: int | None = None

    def __bool__(self) -> bool:
        return self.signum is not None

    def end(self, message: str) -> Preempted:
        """The exception to raise once what was under way is done."""
        return Preempted(message, self.signum or signal.SIGTERM)


@contextmanager
def stop_when_asked() -> Iterator[StopRequest]:
    """Turns SIGTERM and Ctrl-C into a flag, as long as the context lasts.

    A second Ctrl-C is a KeyboardInterrupt, and the end of the process if that has not led to one
    within `PATIENCE`: the main thread may be compiling for minutes, and Python runs handlers in no
    other, so a thread of ours is woken by signals too. Outside the main thread nothing is changed,
    and the flag stays False.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    heard = [signal.SIGTERM]
    # What a shell started in the background is not meant to hear Ctrl-C.
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        heard.append(signal.SIGINT)
    handled: set[int] = set()

    def receive(signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT and signum in handled:
            raise KeyboardInterrupt
        handled.add(signum)
        request.signum = request.signum or signum

    ours, pythons = socket.socketpair()
    pythons.setblocking(False)
    watcher = threading.Thread(target=_watch, args=(ours, request, heard), daemon=True)
    watcher.start()
    wakeup = signal.set_wakeup_fd(pythons.fileno(), warn_on_full_buffer=False)
    previous = {signum: signal.signal(signum, receive) for signum in heard}
    try:
        yield request
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(wakeup)
        pythons.close()
        watcher.join()
        ours.close()


def _watch(signals: socket.socket, request: StopRequest, heard: Sequence[int]) -> None:
    """Reads the signals that come, a byte each, until the other end is closed."""
    interrupts = 0
    while byte := signals.recv(1):
        signum = byte[0]
        if signum not in heard:
            continue
        request.signum = request.signum or signum
        interrupts += signum == signal.SIGINT
        if signum == signal.SIGINT and interrupts == 1:
            _say("stopping when what is under way is done; Ctrl-C again stops at once")
        elif signum == signal.SIGINT:
            signals.settimeout(PATIENCE)
            with suppress(TimeoutError):
                if not signals.recv(1):
                    return
            _say("interrupted")
            os._exit(128 + signal.SIGINT)


def _say(text: str) -> None:
    # Below what a terminal shows of the key, and of a progress line.
    with suppress(OSError, ValueError):  # nobody listens
        print(f"\n{text}" if sys.stderr.isatty() else text, file=sys.stderr, flush=True)
