import errno
import io
import json
import sys
import threading
import time
from types import SimpleNamespace
from unittest.mock import MagicMock

import cv2
import numpy as np
import pytest
from programs import status_of
from tensorboardX.proto.event_pb2 import Event

from knet_jax.config.files import load_config
from knet_jax.system.errors import UserError
from knet_jax.training import logs
from knet_jax.training.logs import Log
from knet_jax.training.trackers import open_tracker


class Terminal(io.StringIO):
    def isatty(self):
        return True


def events(workdir):
    """Events of every TensorBoard file, read by its framing: length, checksum, data, checksum."""
    found = []
    for path in sorted((workdir / "events").iterdir()):
        data = path.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            found.append(Event.FromString(data[12 : 12 + size]))
            data = data[16 + size :]
    return found


def test_scalars_reach_the_log_and_tensorboard(tmp_path):
    log = logs.Log(tmp_path, steps_per_epoch=4)
    log.scalars(2, {"loss/total": np.float32(0.5), "lr/head": 1e-4})
    assert len(logs.read_log(tmp_path)) == 1  # on disk at once
    log.scalars(4, {"loss/total": float("nan"), "val/PQ": 12.5})
    log.images(4, {"val/panel": np.full((8, 6, 3), 200, np.uint8)})
    log.close()

    assert logs.read_log(tmp_path) == [
        {"step": 2, "epoch": 0.5, "loss/total": 0.5, "lr/head": 1e-4},
        {"step": 4, "epoch": 1.0, "loss/total": None, "val/PQ": 12.5},
    ]
    values = [(e.step, v) for e in events(tmp_path) for v in e.summary.value]
    assert [(s, v.tag, v.simple_value) for s, v in values if v.tag == "val/PQ"] == [
        (4, "val/PQ", 12.5)
    ]
    picture = next(v.image for _, v in values if v.tag == "val/panel")
    pixels = cv2.imdecode(np.frombuffer(picture.encoded_image_string, np.uint8), cv2.IMREAD_COLOR)
    assert pixels.shape == (8, 6, 3)
    assert (pixels == 200).all()


def test_resuming_drops_what_will_be_computed_again(tmp_path):
    log = logs.Log(tmp_path, 1)
    for step in range(1, 7):
        log.scalars(step, {"loss/total": step})
    log.close()
    with (tmp_path / logs.LOG_NAME).open("a") as file:
        file.write('{"step": 7, "lo')  # killed while writing

    log = logs.Log(tmp_path, 1, start_step=4)
    log.scalars(5, {"loss/total": 50})
    log.close()
    assert [(r["step"], r["loss/total"]) for r in logs.read_log(tmp_path)] == [
        (1, 1), (2, 2), (3, 3), (4, 4), (5, 50)
    ]  # fmt: skip
    # TensorBoard itself forgets what lies at or beyond the step of a new START.
    starts = [e.step for e in events(tmp_path) if e.HasField("session_log")]
    assert starts[-1] == 5


def test_what_is_no_record_keeps_nothing_from_going_on(tmp_path):
    """A kill tears a line, a disk loses bytes."""
    rows = [{"step": 1, "a": 1.0}, {"step": 2, "a": None, "val/PQ": 3.0}]
    first, last = (json.dumps(row).encode() for row in rows)
    for junk in (
        b"rubbish", b"[]", b"{}", b'{"step": 2, "lo', b"\xff\xfe\0", b"null", b'{"step": "x"}', b"[" * 10**5,
        b'{"step": 1, "a": [1]}',
    ):  # fmt: skip
        (tmp_path / logs.LOG_NAME).write_bytes(b"\n".join((first, junk, last, junk)))
        assert logs.read_log(tmp_path) == rows
        logs.Log(tmp_path, 1, start_step=2).close()
        # The evaluation of the last step is written anew.
        assert logs.read_log(tmp_path) == rows[:1]


def test_a_full_disk_ends_in_an_error_that_names_the_file(tmp_path, monkeypatch):
    """Of the log as of the events, at once, and never in a thread of a library."""
    num_threads = threading.active_count()
    log = logs.Log(tmp_path, 1)
    full = OSError(errno.ENOSPC, "No space left on device")
    for place, method, name in (
        (log._file, "write", "log.jsonl"),
        (log._events, "flush", "events"),
    ):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space") as caught:
            writer = MagicMock(wraps=place, **{f"{method}.side_effect": full})
            patch.setattr(log, "_file" if name == "log.jsonl" else "_events", writer)
            log.scalars(1, {"loss/total": 1.0})
        assert caught.value.filename == str(tmp_path / name)
    assert threading.active_count() == num_threads
    log.close()


