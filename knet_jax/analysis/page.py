"""The page of an analysis: one file of HTML beside its pictures, without scripts."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import cv2
import numpy as np

from knet_jax.analysis.findings import KINDS

PAGE = "index.html"
NOTHING = "nothing"
"""What stands for no segment in the matrix of confusion."""
MAX_ROWS = 40
"""How many classes or kernels a table of the page has at most; analysis.json has them all."""
HUES = ("#2a6fb0", "#e08a1e", "#3d9a50")
"""Colors of the bars of a chart, one after the other."""
COLORS = ((0, 160, 80), (220, 0, 220), (255, 200, 0), (0, 200, 255), (255, 120, 0), (230, 20, 20))
"""RGB of the outlines of each of `KINDS`."""

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; max-width: 1500px; padding: 1em 2em;
  color: #222; background: #fff }
h1 { font-size: 1.5em } h2 { margin-top: 2em; border-bottom: 1px solid #ccc } h3 { margin-bottom: .3em }
p, li { max-width: 60em } figcaption { color: #666; font-size: 12px }
figure { margin: 1em 0 }
img { max-width: 100% } svg { max-width: 100%; height: auto }
table { border-collapse: collapse; font-size: 13px; margin: .5em 0 }
td, th { padding: 2px 7px; text-align: right; font-weight: normal } th { color: #555 }
th:first-child { text-align: left; white-space: nowrap; max-width: 24em; overflow: hidden;
  text-overflow: ellipsis } thead th { vertical-align: bottom; border-bottom: 1px solid #ccc }
.wide { overflow-x: auto } .tall thead th:not(:first-child) { writing-mode: vertical-rl;
  transform: rotate(180deg); text-align: left; max-height: 12em }
.kernels { display: flex; flex-wrap: wrap; gap: 10px } .kernels figure { margin: 0; width: 110px }
.kernels img { width: 110px; height: 110px; display: block }
.key { display: inline-block; width: .9em; height: .9em; margin: 0 .3em 0 1em; vertical-align: -.1em }
nav a { margin-right: 1.2em } .beside { display: flex; flex-wrap: wrap; gap: 1em 3em }
.beside > div { max-width: 100% }
"""


def render(report: Mapping[str, Any], maps: np.ndarray) -> str:
    """The page of a report.

    Args:
        report: what analysis.json holds; whatever names it has, they are shown as text.
        maps: mean activity of each kernel, [n, h, w] in 0 … 1.
    """
    parts = {
        "Updates": _updates(report),
        "Kernels": _kernels(report, maps),
        "Mistakes": _mistakes(report),
        "Confusion": _confusion(report),
        "Size and number": _sizes(report),
        "Calibration": _calibration(report),
    }
    anchors = "".join(f'<a href="#part{i}">{title}</a>' for i, title in enumerate(parts))
    body = "".join(
        f'<h2 id="part{i}">{title}</h2>{part}' for i, (title, part) in enumerate(parts.items())
    )
    about = escape(f"step {report['step']}, {report['num_images']} pictures of {report['split']}")
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>Inside, {about}</title>'
        f"<style>{STYLE}</style></head><body><h1>Inside the network</h1><p>{about}. All numbers: "
        f'<a href="analysis.json">analysis.json</a>.</p><nav>{anchors}</nav>{body}</body></html>\n'
    )


def _updates(report: Mapping[str, Any]) -> str:
    rows = report["rounds"]
    names = [name for name in rows[0] if name != "updates"]
    shown = [name for name in names if rows[-1][name] is not None][:3]
    return (
        "<p>What the masks are worth after every update of the kernels (Figure 4b and A1 of the "
        "paper): before the first, kernels are the same for all pictures.</p>"
        + beside(
            bars([row["updates"] for row in rows], {n: [row[n] for row in rows] for n in shown}),
            table(
                ["updates", *names], [[row["updates"], *(row[n] for n in names)] for row in rows]
            ),
        )
        + "".join(_picture(entry["picture"]) for entry in report["shown"])
    )


