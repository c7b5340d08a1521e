"""What a run writes about itself: `log.jsonl`, TensorBoard events, a progress line, and curves.

A record of `log.jsonl` is a line of JSON: {"step": 50, "epoch": 0.007, "loss/total": 3.1, ...}.
`knet logs WORKDIR` draws the records of a run, while it runs or afterwards.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np
from matplotlib.figure import Figure
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from knet_jax.system.errors import UserError
from knet_jax.system.output_files import naming_output, write_whole
from knet_jax.training.trackers import Tracker

LOG_NAME = "log.jsonl"
CURVE_NAME = "curve.png"


def read_log(workdir: str | Path) -> list[dict[str, Any]]:
    """The records of a run in the order in which they were written.

    What is no record, such as a line that a killed run left unfinished, is left out.

    Raises:
        UserError: there is no log.
    """
    path = Path(workdir) / LOG_NAME
    if not path.is_file():
        raise UserError(f"there is no {LOG_NAME} in {workdir}")
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    return [record for line in lines if (record := _parse_record(line))]


def _parse_record(line: str) -> dict[str, Any] | None:
    with suppress(ValueError, RecursionError):
        record = json.loads(line)
        values = record.values() if isinstance(record, dict) else ()
        numbers = all(value is None or isinstance(value, int | float) for value in values)
        if values and numbers and isinstance(record.get("step"), int):
            return record
    return None


class Log:
    """Writes scalars to `log.jsonl` and TensorBoard, pictures to TensorBoard, both to a tracker.

    What an earlier run in the same workdir logged beyond `start_step` is dropped: it will be
    computed again. So is the evaluation of that step, which a kill may have left half done.

    Args:
        workdir: an existing folder.
        steps_per_epoch: for the epoch of a record.
        start_step: steps done when the run starts or resumes.
        tracker: where the run is logged too.

    Raises:
        OSError: the files cannot be written; they are named. The methods raise it too.
    """

    def __init__(
        self,
        workdir: str | Path,
        steps_per_epoch: float,
        start_step: int = 0,
        tracker: Tracker | None = None,
    ):
        self._tracker = tracker
        self._steps_per_epoch = steps_per_epoch
        self._path, self._folder = Path(workdir) / LOG_NAME, Path(workdir) / "events"
        if self._path.exists():
            kept = [
                json.dumps(record) + "\n"
                for record in read_log(workdir)
                if record["step"] < start_step
                or (record["step"] == start_step and not any(k.startswith("val") for k in record))
            ]
            write_whole(self._path, "".join(kept).encode())
        with naming_output(self._path):
            self._file = self._path.open("a", buffering=1)
        with naming_output(self._folder):
            self._folder.mkdir(exist_ok=True)
            # Not through the library's thread: should that die of a full disk, its queue fills up
            # and blocks the training for ever.
            self._events = EventsWriter(str(self._folder / "events"), f".{os.getpid()}")
            start = SessionLog(status=SessionLog.START)
            self._write_event(step=start_step + 1, session_log=start)

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes one record; values are numbers or arrays of one element, a NaN becomes null."""
        numbers = {name: float(value) for name, value in values.items()}
        record = {"step": step, "epoch": round(step / self._steps_per_epoch, 6)}
        record |= {name: x if math.isfinite(x) else None for name, x in numbers.items()}
        with naming_output(self._path):
            self._file.write(json.dumps(record, allow_nan=False) + "\n")
        with naming_output(self._folder):
            for name, x in numbers.items():
                self._write_event(step=step, summary=summary.scalar(name, x))
            self._events.flush()
        if self._tracker:
            self._tracker.scalars(step, numbers)

    def images(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:
        """Shows uint8 pictures [H, W, 3] in TensorBoard."""
        with naming_output(self._folder):
            for name, picture in pictures.items():
                image = summary.image(name, picture, dataformats="HWC")
                self._write_event(step=step, summary=image)
            self._events.flush()
        if self._tracker:
            self._tracker.images(step, pictures)

    def close(self) -> None:
        """Writes out what is buffered."""
        self._file.close()
        with naming_output(self._folder):
            self._events.close()
        if self._tracker:
            self._tracker.close()

    def _write_event(self, **fields: Any) -> None:
        self._events.write_event(Event(wall_time=time.time(), **fields))


class Progress:
    """A line that says how far a run is and when it will be done.

    On a terminal the line is rewritten; elsewhere a new one is printed every half minute.
    """

    def __init__(self, total_steps: int, *, stream: TextIO | None = None):
        self._total = total_steps
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._interval = 0.2 if self._terminal else 30.0
        self._shown = -math.inf
        # The first step is not among them: it compiles and says nothing about the rest.
        self._times: deque[tuple[int, float]] = deque(maxlen=200)

    def update(self, step: int, values: Mapping[str, Any] | None = None) -> None:
        """Takes note of a step that is done, and shows the line if it is time to.

        The values, shown in their order, are read only then.
        """
        now = time.monotonic()
        self._times.append((step, now))
        if now - self._shown < self._interval and step < self._total:
            return
        self._shown = now
        parts = [f"step {step}/{self._total} ({100 * step / self._total:.0f} %)"]
        parts += [f"{name} {float(value):.4g}" for name, value in (values or {}).items()]
        first_step, first_time = self._times[0]
        if step > first_step:
            seconds = (now - first_time) / (step - first_step)
            parts.append(f"{format_duration(seconds * (self._total - step))} left")
        self._write(", ".join(parts))

    @contextmanager
    def waiting(self, text: str) -> Iterator[None]:
        """Says every few seconds, as long as the context lasts, that something goes on."""
        began, done = time.monotonic(), threading.Event()

        def say() -> None:
            while not done.wait(1 if self._terminal else 5):
                self._write(f"{text}, {format_duration(time.monotonic() - began)}")

        thread = threading.Thread(target=say, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def print(self, text: str) -> None:
        """Prints lines of text without tearing the progress line."""
        self._stream.write(("\r\x1b[K" if self._terminal else "") + text + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Leaves the last line standing."""
        if self._terminal:
            self._stream.write("\n")
            self._stream.flush()

    def _write(self, line: str) -> None:
        if self._terminal:
            # Never wider than the terminal: a line that wraps cannot be rewritten.
            self._stream.write("\r\x1b[K" + line[: shutil.get_terminal_size().columns - 1])
        else:
            self._stream.write(line + "\n")
        self._stream.flush()


class Interval:
    """What the log says about the steps since its last record: means, speed, waiting for data."""

    def __init__(self, batch_size: int):
        self._batch_size = batch_size
        self._speed_before: dict[str, float] = {}
        self.restart()

    def restart(self) -> None:
        """Forgets the steps before."""
        self._metrics: list[Mapping[str, jax.Array]] = []
        self._began = time.monotonic()
        self.waited = 0.0
        """Seconds spent waiting for data; the loop adds to them."""

    def add(self, metrics: Mapping[str, jax.Array]) -> None:
        """Takes the metrics of a step, which the device may still be computing."""
        self._metrics.append(metrics)

    def last(self) -> dict[str, Any]:
        """For the progress line; the loss is that of the last step which is surely done."""
        speed = self._speed()
        # Steps are handed to the device before they are done: a few of them seem fast.
        if len(self._metrics) < 5:
            speed |= self._speed_before
        return {"loss": self._metrics[-2:][0]["loss/total"]} | speed

    def close(self) -> dict[str, float]:
        """The record of the interval, which ends here."""
        metrics = jax.device_get(self._metrics)
        means = {name: float(np.mean([m[name] for m in metrics])) for name in metrics[0]}
        self._speed_before = self._speed()
        self.restart()
        return means | self._speed_before

    def _speed(self) -> dict[str, float]:
        seconds = time.monotonic() - self._began
        rate = len(self._metrics) * self._batch_size / seconds
        return {"images_per_second": rate, "data_wait_share": self.waited / seconds}


def format_duration(seconds: float) -> str:
    """`3:07` (minutes), `2:03:07` (hours), `1 d 2:03:07`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if not hours:
        return f"{minute}:{second:02d}"
    return (f"{days} d " if days else "") + f"{hour}:{minute:02d}:{second:02d}"


def plot_curves(workdir: str | Path) -> Path:
    """Draws every logged value over the steps, a panel for each prefix, into `curve.png`.

    Raises:
        UserError: there is nothing to draw.
    """
    panels: dict[str, dict[str, tuple[list[int], list[float]]]] = {}
    for record in read_log(workdir):
        for name in record.keys() - {"step", "epoch"}:
            if record[name] is not None:
                panel = panels.setdefault(name.split("/")[0], {})
                steps, values = panel.setdefault(name, ([], []))
                steps.append(record["step"])
                values.append(record[name])
    if not panels:
        raise UserError(f"{Path(workdir) / LOG_NAME} has no values yet")

    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(6 * columns, 4 * rows), layout="constrained")
    for place, (prefix, lines) in enumerate(sorted(panels.items()), 1):
        axes = figure.add_subplot(rows, columns, place, title=prefix, xlabel="step")
        for name, (steps, values) in sorted(lines.items()):
            marker = "." if len(steps) < 30 else ""
            axes.plot(steps, values, marker=marker, linewidth=1, label=name)
        if prefix in ("loss", "lr") and all(min(values) > 0 for _, values in lines.values()):
            axes.set_yscale("log")
        if len(lines) > 1:
            axes.legend(fontsize="xx-small", ncols=1 + len(lines) // 10)
        axes.grid(alpha=0.3)
    path = Path(workdir) / CURVE_NAME
    figure.savefig(path, dpi=100)
    return path
