"""Programs of the top level, called in the process of a test."""

import importlib
import sys
from contextlib import contextmanager

from absl import flags
from absl.testing import flagsaver

INTERRUPTIBLE = """
import runpy, signal, sys

# What a shell starts in the background would ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Runs a program, `python -c INTERRUPTIBLE predict.py …`, that a Ctrl-C ends."""


@contextmanager
def program(name: str):
    """A program as a module. Its flags end with the context: two programs may call theirs the same."""
    module = importlib.import_module(name)
    try:
        with flagsaver.flagsaver():
            yield module
    finally:
        for flag in flags.FLAGS.get_flags_for_module(name):
            delattr(flags.FLAGS, flag.name)
        del sys.modules[name]
