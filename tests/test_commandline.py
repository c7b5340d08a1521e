import errno
import json
import os
import signal
import subprocess
import sys
import time
from argparse import ArgumentTypeError
from pathlib import Path

import numpy as np
import pytest
from devices import environment
from programs import status_of

from knet_jax.cli.commandline import Parser, number
from knet_jax.cli.export import parse_size
from knet_jax.cli.main import COMMANDS, main
from knet_jax.system.errors import UserError
from knet_jax.system.exit_status import exit_statuses
from knet_jax.system.signals import Preempted

ROOT = Path(__file__).parents[1]


def make_parser():
    parser = Parser("train.py", "Trains.")
    parser.add_argument("paths", nargs="*")
    parser.add_argument("--workdir")
    parser.add_argument("--share", type=number(float, 0, 1), default=0.5)
    parser.add_argument("--count", type=number(int, 1))
    parser.switch("ema", "the average")
    return parser


def test_overrides_flags_and_paths_are_told_apart():
    assert make_parser().read(["--ema", "photo.jpg"]).ema
    overrides = ["--config.a.b=1", "--config.c", "2", "--noconfig.d", "--config.e=true"]
    args = make_parser().read(["one.png", *overrides, "--count", "1", "two.png", "--share=0.25"])
    assert args.overrides == overrides
    assert (args.paths, args.count, args.share) == (["one.png", "two.png"], 1, 0.25)
    assert (args.workdir, args.ema, args.help) == (None, False, False)


def test_flags_that_are_wrong_are_named():
    for arguments, words in (
        (["--workdi=x"], "there is no flag --workdi; did you mean workdir?"),
        (["--share=nan"], "argument --share: nan is not accepted; accepted: a number from 0 to 1"),
        (["--count=0"], "argument --count: 0 is not accepted; accepted: a whole number from 1 ("),
        (["--workdir"], "argument --workdir: expected one argument (--help lists the flags)"),
        (["--workdir="], "workdir is empty; accepted: a value"),
        (["a.png", ""], "paths is empty"),
    ):
        with pytest.raises(UserError) as error:
            make_parser().read(arguments)
        assert str(error.value).startswith(words)
    parser = Parser("logs.py", "Draws.")
    parser.reads_config = False
    for argument in ("picture.png", "--config.x=1"):
        with pytest.raises(UserError, match="picture.png|--config.x"):
            parser.read([argument])


FULL = os.strerror(errno.ENOSPC)


