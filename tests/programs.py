"""Commands in the process of a test, and a disk that is full."""

import resource
from contextlib import contextmanager

from knet_jax.cli.main import run


def status_of(name, *arguments):
    """Calls a command, such as `predict`, in this process. Returns its exit status."""
    try:
        run(name, f"knet {name}", [*map(str, arguments)])
    except SystemExit as error:
        return error.code
    return 0


@contextmanager
def largest_file(size):
    """No file may grow beyond so many bytes: in place of a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