def test_waiting_says_for_how_long(monkeypatch):
    stream = Terminal()
    progress = logs.Progress(2, stream=stream)
    with progress.waiting("compiling the first step"):
        time.sleep(2.3)
    assert (
        "compiling the first step, 0:01\r\x1b[Kcompiling the first step, 0:02" in stream.getvalue()
    )


def test_progress_in_a_file_is_a_line_now_and_then(monkeypatch):
    clock = iter([100.0, 110.0, 111.0, 150.0, 151.0])
    monkeypatch.setattr(logs.time, "monotonic", lambda: next(clock))
    stream = io.StringIO()
    progress = logs.Progress(10, stream=stream)
    for step in (1, 2, 3, 4, 10):
        progress.update(step, {"loss": np.float32(1.23456), "images/s": 8})
    progress.close()
    assert stream.getvalue().splitlines() == [
        "step 1/10 (10 %), loss 1.235, images/s 8",
        "step 4/10 (40 %), loss 1.235, images/s 8, 1:40 left",  # 50 s for 3 steps, 6 to go
        "step 10/10 (100 %), loss 1.235, images/s 8, 0:00 left",
    ]


def test_progress_on_a_terminal_is_one_line_that_fits(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    stream = Terminal()
    progress = logs.Progress(2, stream=stream)
    progress.update(1, {f"term{i}": i for i in range(20)})
    progress.print("PQ 12.5")
    progress.update(2)
    progress.close()
    text = stream.getvalue()
    assert [line.rpartition("\x1b[K")[2] for line in text.splitlines() if "PQ" in line] == [
        "PQ 12.5"
    ]
    assert all(
        len(part) < 40 for part in text.replace("\n", "\r").replace("\x1b[K", "").split("\r")
    )
    assert text.endswith("\n")


def test_format_duration():
    for seconds, text in ((7, "0:07"), (187.4, "3:07"), (7387, "2:03:07"), (93787, "1 d 2:03:07")):
        assert logs.format_duration(seconds) == text


def test_curves_from_the_command_line(tmp_path, capsys):
    log = logs.Log(tmp_path, 1)
    for step in range(1, 40):
        log.scalars(step, {"loss/total": 1 / step, "loss/stage1/mask": 0.1, "lr/head": 1.0})
    log.scalars(39, {"val/PQ": 10, "loss/total": float("inf")})
    log.close()
    assert status_of("logs", tmp_path) == 0
    curve = cv2.imread(str(tmp_path / logs.CURVE_NAME))
    assert curve.shape == (400, 1800, 3)
    assert len(np.unique(curve.reshape(-1, 3), axis=0)) > 10
    capsys.readouterr()
    assert status_of("logs", tmp_path / "no") == 2
    missing = f"knet logs: there is no log.jsonl in {tmp_path / 'no'}\n"
    assert capsys.readouterr().err == missing


def test_an_empty_log_has_no_curves(tmp_path):
    (tmp_path / logs.LOG_NAME).write_text(json.dumps({"step": 1, "epoch": 1.0}) + "\n")
    with pytest.raises(ValueError, match="has no values yet"):
        logs.plot_curves(tmp_path)


@pytest.mark.parametrize(
    "name, variable", [("wandb", "WANDB_MODE"), ("mlflow", "MLFLOW_TRACKING_URI")]
)
def test_a_run_is_logged_to_a_tracker_too(tmp_path, monkeypatch, name, variable):
    pytest.importorskip(name)
    monkeypatch.setenv(variable, "offline" if name == "wandb" else f"file:{tmp_path / 'store'}")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    config = load_config("shapes_panoptic:tiny", {"train.tracker": name})
    for start in (0, 2):  # resumed under its own name
        log = Log(tmp_path, 10, start, open_tracker(config, tmp_path))
        log.scalars(start + 1, {"loss/total": 1.5, "val/PQ": float("nan")})
        log.images(start + 1, {"val/pictures": np.zeros((8, 9, 3), np.uint8)})
        log.close()
    id = (tmp_path / f"{name}.id").read_text()
    if name == "wandb":
        assert len([*tmp_path.glob(f"wandb/offline-run-*-{id}/*.wandb")]) == 2
    else:
        [file] = tmp_path.glob(f"store/*/{id}/metrics/loss/total")
        values = file.read_text()
        assert [line.split()[1:] for line in values.splitlines()] == [["1.5", "1"], ["1.5", "3"]]


def test_a_tracker_that_cannot_be_had_is_named(tmp_path, monkeypatch):
    config = load_config("shapes_panoptic:tiny", {"train.tracker": "wandb"})
    assert open_tracker(load_config("shapes_panoptic:tiny"), tmp_path) is None
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="^config.train.tracker=wandb: pip install wandb"):
        open_tracker(config, tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace())
    with pytest.raises(UserError, match="^config.train.tracker=wandb: .*attribute 'init'"):
        open_tracker(config, tmp_path)