def test_a_mistake_is_one_line_and_a_status(capsys):
    for error, status, line in (
        (UserError("config.x is 1;\n  accepted: 2"), 2, "config.x is 1; accepted: 2"),
        (OSError(errno.ENOSPC, FULL, "/some/file"), 1, "No space left on device: /some/file"),
        (OSError(errno.ENOSPC, FULL), 1, "No space left on device"),
        (FileExistsError(errno.EEXIST, "File exists", "/a"), 1, "File exists: /a"),
        (Preempted("stopped after step 7"), 143, "stopped after step 7"),
        (Preempted("stopped", signal.SIGINT), 130, "stopped"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ):
        with pytest.raises(SystemExit) as caught, exit_statuses("train.py"):
            raise error
        assert caught.value.code == status
        assert capsys.readouterr().err == f"train.py: {line}\n"


def test_a_bug_is_raised():
    for bug in (
        lambda: np.zeros(3) + np.zeros(4),  # ValueErrors of libraries, in C and in Python
        lambda: json.loads("{"),
        lambda: {}["key"],
    ):
        with pytest.raises((ValueError, KeyError)), exit_statuses("train.py"):
            bug()


def test_commands_teach(capsys):
    main(["--help"])
    said = capsys.readouterr().out
    assert all(f"  {name} " in said for name in COMMANDS)
    for name in COMMANDS:
        assert status_of(name, "--help") == 0
        said = capsys.readouterr().out
        assert f"usage: knet {name}" in said and f"\nknet {name} " in said
        if name in ("train", "prepare", "convert"):
            assert "coco_panoptic: Panoptic K-Net on COCO" in said
            assert "variants: small, ms3x, r101, r101_dcn, swin_l, swin_t, " in said
    assert status_of("train", "--config", "coco_panoptic:r101", "-h") == 0
    depths = (
        "  --config.model.backbone.depths=(3, 4, 23, 3)\n      blocks; (3, 4, 23, 3) is ResNet-101"
    )
    assert f"{depths}; accepted: four numbers from 1 to 100" in capsys.readouterr().out


def test_what_a_command_lacks_is_named(capsys):
    for arguments, words in (
        (["trian"], "knet: there is no command 'trian'; did you mean train?"),
        (["train"], "knet train: --config is missing"),
        (["train", "--config", "coco_panoptik"], "did you mean coco_panoptic"),
        (["train", "--lr=1"], "there is no flag --lr; did you mean config.optim.lr?"),
        (["train", "--config", "shapes_panoptic:huge"], "there is no variant 'huge'"),
        (["train", "--config", "shapes_panoptic", "--config.optim.learning_rate=1"], "optim"),
        (["eval"], "knet eval: --workdir is missing"),
        (["eval", "--workdir", "/no/such"], "/no/such is no model"),
        (["predict", "a.jpg"], "knet predict: --model is missing"),
        (["predict", "--model", "run"], "no picture is named"),
        (["convert", "a.pth"], "accepted: CHECKPOINT"),
        (["export"], "name one model"),
        (["demo"], "--model is missing"),
        (["from-masks", "--images", "a"], "; --split is missing: what it is: train, val"),
        (["logs"], "accepted: WORKDIR"),
        (["shapes"], "accepted: FOLDER"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        said = capsys.readouterr().err
        assert caught.value.code == 2 and words in said and said.count("\n") == 1, said


def test_sizes_of_an_export():
    assert parse_size("480,640") == (480, 640)
    for text in ("480x640", "480", "0,5", "-1,5", "1,2,3", "²,5", "99999,99999", "9" * 5000 + ",1"):
        with pytest.raises(ArgumentTypeError, match="height and width, such as 480,640"):
            parse_size(text)


UNIGNORED = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
BUSY = """
import signal, time
from knet_jax.cli import shapes
from knet_jax.cli.main import main

def wait(args):
    print("waiting", flush=True)
    time.sleep(60)

shapes.main = wait
# What a shell started in the background would ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)
main(["shapes"])
"""


def test_ctrl_c_from_outside():
    child = subprocess.Popen(
        [sys.executable, "-c", BUSY],
        cwd=ROOT,
        env=environment(1),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout.readline() == "waiting\n"
    child.send_signal(signal.SIGINT)
    _, said = child.communicate(timeout=120)
    assert said.endswith("knet shapes: interrupted\n") and "Traceback" not in said
    assert child.returncode == 130


@pytest.mark.parametrize("command", [["train.py"], ["-m", "knet_jax.data.shapes"]])
def test_scripts_and_modules_are_the_commands(command):
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment(1),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert any(word in done.stderr for word in ("missing", "accepted: FOLDER"))
    assert len(done.stderr.splitlines()) == 1


def test_help_that_nobody_can_read_is_one_line():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "knet_jax.cli.main", "--help"],
            cwd=ROOT,
            env=environment(1),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (done.returncode, done.stderr) == (1, f"knet: {FULL}\n")


TRAIN = ["train.py", "--config", "shapes_panoptic:tiny"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("JAX_PLATFORMS", "nope", "JAX_PLATFORMS=nope: Unable to initialize backend 'nope'"),
        ("XLA_FLAGS", "--nope", "XLA_FLAGS=--nope: Unknown flag"),
    ],
)
def test_an_environment_that_jax_does_not_know(tmp_path, variable, value, words):
    done = subprocess.run(
        [sys.executable, *TRAIN, "--workdir", str(tmp_path / "run")],
        cwd=ROOT,
        env=environment(1) | {variable: value},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("train.py: ") and words in done.stderr
    assert not (tmp_path / "run").exists()


def test_signals_have_an_answer_before_anything_else_is_imported():
    code = (
        "import sys; old = {*sys.modules}; import knet_jax.cli.main; print(*{*sys.modules} - old)"
    )
    new = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).split()
    assert {name for name in new if name.startswith("knet_jax.")} == {
        *("knet_jax.cli", "knet_jax.cli.main"),
        *("knet_jax.system", "knet_jax.system.ended_by_signals"),
    }
    assert not {"typing", "subprocess", "re", "pathlib"}.intersection(new)


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_the_imports_is_one_line(signum):
    code = f"{UNIGNORED}; import runpy; print('begun', flush=True); "
    code += "runpy.run_path('train.py', None, '__main__')"
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout.readline() == "begun\n"
    time.sleep(0.8)
    child.send_signal(signum)
    _, said = child.communicate(timeout=60)
    assert (child.returncode, said) == (128 + signum, "train.py: interrupted\n")
