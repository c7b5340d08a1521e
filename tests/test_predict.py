"""Pictures and videos on disk: what predict.py finds, writes and skips."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import tiny_runs
from devices import environment
from PIL import Image
from programs import program

from knet_jax import commandline, rle
from knet_jax.configuration import ConfigError
from knet_jax.metrics.coco_files import PanopticFile
from knet_jax.metrics.result_files import JsonList
from knet_jax.predictions import Predictions, Source, find_sources
from knet_jax.results import Result
from knet_jax.structs import Categories
from knet_jax.visualize import THUMBNAIL, contact_sheet, thumbnail

ROOT = Path(__file__).parents[1]
TASKS = ("panoptic", "instance", "semantic")


def start(*arguments):
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=environment(1),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(*arguments):
    """Status, standard output, standard error."""
    process = start("predict.py", *arguments)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def call(*arguments):
    """The same in this process."""
    with program("predict") as predict:
        commandline.run(predict.main, ["predict.py", *map(str, arguments)], takes_paths=True)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of models by task."""
    folder = tmp_path_factory.mktemp("models")
    return {task: tiny_runs.write(folder / task, task) for task in TASKS}


def picture(height=50, width=75, seed=0):
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 6, 3)).astype(np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def write_pictures(folder, names):
    for seed, name in enumerate(names):
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(seed=seed)).save(place)


def write_video(path, num_frames=5, size=(50, 76)):  # the codec drops odd columns
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 12, size[::-1])
    for seed in range(num_frames):
        writer.write(picture(*size, seed))
    writer.release()


def files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


# The program.

NAMES = ("1.jpg", "1.png", "b/1.png", "b/c/2.webp")
STEMS = ("1", "1.png", "b/1", "b/c/2")


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_a_folder_of_all_sorts(models, tmp_path, task):
    source, output = tmp_path / "in", tmp_path / "in" / "out"
    write_pictures(source, NAMES)
    write_video(source / "b" / "clip.mp4")
    (source / "broken.jpg").write_text("no picture")
    (source / "broken.avi").write_text("no video")
    (source / "notes.txt").write_text("no picture, and not taken for one")
    status, out, err = run(source, "--model", models[task], "--output", output)
    assert status == 3, err
    assert "skipped" in err and f"{source / 'broken.jpg'}: cannot be decoded" in err
    assert f"{source / 'broken.avi'}: no frame of it can be decoded" in err
    assert "skipped 2 files" in out and "Traceback" not in err
    assert any(f"{name}  " in out for name in tiny_runs.categories(task).names)

    wanted = {f"overlays/{stem}.jpg" for stem in STEMS} | {f"{task}.json", "images.json"}
    wanted |= {"contact_sheet.jpg", "b/clip.mp4", "b/clip.json"}
    if task != "instance":
        wanted |= {f"{task}/{stem}.png" for stem in STEMS}
    assert files(output) == wanted
    for stem in STEMS:
        overlay = cv2.imread(str(output / "overlays" / f"{stem}.jpg"))
        assert max(overlay.shape) == 640 and overlay.std() > 10

    listed = json.loads((output / "images.json").read_text())
    assert [image["file_name"] for image in listed["images"]] == list(NAMES)
    assert [image["id"] for image in listed["images"]] == [1, 2, 3, 4]
    content = json.loads((output / f"{task}.json").read_text())
    if task == "panoptic":
        results = PanopticFile(output / "panoptic.json")
        assert sorted(results) == [1, 2, 3, 4]
        seen = results[1]
        assert len(seen.segments) and {s.id for s in seen.segments} <= set(np.unique(seen.ids))
        assert all(0 <= i["score"] <= 1 for a in content["annotations"] for i in a["segments_info"])
    elif task == "instance":
        assert {record["image_id"] for record in content} == {1, 2, 3, 4}
        assert rle.decode(content[0]["segmentation"]).shape == (50, 75)
        assert min(record["score"] for record in content) >= 0.3
    else:
        labels = cv2.imread(str(output / "semantic" / "b" / "1.png"), cv2.IMREAD_UNCHANGED)
        assert labels.shape == (50, 75) and 1 <= labels.min() < labels.max() <= 9

    assert not list(output.rglob("*.part*"))
    video = cv2.VideoCapture(str(output / "b" / "clip.mp4"))
    assert video.get(cv2.CAP_PROP_FPS) == 12
    frames = [video.read() for _ in range(6)]
    assert [is_there for is_there, _ in frames] == [True] * 5 + [False]
    assert frames[0][1].shape == (50, 76, 3) and frames[0][1].std() > 10
    records = json.loads((output / "b" / "clip.json").read_text())
    assert {record["image_id"] for record in records} == set(range(5))


