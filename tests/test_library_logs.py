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


def test_tracebacks_of_orbax_are_hidden(caplog, monkeypatch):
    logger = logging.getLogger("absl")
    monkeypatch.setattr(logger, "filters", [])
    monkeypatch.setattr(sys, "unraisablehook", print)
    logger.addHandler(caplog.handler)
    hide_closed_loops()
    path, error = "/site-packages/orbax/checkpoint/file.py", OSError("No space left on device")
    for pathname, info in ((path, error), (path, None), ("/site-packages/other.py", error)):
        info = info and (type(info), info, None)
        logger.handle(logging.LogRecord("absl", logging.ERROR, pathname, 1, pathname, None, info))
    logger.removeHandler(caplog.handler)
    seen = {(one.pathname, bool(one.exc_info)) for one in caplog.records}
    assert seen == {(path, False), ("/site-packages/other.py", True)}