def _kernels(report: Mapping[str, Any], maps: np.ndarray) -> str:
    groups = {"Of things": [], "Of stuff": []}
    for kernel in sorted(report["kernels"], key=lambda kernel: -kernel["activity"]):
        groups["Of stuff" if kernel["stuff"] is not None else "Of things"].append(kernel)
    text = (
        "<p>The mean of every kernel's masks over the pictures, all stretched to a square (Figure 4a "
        "of the paper), the most active first. The brightest point of each is its own maximum; below "
        "stands the mean over all of it.</p>"
    )
    for title, kernels in groups.items():
        figures = "".join(
            f'<figure><img src="{_heat_map(maps[kernel["kernel"]])}" alt="">'
            f"<figcaption>{escape(kernel['stuff'] or 'kernel ' + str(kernel['kernel']))}: "
            f"{kernel['activity']:.1f} %</figcaption></figure>"
            for kernel in kernels
        )
        text += f'<h3>{title}</h3><div class="kernels">{figures}</div>' if kernels else ""
    served = groups["Of things"]
    if not served:
        return text
    counts = np.array([kernel["serves"] for kernel in served])
    busy = np.argsort(-counts.sum(1), kind="stable")[:MAX_ROWS]
    classes = np.argsort(-counts.sum(0), kind="stable")[: min(MAX_ROWS, counts.any(0).sum())]
    rows = [(f"kernel {served[i]['kernel']}", *counts[i, classes].tolist()) for i in busy]
    return (
        f"{text}<h3>Which kernels serve which classes</h3><p>In how many pictures the best class of a "
        f"kernel scores at least 0.3. The busiest {len(busy)} of {len(counts)} kernels.</p>"
        + table(["", *(report["classes"][label]["name"] for label in classes)], rows, is_heat=True)
    )


def _mistakes(report: Mapping[str, Any]) -> str:
    rows = sorted(report["classes"], key=lambda row: -sum(row[kind] for kind in KINDS[1:]))
    rows = [row for row in rows if any(row[kind] for kind in KINDS)]
    total = [sum(row[kind] for row in rows) for kind in KINDS]
    named = [(row["name"], *(row[kind] for kind in KINDS)) for row in rows[:MAX_ROWS]]
    keys = "".join(
        f'<span class="key" style="background:rgb{color}"></span>{kind}'
        for kind, color in list(zip(KINDS, COLORS))[1:]
    )
    worst = "".join(
        _picture(
            entry["picture"],
            f"{entry['image']}, quality {entry['quality']}",
            "; ".join(
                f"{times} × {text}" if times > 1 else text
                for text, times in Counter(map(_describe, entry["mistakes"])).items()
            ),
        )
        for entry in report["worst"]
    )
    return (
        "<p>A predicted segment is right if its IoU with one of its class is above 0.5, a duplicate if "
        "that one has been found before, confused if its IoU with one of another class is above 0.5, "
        "badly outlined from an IoU of 0.1 with one of its class, and else invented. A true segment "
        "that none of them is about, inventions aside, is missed.</p>"
        + table(["", *KINDS], [["all", *total]])
        + f"<h3>By class, most mistakes first</h3>{table(['', *KINDS], named, is_heat=True)}"
        + "<h3>The worst pictures</h3><p>Quality is panoptic quality of all segments, as if of one "
        + f"class. Outlines:{keys}</p>{worst or '<p>None: all are perfect.</p>'}"
    )


def _describe(mistake: Mapping[str, Any]) -> str:
    """A mistake in a few words."""
    kind, true, predicted = mistake["kind"], mistake["true"], mistake["predicted"]
    if kind == "confused":
        return f"{true} taken for {predicted} (IoU {mistake['IoU']:.0f} %)"
    if kind in ("invented", "missed"):
        return f"{kind} {true or predicted}"
    return f"{kind} {true} (IoU {mistake['IoU']:.0f} %)"


def _confusion(report: Mapping[str, Any]) -> str:
    confusion = report["confusion"]
    counts, names = np.array(confusion["counts"]), confusion["names"]
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    wrong = wrong.sum(0) + wrong.sum(1)
    occurs = [i for i in range(len(names) - 1) if counts[i].any() or counts[:, i].any()]
    chosen = sorted(sorted(occurs, key=lambda i: -wrong[i])[:MAX_ROWS]) + [len(names) - 1]
    matrix = [(names[i], *counts[i, chosen].tolist()) for i in chosen if counts[i].any()]
    pairs = [
        [f"{p['true']} → {p['predicted']}", p["count"], p["share"]] for p in confusion["pairs"]
    ]
    few = f" The {MAX_ROWS} classes with the most mistakes." if len(occurs) > MAX_ROWS else ""
    return (
        f"<p>Rows are what is there, columns what it is taken for, in {confusion['unit']}.{few}</p>"
        + beside(
            table(["", *(names[i] for i in chosen)], matrix, is_heat=True),
            table(["most often confused", confusion["unit"], "% of class"], pairs) if pairs else "",
        )
    )


def _sizes(report: Mapping[str, Any]) -> str:
    sizes = [row for row in report["sizes"] if row["objects"]]
    numbers = [row for row in report["num_objects"] if row["images"]]
    *_, score = report["num_objects"][0]
    return (
        "<p>Objects by the side of a square of the same area, in pixels: the share that a prediction of "
        "the class finds (IoU above 0.5), and the mean of their best IoU. "
        "Beside it, pictures by the number of objects in them. (In brackets: how many there are.)</p>"
        + beside(
            bars(
                [f"{_range(row)} ({row['objects']})" for row in sizes],
                {name: [row[name] for row in sizes] for name in ("found", "IoU")},
            ),
            bars(
                [f"{_range(row)} ({row['images']})" for row in numbers],
                {score: [row[score] for row in numbers]},
            ),
        )
    )


