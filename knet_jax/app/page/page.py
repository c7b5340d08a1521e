"""The application of the page: pictures come in, segments and files go out, nothing else."""

from __future__ import annotations

import html
import importlib.resources
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import jax

from knet_jax.app.page.views import Pictures, Seen, css_color, display
from knet_jax.app.segmenter import Segmenter
from knet_jax.segmentation.drawing import class_colors
from knet_jax.segmentation.segments import Categories
from knet_jax.system.errors import UserError

VIEWS = {
    "panoptic": {"Panoptic": "panoptic", "Instances": "instance", "Semantic": "semantic"},
    "instance": {"Instances": "instance"},
    "semantic": {"Semantic": "semantic"},
}
"""The task of a network -> the views that the page offers: caption -> task that is shown."""

WAITING = 64
"""How many pictures may wait for their turn; more are turned away."""

KEPT = 3600
"""Seconds after which files are removed."""

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

# Saves the file that the server has made, in the browser.
SAVE = """(file) => {
  const link = document.createElement("a");
  link.href = file.url;
  link.download = file.orig_name;
  link.click();
}"""


def describe(segmenter: Segmenter, name: str) -> str:
    """Describes the model, in HTML."""
    parts = [
        f"{segmenter.task} segmentation",
        f"model {name}, step {segmenter.step}",
        f"{segmenter.config.model.dtype} on {jax.devices()[0].device_kind}",
    ]
    return f"<h1>K-Net</h1><p>{html.escape(' · '.join(parts))}</p>"


def list_categories(categories: Categories) -> str:
    """Lists the names of all classes, each with its color, in HTML."""
    colors = class_colors(categories.num_things, len(categories.names))
    return "".join(
        '<span style="display: inline-block; margin: 0.1rem 0.8rem 0.1rem 0">'
        f'<span style="color: {css_color(color)}">●</span> {html.escape(name)}</span>'
        for name, color in zip(categories.names, colors)
    )


def count_categories(categories: Categories) -> str:
    """Counts the classes of each kind, in words."""
    if not categories.num_things:
        return f"Categories: {categories.num_stuff} classes"
    stuff = f", {categories.num_stuff} of stuff" if categories.num_stuff else ""
    return f"Categories: {categories.num_things} of things{stuff}"


