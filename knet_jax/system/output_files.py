"""Writing files whole or not at all, and naming results after pictures."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any, Self

import cv2
import numpy as np

from knet_jax.system.errors import UserError

MAX_NAME = 200
"""Bytes of a name that is made of a picture's: a suffix and `.part` still follow, and systems take 255."""


class Stems:
    """Names results after pictures, subfolders included, no two alike.

    1.jpg and 1.png must not overwrite each other, nor 1.jpg and 1.JPG on other systems.
    """

    def __init__(self) -> None:
        self._taken: set[str] = set()

    def of(self, name: str) -> str:
        """Returns the name of a picture's results, without a suffix; it never leads out of a folder.

        `city/7.jpg` gives `city/7`, and where that is taken `city/7.jpg`. Names that are too long are
        cut, and what cannot be printed becomes `_`.
        """
        path, number = PurePath(name), 1
        folders = [part for part in path.parts[:-1] if part not in (path.anchor, "..")]
        inside = PurePath(*map(_shorten, (*folders, path.name)))
        stem = inside.with_name(_shorten(path.stem)).as_posix()
        while stem.lower() in self._taken:
            stem = f"{inside.as_posix()}-{number}" if number > 1 else inside.as_posix()
            number += 1
        self._taken.add(stem.lower())
        return stem


def _shorten(name: str) -> str:
    """A name that every system takes and every terminal shows."""
    name = "".join(letter if letter.isprintable() else "_" for letter in name)
    return name.encode()[:MAX_NAME].decode(errors="ignore")


class PngFolder:
    """A folder of PNG files that are named after pictures."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._stems = Stems()

    def write(self, file_name: str, pixels: np.ndarray) -> str:
        """Writes a PNG, whole or not at all.

        Args:
            file_name: of the picture, subfolders included.
            pixels: uint8 or uint16 [H, W], or [H, W, 3] in BGR.

        Returns:
            The name of the PNG within the folder.

        Raises:
            OSError: the file cannot be written.
        """
        name = f"{self._stems.of(file_name)}.png"
        write_whole(self._folder / name, cv2.imencode(".png", pixels)[1].tobytes())
        return name


def local_path(name: str, path: str | Path) -> Path:
    """The path that a user gave in an argument, which must lead into this machine's file system.

    `gs://bucket/run` would quietly be a folder `gs:` here.

    Raises:
        UserError: it is an address.
    """
    if re.match(r"[A-Za-z][\w+.-]+:/", str(path)):
        raise UserError(
            f"--{name}={path}; accepted: a path of this machine (a bucket is mounted first)"
        )
    return Path(path)


def draft_of(path: Path) -> Path:
    """Returns the path where a file is written until it is whole and gets its name."""
    return path.with_name(f"{path.name}.part")


@contextmanager
def drafted(path: Path) -> Iterator[Path]:
    """Gives the draft of a file to be written, which gets the file's name when all has gone well.

    Raises:
        OSError: the file, or its folder, cannot be written; the file is named.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = draft_of(path)
    with naming_output(path):
        try:
            yield draft
            draft.replace(path)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file, whole or not at all, and its folder if need be.

    Raises:
        OSError: the file cannot be written; it is named.
    """
    with drafted(path) as draft:
        draft.write_bytes(data)


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON, as `write_whole` does."""
    write_whole(path, json.dumps(content).encode())


def write_json_lists(path: Path, lists: Mapping[str, Iterable[Any]]) -> dict[str, int]:
    """Writes a JSON of an object of lists, whole or not at all, entry by entry.

    Returns:
        how many entries each list has.

    Raises:
        OSError: the file cannot be written; it is named.
    """
    counts = dict.fromkeys(lists, 0)
    with drafted(path) as draft, draft.open("w") as file:
        for number, (key, entries) in enumerate(lists.items()):
            file.write(f"{', ' if number else '{'}{json.dumps(key)}: [")
            for entry in entries:
                file.write(f"{', ' if counts[key] else ''}{json.dumps(entry)}")
                counts[key] += 1
            file.write("]")
        file.write("}")
    return counts


@contextmanager
def naming_output(path: Path) -> Iterator[None]:
    """Gives an OSError the name of the file that the user knows.

    That of a full disk has no name, and a draft has another.
    """
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


class JsonList:
    """Writes a JSON list record by record, so that none of them stays in memory.

    Args:
        path: of the file, which appears when it is whole.

    Raises:
        OSError: the file cannot be written; it is named. `add` and `close` raise it too.
    """

    def __init__(self, path: Path):
        self._path = path
        self._draft = draft_of(path)
        self._separator = "["
        path.parent.mkdir(parents=True, exist_ok=True)
        with naming_output(path):
            self._file = self._draft.open("w")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def add(self, record: Any) -> None:
        """Writes one record, of what JSON can hold."""
        with naming_output(self._path):
            self._file.write(f"{self._separator}{json.dumps(record)}")
        self._separator = ",\n"

    def close(self) -> None:
        """Ends the list."""
        with naming_output(self._path):
            self._file.write("[]" if self._separator == "[" else "]")
            self._file.close()
            self._draft.replace(self._path)


REMOVE = "import shutil, sys; sys.stdin.read(); shutil.rmtree(sys.argv[1], ignore_errors=True)"
"""Removes a folder when its input ends, which it does with the process at the other end."""


@contextmanager
def temporary_folder() -> Iterator[str]:
    """A folder that goes with the context, or with the process, whatever ends that."""
    folder = tempfile.mkdtemp(prefix="knet_jax_demo_")
    command = [sys.executable, "-ISc", REMOVE, folder]
    remover = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    try:
        yield folder
    finally:
        remover.communicate()