def _calibration(report: Mapping[str, Any]) -> str:
    calibration = report["calibration"]
    if calibration is None:
        return "<p>The results of this task have no scores.</p>"
    bins = [row for row in calibration["bins"] if row["predictions"]]
    return (
        "<p>Predictions by their score: a score that says how good a mask is equals the best IoU with a "
        f"segment of the class. On average they differ by {calibration['error']:.1f} % "
        "(by ranges of score, weighted by the number of predictions).</p>"
        + bars(
            [f"{row['from']:.1f}–{row['below']:.1f} ({row['predictions']})" for row in bins],
            {name: [row[name] for row in bins] for name in ("score", "IoU")},
        )
    )


def _range(row: Mapping[str, Any]) -> str:
    """What a row counts: whole numbers from one to below another."""
    if row["below"] is None:
        return f"{row['from']}+"
    last = row["below"] - 1
    return str(last) if last == row["from"] else f"{row['from']}–{last}"


def _picture(path: str, title: str = "", text: str = "") -> str:
    return (
        f'<figure><a href="{escape(path)}"><img loading="lazy" src="{escape(path)}" alt=""></a>'
        f"<figcaption><b>{escape(title)}</b> {escape(text)}</figcaption></figure>"
    )


def _heat_map(values: np.ndarray) -> str:
    """A picture of a map, [h, w], from 0 to its maximum, as the address of an image."""
    scaled = np.round(255 * values / max(values.max(), 1e-9)).astype(np.uint8)
    png = cv2.imencode(".png", cv2.applyColorMap(scaled, cv2.COLORMAP_VIRIDIS))[1]
    return "data:image/png;base64," + base64.b64encode(png.tobytes()).decode()


def _cell(value: Any) -> str:
    shown = "–" if value is None else f"{value:.1f}" if isinstance(value, float) else str(value)
    return escape(shown)


def beside(*parts: str) -> str:
    """Lays parts side by side where there is room."""
    return f'<div class="beside">{"".join(f"<div>{part}</div>" for part in parts)}</div>'


def table(head: Iterable[Any], rows: Iterable[Sequence[Any]], is_heat: bool = False) -> str:
    """A table whose first column names the rows; the cells of a heat map are counts, each as dark as its
    share of the row."""
    lines = ""
    for name, *values in rows:
        total = max(1, sum(values)) if is_heat else 1
        shades = (0.85 * value / total if is_heat else 0 for value in values)
        cells = (
            f'<td style="background:rgba(42,111,176,{shade:.2f})">'
            f"{'' if is_heat and not value else _cell(value)}</td>"
            for value, shade in zip(values, shades)
        )
        lines += f"<tr><th>{_cell(name)}</th>{''.join(cells)}</tr>"
    heads = "".join(f"<th>{_cell(name)}</th>" for name in head)
    kind = "wide tall" if is_heat else "wide"
    return f'<div class="{kind}"><table><thead><tr>{heads}</tr></thead>{lines}</table></div>'


def bars(labels: Sequence[Any], series: Mapping[str, Sequence[float | None]]) -> str:
    """A chart of values in percent, a group of bars for each label. SVG."""
    height, base, longest = 180, 200, max((len(str(label)) for label in labels), default=0)
    group = max(30 + 26 * len(series), 12 + 6 * longest)
    width, first = max(260, 40 + group * len(labels)), 40 + (group - 26 * len(series)) // 2
    marks = "".join(
        f'<path d="M36 {base - height * y / 100}H{width}" stroke="#ddd"/><text x="32" '
        f'y="{base - height * y / 100 + 4}" text-anchor="end">{y}</text>'
        for y in range(0, 101, 25)
    )
    for j, (name, values) in enumerate(series.items()):
        hue, left = HUES[j % len(HUES)], 40 + 90 * j
        marks += f'<rect x="{left}" y="-14" width="10" height="10" fill="{hue}"/>'
        marks += f'<text x="{left + 14}" y="-5">{escape(name)}</text>'
        for i, value in enumerate(values):
            if value is not None:
                x, tall = first + group * i + 26 * j, height * min(max(value, 0), 100) / 100
                marks += f'<rect x="{x}" y="{base - tall:.1f}" width="24" height="{tall:.1f}" '
                marks += f'fill="{hue}"/><text x="{x + 12}" y="{base - tall - 3:.1f}" '
                marks += f'text-anchor="middle">{value:.0f}</text>'
    for i, label in enumerate(labels):
        middle = first + group * i + 13 * len(series)
        marks += f'<text x="{middle}" y="{base + 16}" text-anchor="middle">{_cell(label)}</text>'
    return (
        f'<svg viewBox="0 -16 {width} {base + 42}" width="{width}" font-size="11" fill="#444">'
        f"{marks}</svg>"
    )
