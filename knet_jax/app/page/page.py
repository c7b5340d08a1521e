"""The application of the page: pictures come in, segments and files go out, nothing else."""

from __future__ import annotations

import html
import importlib.resources
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from knet_jax.app.page.guard import Guard
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
    """Makes the server's application, as ASGI has it. Its segmenter gets one picture at a time.

    Uploads go to the folder that GRADIO_TEMP_DIR names. Browsers may call the server by one of the
    names `hosts`, besides localhost.
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
