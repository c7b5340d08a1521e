"""A page in the browser: drop a picture, see its segments, hover their names, save them.

python -m knet_jax.demo --model runs/demo
python -m knet_jax.demo --model runs/demo --port 8000 --max_megapixels 12

Needs `pip install -e '.[demo]'`. The page is for this machine alone, at http://127.0.0.1:7860, unless
--host says otherwise; with --host 0.0.0.0 everyone who reaches the machine may use it. Neither the
page nor the server asks the network for anything. Pictures are kept until the server ends, for at
most an hour. Ctrl-C ends it.
"""

from __future__ import annotations

import base64
import html
import importlib.resources
import logging
import os
import socket
import tempfile
import time
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import jax
import numpy as np
from absl import flags
from PIL import Image

from knet_jax.commandline import CommandLine, run
from knet_jax.configuration import ConfigError
from knet_jax.data.transforms import PICTURES, decode_image, segment_colors
from knet_jax.segmenter import Result, Segmenter, load
from knet_jax.structs import Categories, Instance, SegmentInfo
from knet_jax.visualize import as_panoptic, at_side, colors_of

VIEWS = {
    "panoptic": {"Panoptic": "panoptic", "Instances": "instance", "Semantic": "semantic"},
    "instance": {"Instances": "instance"},
    "semantic": {"Semantic": "semantic"},
}
"""What can be seen of a result, by the task of the network: caption -> task."""

SIDES = (640, 1600)
"""Pixels of the longer side of what the page shows: small pictures are enlarged, large ones reduced,
which bounds the time of each change. What is saved has the picture's own size."""

FORMATS = ("BMP", "JPEG", "PNG", "TIFF", "WEBP")
"""Of pictures, as Pillow calls them."""

REMEMBERED = 8
"""Reduced pictures of which the segments are kept, so that a slider need not start the network."""

WAITING = 64
"""Pictures that may wait for their turn; more are turned away."""

KEPT = 3600
"""Seconds after which files are removed."""

SEALED = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
    "connect-src 'self' data: blob:; base-uri 'self'; form-action 'self'"
)
"""Content security policy: what the page may load, which is nothing from elsewhere."""

# Saves the file that the server has made, in the browser.
SAVE = """(file) => {
  const link = document.createElement("a");
  link.href = file.url;
  link.download = file.orig_name;
  link.click();
}"""


# What is seen.


class Seen(NamedTuple):
    """What a network sees in a picture."""

    result: Result
    size: tuple[int, int]
    """Height and width of the file, which may be larger than the picture of the result."""
    speed: str
    """How long the network and its results took."""


class Pictures:
    """Uploaded pictures and what a network sees in them.

    Args:
      segmenter: the network.
      max_megapixels: of a picture.
    """

    def __init__(self, segmenter: Segmenter, max_megapixels: float):
        self._segmenter = segmenter
        self._max_megapixels = max_megapixels
        self._reduced = lru_cache(maxsize=REMEMBERED)(partial(self._find, max_side=SIDES[1]))
        # For both buttons.
        self._whole = lru_cache(maxsize=1)(self._find)

    def _find(
        self, path: str, overlap: float, threshold: float = 0.0, max_side: int | None = None
    ) -> Seen:
        image = decode_image(Path(path).read_bytes())
        size = image.shape[:2]
        if max_side and max(size) > max_side:
            image, _ = at_side(max_side, image)
        start, programs = time.perf_counter(), self._segmenter.num_programs
        result = self._segmenter(image, threshold, overlap)
        speed = f"segmented in {time.perf_counter() - start:.2f} s"
        if self._segmenter.num_programs > programs:
            speed += ", the first of its size"
        return Seen(result, size, speed)

    def see(
        self, path: str, name: str, task: str, threshold: float, overlap: float, whole: bool = False
    ) -> Seen:
        """The picture in a file as the page's settings want it.

        Args:
          path: of the file.
          name: what the user calls it.
          task: what to see.
          threshold: least score of a thing.
          overlap: least share of a mask that others leave it.
          whole: not reduced to what the page shows.

        Raises:
          ValueError: there is no such picture, or it is too large.
        """
        try:
            check_picture(path, self._max_megapixels)
            # Which things are shown changes nothing else: `above` gives what a threshold would, but
            # to find all costs more.
            seen = self._whole(path, overlap, threshold) if whole else self._reduced(path, overlap)
        except FileNotFoundError as error:
            raise ValueError(f"{name}: no longer here; drop it again") from error
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        return seen._replace(result=as_task(seen.result.above(threshold), task))


def check_picture(path: str, max_megapixels: float) -> None:
    """Looks at the head of a file, before anything of the picture's size is in memory.

    Raises:
      ValueError: it is no picture, or one of more than `max_megapixels`.
      FileNotFoundError: there is no file.
    """
    try:
        with Image.open(path, formats=FORMATS) as head:
            megapixels = head.width * head.height / 1e6
    except Image.DecompressionBombError:
        megapixels = np.inf
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError, ValueError) as error:
        accepted = ", ".join(PICTURES)
        raise ValueError(f"no picture that can be read; accepted: {accepted}") from error
    if megapixels > max_megapixels:
        size = f"{megapixels:.1f}" if np.isfinite(megapixels) else "far too many"
        raise ValueError(f"{size} megapixels; accepted: up to {max_megapixels:g}")