def test_files_and_a_threshold(models, tmp_path):
    write_pictures(tmp_path, ("a/1.png", "b/1.png", "c/2.png"))
    counts = []
    for threshold in (0, 0.9):
        output = tmp_path / f"out{threshold}"
        paths = [tmp_path / "a/1.png", tmp_path / "b/1.png", tmp_path / "c"]
        flags = ("--model", models["instance"], "--output", output, "--threshold", threshold)
        call(*paths, *flags)
        scores = [record["score"] for record in json.loads((output / "instance.json").read_text())]
        assert min(scores) >= threshold
        counts.append(len(scores))
        names = json.loads((output / "images.json").read_text())["images"]
        assert [image["file_name"] for image in names] == ["a/1.png", "b/1.png", "c/2.png"]
    assert counts[0] == 3 * 20 > counts[1]


INTERRUPTIBLE = """
import runpy, signal, sys

# What a shell starts in the background would ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_what_was_done_before_an_interruption_is_kept(models, tmp_path):
    names = [f"{i:03}.png" for i in range(400)]
    write_pictures(tmp_path / "in", names)
    output = tmp_path / "out"
    process = start(
        *("-c", INTERRUPTIBLE, "predict.py", tmp_path / "in", "--model", models["panoptic"]),
        *("--output", output),
    )
    deadline = time.monotonic() + 200
    while len(files(output)) < 8 and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 130 and "Traceback" not in err
    assert err.splitlines()[-1].endswith("predict.py: interrupted")
    listed = json.loads((output / "images.json").read_text())["images"]
    results = PanopticFile(output / "panoptic.json")
    assert 2 < len(listed) < 400
    for image in listed:
        assert results[image["id"]].ids.shape == (50, 75)
        assert (output / "overlays" / image["file_name"].replace("png", "jpg")).is_file()
    assert not [name for name in files(output) if name.endswith(".part")]


def test_mistakes_end_in_one_line(models, tmp_path, capsys):
    write_pictures(tmp_path / "in", ("1.png",))
    (tmp_path / "empty").mkdir()
    model = ("--model", models["panoptic"])
    image, output = tmp_path / "in" / "1.png", ("--output", tmp_path / "out")
    for arguments, words in [
        ([image], "--model is missing"),
        ([*model], "no picture is named"),
        ([image, "--model", tmp_path], f"{tmp_path} is no model"),
        ([tmp_path / "gone.jpg", *model], f"there is no file or folder {tmp_path / 'gone.jpg'}"),
        ([tmp_path / "empty", *model], f"no picture or video in {tmp_path / 'empty'}"),
        ([image, *model, "--threshold", "2"], "--threshold"),
        ([image, *model, "--checkpoint", "7"], "no checkpoint of step 7"),
    ]:
        with pytest.raises(SystemExit) as ended:
            call(*arguments, *output)
        printed = capsys.readouterr().err
        assert ended.value.code == 2 and len(printed.splitlines()) == 1
        assert words in printed and not (tmp_path / "out").exists()


def test_help():
    status, out, _ = run("--help")
    assert status == 0 and "predict.py photo.jpg --model" in out and "--threshold" in out


@pytest.mark.slow
def test_the_documentation_does_what_it_says(models, tmp_path):
    """Its commands and its Python, on a tiny model in the place of the demo's."""
    text = (ROOT / "docs" / "predicting.md").read_text()
    blocks = re.findall(r"^```(bash|python)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert [kind for kind, _ in blocks] == ["bash", "bash", "python"]
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo").symlink_to(models["panoptic"])
    (tmp_path / "predict.py").symlink_to(ROOT / "predict.py")
    for kind, code in blocks:
        lines = [line for line in code.splitlines() if line != "make demo"]
        script = "\n".join(lines).replace("python ", f"{sys.executable} ")
        done = subprocess.run(
            ["bash", "-ec", script] if kind == "bash" else [sys.executable, "-c", code],
            cwd=tmp_path,
            env=environment(1) | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    listed = json.loads((tmp_path / "out" / "images.json").read_text())["images"]
    assert [image["file_name"] for image in listed] == [f"{i:02}.png" for i in range(12)]
    assert {path.name for path in (tmp_path / "samples").iterdir()} >= {"00.png", "11.png"}
    assert (tmp_path / "segments.png").is_file()


# Its parts.


def test_sources_have_names_of_their_own(tmp_path):
    write_pictures(tmp_path, ("a/1.jpg", "a/1.png", "a/b/1.JPG", "c/1.jpg", "a/out/9.jpg"))
    write_video(tmp_path / "a" / "v.MP4")
    (tmp_path / "a" / "x.txt").touch()

    def find(*paths):
        pictures, videos = find_sources(
            [str(tmp_path / path) for path in paths], tmp_path / "a/out"
        )
        return [(s.name, s.stem) for s in pictures], [(s.name, s.stem) for s in videos]

    inside = [("1.jpg", "1"), ("1.png", "1.png"), ("b/1.JPG", "b/1")]
    assert find("a") == (inside, [("v.MP4", "v")])
    assert find("a/1.jpg", "a/1.jpg", "a/../a/1.jpg") == ([("1.jpg", "1")], [])
    assert find("a/1.jpg", "c") == ([("a/1.jpg", "a/1"), ("c/1.jpg", "c/1")], [])
    assert find("a/x.txt")[0] == [("x.txt", "x")]  # asked for by name
    for path in ("gone", "a/out"):
        with pytest.raises(ConfigError, match=r"there is no file|no picture or video"):
            find(path)


@pytest.mark.parametrize("count, cells", [(1, 1), (3, 3), (4, 6), (10, 12)])
def test_a_contact_sheet_holds_all_pictures(count, cells):
    thumbnails = [
        thumbnail(np.full((30 + i, 90, 3), 40, np.uint8), f"{i}.jpg") for i in range(count)
    ]
    sheet = contact_sheet(thumbnails)
    assert sheet.dtype == np.uint8 and sheet.shape[1] % min(count, 4) == 0 or count == 3
    dark = (sheet == 40).all(-1).sum()
    assert dark == sum((cell == 40).all(-1).sum() for cell in thumbnails)
    height, width = thumbnails[0].shape[:2]
    assert round(sheet.shape[0] / height) * round(sheet.shape[1] / width) == cells


def test_a_thumbnail_of_any_picture_has_one_size():
    captions = ("1.jpg", "a/very/long/folder/" * 9 + "1.jpg", "")
    sizes = ((1, 1), (1, 900), (3000, 20), (400, 640))
    cells = [
        thumbnail(np.full((*size, 3), 9, np.uint8), caption)
        for size in sizes
        for caption in captions
    ]
    assert {cell.shape for cell in cells} == {cells[0].shape}
    assert cells[0].shape[1] == THUMBNAIL and (cells[9][100:200] == 9).any()


def test_a_json_list_appears_when_it_is_whole(tmp_path):
    path = tmp_path / "x" / "list.json"
    with JsonList(path) as records:
        records.add({"a": 1})
        records.add([2])
        assert not path.exists()
    assert json.loads(path.read_text()) == [{"a": 1}, [2]]
    with JsonList(path):
        pass
    assert json.loads(path.read_text()) == [] and files(tmp_path) == {"x/list.json"}


def test_the_overlay_of_a_panorama_is_reduced_to_what_its_file_holds(tmp_path):
    shape = (20, 70_000)
    categories = Categories(("cat",), (1,), 0)
    result = Result(
        "semantic", categories, np.zeros((*shape, 3), np.uint8), np.ones(shape, np.uint8)
    )
    with Predictions(tmp_path, "semantic", categories) as predictions:
        predictions.add(Source(tmp_path / "w.png", "w.png", "w"), result)
    assert Image.open(tmp_path / "overlays" / "w.jpg").size == (65500, 19)
