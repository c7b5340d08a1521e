import asyncio
import logging
import sys
from types import SimpleNamespace

import pytest

from knet_jax.system.library_logs import hide_closed_loops, silenced


def test_one_package_is_silenced_and_only_inside(caplog):
    logger = logging.getLogger("absl")
    logger.addHandler(caplog.handler)

    def say(text, pathname):
        logger.handle(logging.LogRecord("absl", logging.ERROR, pathname, 1, text, None, None))

    try:
        with silenced("noisy"):
            say("hidden", "/site-packages/noisy/io/file.py")
            say("of another", "/site-packages/noisy_not/file.py")
        say("after", "/site-packages/noisy/io/file.py")
    finally:
        logger.removeHandler(caplog.handler)
    said = {record.getMessage() for record in caplog.records}
    assert said == {"of another", "after"}


def test_only_an_event_loop_that_has_ended_is_hidden(monkeypatch):
    shown = []
    monkeypatch.setattr(sys, "unraisablehook", shown.append)
    hide_closed_loops()
    loop = asyncio.new_event_loop()
    loop.close()
    with pytest.raises(RuntimeError) as closed:
        loop.call_soon_threadsafe(print)
    for error in (closed.value, RuntimeError("another"), ValueError("Event loop is closed")):
        sys.unraisablehook(SimpleNamespace(exc_value=error))
    assert [str(one.exc_value) for one in shown] == ["another", "Event loop is closed"]