def as_task(result: Result, task: str) -> Result:
    """A panoptic result as instances or as classes, or the same where it is of that task."""
    if task == result.task:
        return result
    if task == "semantic":
        return replace(result, task=task, prediction=result.semantic + 1)
    things = tuple(Instance(s.rle, s.label, s.score, area=s.area) for s in result.instances)
    return replace(result, task=task, prediction=things)


def display(seen: Seen) -> dict[str, Any]:
    """What viewer.js shows: everything is ready for JSON."""
    result, (height, width) = seen.result, seen.size
    side = max(SIDES[0], *result.size)
    found = as_panoptic(result.prediction, result.size, min_score=0.0)
    _, [shown] = at_side(side, result.image, found)
    colors = dict(zip((s.id for s in found.segments), colors_of(found.segments, result.categories)))
    scored = result.task != "semantic"
    return {
        "picture": data_url(result.draw(side), ".jpg", [cv2.IMWRITE_JPEG_QUALITY, 92]),
        "ids": data_url(segment_colors(shown.ids), ".png"),
        "segments": [
            {
                "id": segment.id,
                "name": segment.name,
                "score": f"{segment.score:.2f}" if scored else "",
                "share": f"{100 * segment.area / found.ids.size:.1f} %",
                "color": css_color(colors[segment.id]),
            }
            for segment in result.segments
        ],
        "facts": [
            f"{width} × {height} pixels",
            f"{len(result.segments)} {'segments' if scored else 'classes'}",
            seen.speed,
        ],
    }


def data_url(picture: np.ndarray, suffix: str, options: list[int] | None = None) -> str:
    """A picture, uint8 [H, W, 3] in RGB, within an address."""
    data = cv2.imencode(suffix, picture[..., ::-1], options or [])[1].tobytes()
    return (
        f"data:image/{suffix[1:].replace('jpg', 'jpeg')};base64,{base64.b64encode(data).decode()}"
    )


def css_color(color: tuple[float, float, float]) -> str:
    """rgb(…) of RGB in 0 … 255."""
    return "rgb({:.0f} {:.0f} {:.0f})".format(*color)


# The page.


def describe(segmenter: Segmenter, name: str) -> str:
    """HTML: which network it is."""
    parts = [
        f"{segmenter.task} segmentation",
        f"model {name}, step {segmenter.step}",
        f"{segmenter.config.model.dtype} on {jax.devices()[0].device_kind}",
    ]
    return f"<h1>K-Net</h1><p>{html.escape(' · '.join(parts))}</p>"


def list_categories(categories: Categories) -> str:
    """HTML: the names of all classes, each with its color."""
    infos = [SegmentInfo(label, label) for label in range(len(categories.names))]
    return "".join(
        '<span style="display: inline-block; margin: 0.1rem 0.8rem 0.1rem 0">'
        f'<span style="color: {css_color(color)}">●</span> {html.escape(name)}</span>'
        for name, color in zip(categories.names, colors_of(infos, categories))
    )


def count_categories(categories: Categories) -> str:
    """How many there are of each kind."""
    if not categories.num_things:
        return f"Categories: {categories.num_stuff} classes"
    stuff = f", {categories.num_stuff} of stuff" if categories.num_stuff else ""
    return f"Categories: {categories.num_things} of things{stuff}"


