import os
import signal
import subprocess
import sys
import time

import pytest

from knet_jax.system.signals import stop_when_asked

BUSY = """
import hashlib, signal
from knet_jax.system.signals import stop_when_asked

signal.signal(signal.SIGINT, signal.default_int_handler)
with stop_when_asked():
    print("busy", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # minutes in C, as a compilation
"""


@pytest.fixture
def interruptible():
    """Ctrl-C is what it is in a terminal, also where the tests run in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_a_flag_inside_and_what_it_was_outside(interruptible, signum):
    before = signal.getsignal(signum)
    with stop_when_asked() as stop:
        assert not stop
        os.kill(os.getpid(), signum)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop
        assert stop.end("stopped").signum == signum
    assert signal.getsignal(signum) is before


def test_what_was_to_be_ignored_is_ignored(interruptible):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with stop_when_asked() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert not stop


def test_a_second_ctrl_c_does_not_wait_for_a_compilation():
    process = subprocess.Popen(
        [sys.executable, "-c", BUSY], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "busy\n"
        process.send_signal(signal.SIGINT)
        assert "Ctrl-C again stops at once" in process.stderr.readline()
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60)[1] == "interrupted\n"
        assert process.returncode == 130
    finally:
        process.kill()


def test_a_second_ctrl_c_leaves_time_to_close_files(interruptible):
    closed = []
    with pytest.raises(KeyboardInterrupt), stop_when_asked() as stop:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop
            os.kill(os.getpid(), signal.SIGINT)
        finally:
            closed.append(True)
    assert closed == [True]


def test_other_signals_do_not_ask_to_stop():
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    with stop_when_asked() as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.2)
        assert not stop
    signal.signal(signal.SIGUSR1, before)
