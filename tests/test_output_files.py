"""Files that are written whole or not at all, and what results are called."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from programs import largest_file

from knet_jax.segmentation.drawing import save_picture
from knet_jax.system.output_files import JsonList, PngFolder, Stems, write_json, write_json_lists

ROOT = Path(__file__).parents[1]


def test_results_of_pictures_do_not_overwrite_each_other(tmp_path):
    names = ["a/1.jpg", "a/1.png", "a/1.PNG", "b/1.jpg", "A/1.jpg", "2.tar.gz", "3", "../3", "/3"]
    wanted = ["a/1", "a/1.png", "a/1.PNG-2", "b/1", "A/1.jpg", "2.tar", "3", "3-2", "3-3"]
    stems = Stems()
    assert [stems.of(name) for name in names] == wanted
    pngs = PngFolder(tmp_path / "x")
    for number, (name, stem) in enumerate(zip(names, wanted)):
        assert pngs.write(name, np.full((1, 2), number, np.uint8)) == f"{stem}.png"
        png = cv2.imread(str(tmp_path / "x" / f"{stem}.png"), cv2.IMREAD_UNCHANGED)
        assert png.tolist() == [[number] * 2]
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_json_list_appears_when_it_is_whole(tmp_path):
    path = tmp_path / "x" / "list.json"
    with JsonList(path) as records:
        records.add({"a": 1})
        records.add([2])
        assert not path.exists()
    assert json.loads(path.read_text()) == [{"a": 1}, [2]]
    with JsonList(path):
        pass
    assert json.loads(path.read_text()) == [] and [*path.parent.iterdir()] == [path]


def test_no_file_is_half_written(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (99, 99, 3)).astype(np.uint8)
    writers = {
        "a.jpg": lambda path: save_picture(path, noise),
        "a.json": lambda path: write_json(path, list(range(999))),
        "b.json": lambda path: write_json_lists(path, {"a": range(999)}),
        "a.png": lambda path: PngFolder(path.parent).write(path.name, noise),
    }
    for name, write in writers.items():
        place = tmp_path / name
        place.write_text("earlier")
        with largest_file(100), pytest.raises(OSError, match="File too large") as caught:
            write(place)
        assert caught.value.filename == str(place) and place.read_text() == "earlier"
    assert {path.name for path in tmp_path.iterdir()} == set(writers)


def test_a_temporary_folder_goes_with_its_process(tmp_path):
    code = (
        "import os, signal; from knet_jax.system.output_files import temporary_folder\n"
        "with temporary_folder() as folder:\n"
        "    open(folder + '/upload', 'w').close(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    given = os.environ | {"TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=given, check=False)
    assert done.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 20
    while any(tmp_path.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(tmp_path.iterdir())