def make_app(segmenter: Segmenter, name: str, max_megapixels: float, max_upload_mb: int) -> Any:
    """The server's application.

    Args:
      segmenter: the network; it has one picture at a time.
      name: of the model.
      max_megapixels: of a picture.
      max_upload_mb: MiB of a file.
    """
    import fastapi
    import gradio as gr

    pictures = Pictures(segmenter, max_megapixels)
    views, thresholds = VIEWS[segmenter.task], segmenter.thresholds
    files = importlib.resources.files("knet_jax") / "viewer"
    limits = f"up to {max_upload_mb} MB and {max_megapixels:g} megapixels"

    def see(upload: Any, view: str, *values: float, whole: bool = False) -> Seen:
        given = upload.orig_name or Path(upload.path).name
        return pictures.see(upload.path, given, views[view], *values, whole=whole)

    def show(upload: Any, view: str, threshold: float, overlap: float) -> dict[str, Any]:
        """Segments of a picture, as the page shows them."""
        if not (upload and upload.path):
            return {"message": f"Drop a picture, {limits}."}
        try:
            return display(see(upload, view, threshold, overlap))
        except ValueError as error:
            return {"message": str(error), "error": True}

    def write(suffix: str, upload: Any, view: str, threshold: float, overlap: float) -> str:
        if not (upload and upload.path):
            raise gr.Error("Drop a picture first.", print_exception=False)
        try:
            result = see(upload, view, threshold, overlap, whole=True).result
        except ValueError as error:
            raise gr.Error(html.escape(str(error)), print_exception=False) from error
        source = Path(upload.path)
        stem = f"{source.stem[:100]}_{result.task}_{threshold:g}_{overlap:g}"  # names have limits
        path = source.parent / f"{stem}{suffix}"
        result.save(path)
        return str(path)

    def write_png(upload: Any, view: str, threshold: float, overlap: float) -> str:
        """The picture under its segments, at its own size, as a PNG."""
        return write(".png", upload, view, threshold, overlap)

    def write_json(upload: Any, view: str, threshold: float, overlap: float) -> str:
        """The segments in the form of COCO's results, as a JSON."""
        return write(".json", upload, view, threshold, overlap)

    async def only_uploads(path: str) -> str:
        """In place of what Gradio would do: copy any file of this machine, or one of another."""
        if not Path(path).resolve().is_relative_to(Path(upload.GRADIO_CACHE).resolve()):
            raise gr.Error("Only a picture that was uploaded is read.", print_exception=False)
        return path

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
                upload.preprocess = lambda payload: payload  # files are read by our own reader
                upload.async_move_resource_to_block_cache = only_uploads
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
        one_at_a_time = {"concurrency_limit": 1, "concurrency_id": "network"}
        gr.on(
            [upload.change, view.change, threshold.change, overlap.change],
            show,
            settings,
            viewer,
            api_name="segment",
            trigger_mode="always_last",
            show_progress="minimal",
            **one_at_a_time,
        )
        for button, function in ((png, write_png), (coco, write_json)):
            button.click(function, settings, saved, **one_at_a_time).success(
                None, saved, None, js=SAVE
            )
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
    return Guard(app, (max_upload_mb << 20) + (1 << 16))


class Guard:
    """An ASGI application around another: no large bodies in, no page that loads from elsewhere.

    Args:
      app: the other.
      max_body: bytes of a request.
    """

    def __init__(self, app: Any, max_body: int):
        self._app = app
        self._max_body = max_body

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_sealed(message: Any) -> None:
            if message["type"] == "http.response.start":
                policy = (b"content-security-policy", SEALED.encode())
                message = {**message, "headers": [*message.get("headers", ()), policy]}
            await send(message)

        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = dict(scope["headers"])
        length = headers.get(b"content-length", b"0")
        if b"transfer-encoding" in headers or not length.isdigit() or int(length) > self._max_body:
            answer = f"a request has at most {self._max_body} bytes, and says how many".encode()
            start = {"type": "http.response.start", "status": 413, "headers": []}
            await send_sealed(start)
            return await send({"type": "http.response.body", "body": answer})
        await self._app(scope, receive, send_sealed)


# The server.


def listen(host: str, port: int) -> socket.socket:
    """A socket of this address. Raises ConfigError where that cannot be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno > 0 else error.strerror
        raise ConfigError(
            f"--host={host} --port={port}: {reason}; --port=0 takes a free port"
        ) from error


def address(listener: socket.socket) -> str:
    """Where a browser finds a socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def main(command: CommandLine) -> None:
    """See the top of the file."""
    values = flags.FLAGS
    if values.model is None:
        raise ConfigError("--model is missing: the folder of a run of train.py, or of a conversion")
    with tempfile.TemporaryDirectory(prefix="knet_jax_demo_") as folder:
        os.environ |= {
            "GRADIO_TEMP_DIR": folder,
            "GRADIO_ANALYTICS_ENABLED": "False",
            "HF_HUB_OFFLINE": "1",
        }
        try:
            import gradio  # noqa: F401
            import uvicorn
        except ImportError as error:
            raise ConfigError("the page needs gradio: pip install -e '.[demo]'") from error
        with listen(values.host, values.port) as listener:
            segmenter = load(
                values.model, values.checkpoint, values.ema, overrides=command.overrides
            )
            name = Path(values.model).resolve().name
            app = make_app(segmenter, name, values.max_megapixels, values.max_upload_mb)
            print(f"{name} ({segmenter.task}, step {segmenter.step}): {address(listener)}")
            print("Ctrl-C ends it", flush=True)
            server = uvicorn.Server(
                uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
            )
            # Connections that are cut off at the end are no errors.
            logging.getLogger("uvicorn.error").addFilter(lambda record: not server.should_exit)
            server.run(sockets=[listener])


if __name__ == "__main__":
    flags.DEFINE_string("model", None, "folder of a run of train.py, or of a conversion")
    flags.DEFINE_string("checkpoint", "best", "best, latest, or the number of a step")
    flags.DEFINE_boolean("ema", False, "the moving average of the parameters")
    flags.DEFINE_string("host", "127.0.0.1", "address to listen at; 0.0.0.0 is all of this machine")
    flags.DEFINE_integer("port", 7860, "port to listen at; 0 is any that is free", 0, 65535)
    flags.DEFINE_float("max_megapixels", 50, "of a picture; larger ones are refused", 0.01, 178)
    flags.DEFINE_integer("max_upload_mb", 50, "MB of a file; larger ones are refused", 1, 4096)
    run(main)
