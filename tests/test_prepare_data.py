"""The program from end to end, in a process of its own, as a user runs it."""

import subprocess
import sys
from pathlib import Path

import cv2
import pytest
from devices import environment

ROOT = Path(__file__).parents[1]


def run(*arguments):
    """Status, standard output, standard error."""
    done = subprocess.run(
        [sys.executable, "prepare_data.py", *map(str, arguments)],
        cwd=ROOT,
        env=environment(1),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("task", ["panoptic", "instance", "semantic"])
def test_shapes_are_prepared_checked_and_drawn(tmp_path, task):
    status, out, err = run(
        *("--config", f"configs/shapes_{task}.py:tiny"),
        *(f"--config.data.data_dir={tmp_path / 'data'}", "--check", "--output", tmp_path / "out"),
    )
    assert status == 0, err
    assert "train: prepared in" in out and "16 pictures decoded" in out and "ignored:" in out
    for split in ("train", "val"):
        sheet = cv2.imread(str(tmp_path / "out" / f"shapes_{task}_{split}.png"))
        assert sheet is not None and sheet.std() > 10


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "--config is missing"),
        (
            ("--config", "configs/shapes_panoptic.py", "--config.task=depth"),
            "config.task is 'depth'",
        ),
        (
            ("--config", "configs/shapes_panoptic.py", "--config.data.flip=2"),
            "config.data.flip is 2",
        ),
        (
            ("--config", "configs/shapes_panoptic.py", "--config.task=semantic"),
            "config.data.canvas",
        ),
    ],
)
def test_mistakes_end_in_one_line(arguments, message):
    status, _, err = run(*arguments)
    assert status == 2 and message in err and len(err.strip().splitlines()) == 1