def make_app(
    segmenter: Segmenter,
    name: str,
    max_megapixels: float,
    max_upload_mb: int,
    hosts: Sequence[str] = (),
) -> Any:
    """Makes the server's application. Uploads go to the folder that GRADIO_TEMP_DIR names.

    Args:
        segmenter: of the model; it has one picture at a time.
        name: of the model.
        max_megapixels: of a picture; larger ones are refused.
        max_upload_mb: MiB of a file; larger ones are refused.
        hosts: names of the server in a browser's address, besides localhost.

    Returns:
        An ASGI application.
    """
    import fastapi
    import gradio as gr

    pictures = Pictures(segmenter, max_megapixels)
    views, thresholds = VIEWS[segmenter.task], segmenter.thresholds
    files = importlib.resources.files("knet_jax.app.page")
    limits = f"up to {max_upload_mb} MB and {max_megapixels:g} megapixels"

    def see(upload: dict, view: str, *values: float, whole: bool = False) -> Seen:
        if view not in views:
            problem = f"there is no view {view!r:.100}; accepted: {', '.join(views)}"
            print(problem, file=sys.stderr)
            raise UserError(problem)
        given = str(upload.get("orig_name") or Path(upload["path"]).name)[:100]
        return pictures.see(upload["path"], given, views[view], *values, whole=whole)

    def show(upload: dict | None, view: str, threshold: float, overlap: float) -> dict[str, Any]:
        """Segments of a picture, as the page shows them."""
        if not upload:
            return {"message": f"Drop a picture, {limits}."}
        try:
            return display(see(upload, view, threshold, overlap))
        except UserError as error:
            return {"message": str(error), "error": True}

    def write(suffix: str, upload: dict | None, view: str, threshold: float, overlap: float) -> str:
        if not upload:
            raise gr.Error("Drop a picture first.", print_exception=False)
        try:
            result = see(upload, view, threshold, overlap, whole=True).result
        except UserError as error:
            raise gr.Error(html.escape(str(error)), print_exception=False) from error
        source = Path(upload["path"])
        stem = f"{source.stem[:100]}_{result.task}_{threshold:g}_{overlap:g}"  # names have limits
        path = source.parent / f"{stem}{suffix}"
        result.save(path)
        return str(path)

    def write_png(upload: dict | None, view: str, threshold: float, overlap: float) -> str:
        """The picture under its segments, at its own size, as a PNG."""
        return write(".png", upload, view, threshold, overlap)

    def write_json(upload: dict | None, view: str, threshold: float, overlap: float) -> str:
        """The segments in the form of COCO's results, as a JSON."""
        return write(".json", upload, view, threshold, overlap)

    with gr.Blocks(
        title=f"K-Net: {name}", analytics_enabled=False, delete_cache=(KEPT // 10, KEPT)
    ) as page:
        gr.HTML(describe(segmenter, name))
        with gr.Row(elem_id="desk"):
            with gr.Column(elem_id="desk-picture"):
                upload = gr.Image(
                    type="filepath",
                    sources=["upload", "clipboard"],
                    label="Picture",
                    height=240,
                    buttons=[],
                )
            with gr.Column(elem_id="desk-settings"):
                view = gr.Radio(
                    list(views), value=next(iter(views)), label="Show", visible=len(views) > 1
                )
                threshold = gr.Slider(
                    0,
                    1,
                    value=thresholds["instance_threshold"],
                    step=0.01,
                    label="Score threshold",
                    info="A thing is shown from this score on.",
                    visible=segmenter.task != "semantic",
                )
                overlap = gr.Slider(
                    0,
                    1,
                    value=thresholds["overlap_threshold"],
                    step=0.01,
                    label="Overlap threshold",
                    info="Others leave a segment at least this share of its mask.",
                    visible=segmenter.task == "panoptic",
                )
                with gr.Row():
                    png = gr.Button("Save PNG", size="sm", min_width=120)
                    coco = gr.Button("Save JSON", size="sm", min_width=120)
                saved = gr.File(visible=False)
            with gr.Column(elem_id="desk-viewer"):
                viewer = gr.HTML(
                    {"message": f"Drop a picture, {limits}."},
                    html_template="",
                    js_on_load=(files / "viewer.js").read_text(),
                    shell=(files / "viewer.html").read_text(),
                    apply_default_css=False,
                    elem_id="viewer",
                )
        with gr.Accordion(count_categories(segmenter.categories), open=False):
            gr.HTML(list_categories(segmenter.categories))

        settings = [upload, view, threshold, overlap]
        # One picture at a time; without preprocessing, which would decode it and write it anew.
        event = {"concurrency_limit": 1, "concurrency_id": "network", "preprocess": False}
        gr.on(
            [upload.change, view.change, threshold.change, overlap.change],
            show,
            settings,
            viewer,
            api_name="segment",
            trigger_mode="always_last",
            show_progress="minimal",
            **event,
        )
        for button, function in ((png, write_png), (coco, write_json)):
            button.click(function, settings, saved, **event).success(None, saved, None, js=SAVE)
    page.queue(max_size=WAITING)
    app = gr.mount_gradio_app(
        fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        page,
        path="/",
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        max_file_size=max_upload_mb << 20,
        css=(files / "page.css").read_text(),
        theme=gr.themes.Default(
            font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
        ),
    )
    uploads = Path(os.environ["GRADIO_TEMP_DIR"])
    return Guard(app, (max_upload_mb << 20) + (1 << 16), uploads, hosts)


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
        self._names = ("localhost", *names)

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
