import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from absl import flags

from knet_jax.cli.commandline import run
from knet_jax.system.signals import Preempted

ROOT = Path(__file__).parents[1]

SCRIPT = '''"""Waits for a long time.

Examples:
  script.py --seconds=3
"""

import signal
import time

from absl import flags

from knet_jax.commandline import run

# What a shell starts in the background would ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)
flags.DEFINE_string("config", "configs/shapes_panoptic.py", "Config file and variants.")
flags.DEFINE_integer("seconds", 60, "How long.")


def main(command):
    print("waiting", flush=True)
    time.sleep(flags.FLAGS.seconds)


if __name__ == "__main__":
    run(main)
'''


@pytest.fixture
def start(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)

    def start_script(*arguments):
        return subprocess.Popen(
            [sys.executable, tmp_path / "script.py", *arguments],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start_script


def test_overrides_flags_and_paths_are_told_apart():
    seen = []
    verbosity = flags.FLAGS.verbosity if flags.FLAGS.is_parsed() else 0
    arguments = [
        "--config.a.b=1", "--verbosity", "1", "--config.c", "2", "--noconfig.d", "picture.png"
    ]  # fmt: skip
    run(lambda command: seen.append((command, flags.FLAGS.verbosity)), ["x", *arguments],
        takes_paths=True)  # fmt: skip
    flags.FLAGS.verbosity = verbosity
    command, value = seen[0]
    assert command.overrides == ["--config.a.b=1", "--config.c", "2", "--noconfig.d"]
    assert command.paths == ["picture.png"]
    assert value == 1


def mistake(command):
    raise ValueError("config.x is 1;\n  accepted: 2")


def full_disk(command):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/some/file")


def full_disk_without_a_name(command):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def file_for_a_folder(command):
    Path(__file__).mkdir()


def missing_file(command):
    Path("/proc/no/file").read_text()


def preemption(command):
    raise Preempted("stopped after step 7, which is saved")


@pytest.mark.parametrize(
    ("main", "arguments", "status", "line"),
    [
        (mistake, [], 2, "config.x is 1; accepted: 2"),
        (print, ["--verbosty=1"], 2, "Unknown command line flag 'verbosty'. Did you mean: "),
        (print, ["--verbosity=x"], 2, "flag --verbosity=x: "),
        (print, ["picture.png"], 2, "'picture.png' belongs to no flag (--help lists the flags)"),
        (full_disk, [], 1, "No space left on device: /some/file"),
        (full_disk_without_a_name, [], 1, "No space left on device\n"),
        (file_for_a_folder, [], 1, f"File exists: {__file__}"),
        (missing_file, [], 1, "No such file or directory: /proc/no/file"),
        (preemption, [], 143, "stopped after step 7, which is saved"),
    ],
)
def test_a_mistake_is_one_line_and_a_status(capsys, main, arguments, status, line):
    with pytest.raises(SystemExit) as caught:
        run(main, ["/somewhere/train.py", *arguments])
    said = capsys.readouterr().err
    assert said.startswith(f"train.py: {line}")
    assert said.count("\n") == 1
    assert caught.value.code == status


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_float_flag_is_a_number(capsys, value):
    flags.DEFINE_float("share", 0.5, "of something", 0, 1)
    try:
        with pytest.raises(SystemExit) as caught:
            run(print, ["train.py", f"--share={value}"])
    finally:
        delattr(flags.FLAGS, "share")
    assert caught.value.code == 2 and "share" in capsys.readouterr().err


def reset(command):
    raise OSError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))


@pytest.mark.parametrize(
    "main",
    [
        lambda command: np.zeros(3) + np.zeros(4),  # ValueErrors of libraries, in C and in Python
        lambda command: json.loads("{"),
        lambda command: {}["key"],
        reset,
    ],
)
def test_a_bug_is_raised(main):
    with pytest.raises((ValueError, KeyError, OSError)):
        run(main, ["train.py"])


def test_help_teaches(start):
    said, _ = start("--help").communicate(timeout=120)
    for text in (
        "Waits for a long time.",
        "--seconds: How long.",
        "configs/coco_panoptic.py: Panoptic K-Net on COCO",
        "variants: ms3x, r101, r101_dcn, swin_l, swin_t, bf16, tiny",
        "--config.optim.lr=",
    ):
        assert text in said


def test_help_lists_the_keys_of_a_config(start):
    said, _ = start("--config", "configs/coco_panoptic.py:r101", "-h").communicate(timeout=120)
    assert "  --config.model.backbone.depths=(3, 4, 23, 3)\n" in said


def test_ctrl_c_from_outside(start):
    child = start()
    assert child.stdout.readline() == "waiting\n"
    child.send_signal(signal.SIGINT)
    _, said = child.communicate(timeout=120)
    assert said == "script.py: interrupted\n"
    assert child.returncode == 130
