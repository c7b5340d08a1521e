"""Being asked to stop: finish what is under way, keep it, and say how to go on."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Preempted(Exception):
    """The run was asked to stop and has saved; the message says how to go on.

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
    """Turns SIGTERM and Ctrl-C into a flag that a loop reads between two rounds.

    A second Ctrl-C ends the process at once, wherever it is. The main thread may be compiling for
    minutes, and Python hands a signal to nobody else: so another thread is woken by it too.
    """
    request = StopRequest()

    def receive(signum: int, frame: Any = None) -> None:
        del frame
        request.signum = request.signum or signum

    def watch(signals: socket.socket) -> None:
        interrupts = 0
        while byte := signals.recv(1):
            receive(byte[0])
            if byte[0] == signal.SIGINT:
                interrupts += 1
                if interrupts > 1:
                    say("interrupted")
                    os._exit(128 + signal.SIGINT)
                say("stopping when what is under way is done; Ctrl-C again stops at once")

    def say(text: str) -> None:
        # Below what a terminal shows of the key, and of a progress line.
        print(f"\n{text}" if sys.stderr.isatty() else text, file=sys.stderr, flush=True)

    # What a shell started in the background is not meant to hear Ctrl-C.
    heard = [signal.SIGTERM]
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        heard.append(signal.SIGINT)
    ours, pythons = socket.socketpair()
    pythons.setblocking(False)
    watcher = threading.Thread(target=watch, args=(ours,), daemon=True)
    watcher.start()
    wakeup = signal.set_wakeup_fd(pythons.fileno(), warn_on_full_buffer=False)
    previous = {signum: signal.signal(signum, receive) for signum in heard}
    try:
        yield request
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
        signal.set_wakeup_fd(wakeup)
        pythons.close()
        watcher.join()
        ours.close()
