"""How a command ends: in one line for what a user did or the disk, and with a status that says which."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

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
