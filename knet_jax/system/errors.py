"""Mistakes of the user: one class of error, and what its messages are made of."""

from __future__ import annotations

import difflib
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

MOST_SHOWN = 20
"""How many accepted names a message lists."""


class UserError(ValueError):
    """The user asked for something that does not exist or cannot be; the message says what can."""


def suggest(name: str, known: Iterable[str]) -> str:
    """What could have been meant by a name that is not among the known ones."""
    known, last = sorted(known), name.rpartition(".")[2]
    near = [key for key in known if key.rpartition(".")[2] == last]
    near = near or difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if near:
        return f"did you mean {' or '.join(near)}?"
    shown = ", ".join(known[:MOST_SHOWN]) + (", …" if len(known) > MOST_SHOWN else "")
    return f"accepted: {shown or 'none'}"


def one_line(error: BaseException) -> str:
    """The message of an error without line breaks."""
    return " ".join(str(error).split())


@contextmanager
def naming_file(source: Path | str) -> Iterator[None]:
    """Makes one line, which names a file, of whatever goes wrong while that is read.

    Files of others lead their readers to any error, code in them too.

    Raises:
        UserError: instead of other errors.
    """
    try:
        yield
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(source)]
        where = f"{source}, line {lines[-1]}" if lines else str(source)
        reason = f"{type(error).__name__}: {one_line(error):.300}"
        raise UserError(f"{where}, cannot be read: {reason}") from error
