"""Mistakes of the user: one class of error, and what its messages are made of."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(ValueError):
    """The user asked for something that does not exist or cannot be; the message says what can."""


def suggest(name: str, known: Iterable[str]) -> str:
    """What could have been meant by a name that is not among the known ones."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if not near:
        last = name.rpartition(".")[2]
        near = [key for key in known if key.rpartition(".")[2] == last]
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"accepted: {', '.join(known) or 'none'}"


def one_line(error: BaseException) -> str:
    """The message of an error without line breaks."""
    return " ".join(str(error).split())


@contextmanager
def naming_file(source: Path | str) -> Iterator[None]:
    """Puts the name of a file before what is wrong with it."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{source}: {error}") from error
