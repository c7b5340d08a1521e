import os
import signal

from knet_jax.preemption import stop_on_sigterm


def test_sigterm_is_a_flag_inside_and_what_it_was_outside():
    before = signal.getsignal(signal.SIGTERM)
    with stop_on_sigterm() as stop:
        assert not stop
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop
    assert signal.getsignal(signal.SIGTERM) is before
