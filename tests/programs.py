"""Commands, called in the process of a test or started in one of their own."""

from knet_jax.cli.main import run

INTERRUPTIBLE = """
import runpy, signal, sys

# What a shell starts in the background would ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Runs a program, `python -c INTERRUPTIBLE predict.py …`, that a Ctrl-C ends."""


def status_of(name, *arguments):
    """Calls a command, such as `predict`, in this process. Returns its exit status."""
    try:
        run(name, f"knet {name}", [*map(str, arguments)])
    except SystemExit as error:
        return error.code
    return 0
