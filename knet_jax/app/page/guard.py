"""What may be asked of the page's server."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

MAX_JSON = 1 << 20
"""Bytes of a request that is no upload."""

ROUTES = re.compile(
    r"(GET|HEAD) /(config|theme\.css|favicon\.ico|manifest\.json|(assets|static)/.+)?"
    r"|GET /gradio_api/(info|upload_progress|queue/data|file=.+|call/\w+/\w+)"
    r"|POST /gradio_api/(upload|queue/join|call/\w+)"
)
"""What the page asks of its server, and a program: the rest of what Gradio offers is not answered."""

SEALED = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
    "connect-src 'self' data: blob:; base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
)
"""Content security policy: the page loads nothing from elsewhere."""


class Guard:
    """An ASGI application around Gradio's that narrows what requests may ask.

    Only what the page needs is answered, only for pages of this server, and only as the page asks it:
    no large bodies come in, no files are read but those that were uploaded (Gradio would copy any of
    this machine, or fetch one from an address), and no page loads anything from elsewhere. What goes
    wrong with a request is one line on stderr.

    Args:
        app: Gradio's.
        max_body: bytes of an upload.
        uploads: the folder of uploaded files.
        names: of the server in a browser's address, besides its numbers and localhost.
    """

    def __init__(self, app: Any, max_body: int, uploads: Path, names: Sequence[str] = ()):
        self._app = app
        self._max_body = max_body
        self._uploads = uploads.resolve()
        self._names = {"localhost", *map(str.lower, names)}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close"})

        async def send_sealed(message: Any) -> None:
            if message["type"] == "http.response.start":
                policy = (b"content-security-policy", SEALED.encode())
                message = {**message, "headers": [*message.get("headers", ()), policy]}
            await send(message)

        try:
            body = await self._admit(scope, receive)
        except _RefusedError as error:
            status, answer = error.args
            await send_sealed({"type": "http.response.start", "status": status, "headers": []})
            return await send({"type": "http.response.body", "body": answer.encode()})
        received = iter([{"type": "http.request", "body": body}] if body else [])

        async def receive_again() -> Any:
            return next(received, None) or await receive()

        try:
            await self._app(scope, receive_again, send_sealed)
        except Exception as error:  # noqa: BLE001 what others send must not end in a traceback
            print(f"{scope['method']} {scope['path']!r:.200}: {error!r:.200}", file=sys.stderr)

    async def _admit(self, scope: Any, receive: Any) -> bytes:
        """Raises _RefusedError where a request is not answered; returns its body if it is a JSON."""
        asked = f"{scope['method']} {scope['path']}"
        if not ROUTES.fullmatch(asked):
            raise _RefusedError(404, "nothing that the page needs")
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        host, origin = headers.get(b"host", ""), headers.get(b"origin")
        # Of numbers too, which no other site can have for its name.
        name = _hostname(f"//{host}")
        if name not in self._names and not re.fullmatch(r"[\d.]+|.+:.+", name):
            raise _RefusedError(
                421, f"{host[:100]} is not this server; demo --names adds names of it"
            )
        of_page = not origin or origin.partition("://")[2] == host
        if not of_page and _hostname(origin) not in self._names:
            raise _RefusedError(403, "only pages of this server may ask")
        if (file := asked.partition("file=")[2]) and not self._is_uploaded(file):
            raise _RefusedError(403, "only a picture that was uploaded is read")

        is_upload = headers.get(b"content-type", "").startswith("multipart/form-data")
        most = self._max_body if is_upload else MAX_JSON
        length = headers.get(b"content-length", "0")
        if b"transfer-encoding" in headers or not length.isdecimal() or int(length) > most:
            raise _RefusedError(413, f"a request has at most {most} bytes, and says how many")
        if is_upload or scope["method"] != "POST":
            return b""
        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        try:
            content = json.loads(body)
            json.dumps(content, ensure_ascii=False, allow_nan=False).encode()
            picture, view, *numbers = content["data"]
            is_call = isinstance(view, str) and len(numbers) == 2
            is_call &= all(isinstance(number, int | float) for number in numbers)
            is_call &= picture is None or isinstance(picture["path"], str)
        except (ValueError, TypeError, KeyError, RecursionError):
            is_call = False
        if not is_call:
            raise _RefusedError(400, "a call has in data: a picture, a view, and two thresholds")
        if not all(map(self._is_uploaded, _paths(content))):
            raise _RefusedError(403, "only a picture that was uploaded is read")
        return body

    def _is_uploaded(self, path: str) -> bool:
        try:
            return Path(path).resolve().is_relative_to(self._uploads)
        except (ValueError, OSError):
            return False


class _RefusedError(Exception):
    """A request that is not answered: the status, and why."""


def _hostname(address: str) -> str:
    try:
        return urlsplit(address).hostname or ""
    except ValueError:
        return ""


def _paths(value: Any) -> Iterator[str]:
    """Finds the paths of all files that a JSON names in Gradio's way."""
    if isinstance(value, dict):
        if "path" in value:
            yield str(value["path"])
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from _paths(each)
