"""Pictures and videos on disk: what predict.py finds, writes and skips."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import pytest
import tiny_runs
from coco_readers import PanopticFile
from devices import environment
from PIL import Image
from programs import INTERRUPTIBLE, program

from knet_jax.app.predictions import (
    Predictions,
    Source,
    find_ids,
    find_sources,
    predict_pictures,
)
from knet_jax.app.videos import predict_video
from knet_jax.cli import commandline
from knet_jax.segmentation import rle
from knet_jax.segmentation.drawing import (
    MARGIN,
    THUMBNAIL,
    contact_sheet,
    save_picture,
    thumbnail,
)
from knet_jax.segmentation.result import Result
from knet_jax.segmentation.segments import Categories
from knet_jax.system.errors import UserError
from knet_jax.system.output_files import JsonList, write_json
from knet_jax.system.signals import Preempted, StopRequest

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


def write_video(path, num_frames=5, size=(50, 76), rate=12, code="mp4v"):
    # The codec drops odd columns.
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*code), rate, size[::-1])
    for seed in range(num_frames):
        writer.write(picture(*size, seed))
    writer.release()


def read_video(path):
    """The frames, in OpenCV's BGR."""
    capture = cv2.VideoCapture(str(path))
    frames = []
    while (read := capture.read())[0]:
        frames.append(read[1])
    return frames


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
    assert "problems with 2 files" in out and "Traceback" not in err
    assert any(f"{name}  " in out for name in tiny_runs.categories(task).names)

    wanted = {f"overlays/{stem}.jpg" for stem in STEMS} | {f"{task}.json", "images.json"}
    wanted |= {"contact_sheet.jpg", "videos/b/clip.mp4", "videos/b/clip.json"}
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
    place = output / "videos" / "b" / "clip.mp4"
    assert cv2.VideoCapture(str(place)).get(cv2.CAP_PROP_FPS) == 12
    frames = read_video(place)
    assert len(frames) == 5 and frames[0].shape == (50, 76, 3) and frames[0].std() > 10
    records = json.loads(place.with_suffix(".json").read_text())
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


@pytest.mark.slow
@pytest.mark.parametrize(
    "signum, status",
    [
        (signal.SIGINT, 130),
        (signal.SIGTERM, 143),
    ],
)
def test_what_was_done_before_an_interruption_is_kept(models, tmp_path, signum, status):
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
    process.send_signal(signum)
    _, err = process.communicate(timeout=100)
    assert process.returncode == status and "Traceback" not in err
    assert err.splitlines()[-1].endswith("predict.py: stopped; what was done is kept")
    listed = json.loads((output / "images.json").read_text())["images"]
    results = PanopticFile(output / "panoptic.json")
    assert 2 < len(listed) < 400
    for image in listed:
        assert results[image["id"]].ids.shape == (50, 75)
        assert (output / "overlays" / image["file_name"].replace("png", "jpg")).is_file()
    assert not [name for name in files(output) if name.endswith(".part")]


@pytest.mark.parametrize("task", TASKS)
def test_ids_are_those_of_a_test_set(models, tmp_path, task, capsys):
    write_pictures(tmp_path / "in", ("1.png", "sub/2.png", "3.png"))
    info, output = tmp_path / "info.json", tmp_path / "out"
    listed = [("1.png", 501), ("2.png", 2**40), ("elsewhere.png", 7)]
    info.write_text(json.dumps({"images": [{"file_name": n, "id": id} for n, id in listed]}))
    flags = ("--model", models[task], "--output", output, "--image_info", info)
    call(tmp_path / "in", *flags, "--threshold", 0)
    assert "2 of 3 pictures are among the 3 of" in capsys.readouterr().out
    content = json.loads((output / f"{task}.json").read_text())
    records = {"panoptic": "annotations", "semantic": "images"}.get(task)
    found = {record.get("image_id", record.get("id")) for record in content[records or slice(None)]}
    assert found == {501, 2**40}
    names = json.loads((output / "images.json").read_text())["images"]
    assert {image["file_name"]: image["id"] for image in names} == {
        "1.png": 501,
        "sub/2.png": 2**40,
    }


@pytest.mark.parametrize(
    "content, words",
    [
        ("[]", "accepted: a JSON in COCO's form"),
        ('{"images": [{"file_name": "1.png"}]}', "KeyError"),
        ('{"images": [{"file_name": "1.png", "id": "7"}]}', "the id of 1.png is '7'"),
        ('{"images": [{"file_name": "1.png", "id": true}]}', "the id of 1.png is True"),
        ('{"images": [{"file_name": "1.png", "id": 7.0}]}', "the id of 1.png is 7.0"),
        (
            '{"images": [{"file_name": "1.png", "id": 9223372036854775808}]}',
            "is 9223372036854775808",
        ),
        (
            '{"images": [{"file_name": "1.png", "id": 7}, {"file_name": "1.png", "id": 8}]}',
            "1.png has two ids",
        ),
        (
            '{"images": [{"file_name": "1.png", "id": 7}, {"file_name": "2.png", "id": 7}]}',
            "several of the pictures the same id",
        ),
        ('{"images": [{"file_name": "9.png", "id": 7}]}', "lists none of the 2 pictures; it has 9"),
        ('{"images": []}', "it has nothing"),
    ],
)
def test_bad_lists_of_ids_are_named(tmp_path, content, words):
    write_pictures(tmp_path / "in", ("1.png", "2.png"))
    pictures, _ = find_sources([str(tmp_path / "in")], tmp_path / "out")
    info = tmp_path / "info.json"
    with pytest.raises(UserError, match="image_info=.*cannot be read: No such file"):
        find_ids(info, pictures)
    info.write_text(content)
    with pytest.raises(UserError) as raised:
        find_ids(info, pictures)
    assert words in str(raised.value) and "\n" not in str(raised.value)


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
        ([image, *model, "--threshold", "nan"], "--threshold is nan"),
        ([image, *model, "--checkpoint", "7"], "no checkpoint of step 7"),
    ]:
        with pytest.raises(SystemExit) as ended:
            call(*arguments, *output)
        printed = capsys.readouterr().err
        assert ended.value.code == 2 and len(printed.splitlines()) == 1
        assert words in printed and not (tmp_path / "out").exists()


def test_no_file_of_the_user_is_overwritten(models, tmp_path, capsys):
    write_pictures(tmp_path, ("overlays/q.jpg", "panoptic/a/q.png"))
    (tmp_path / "videos").mkdir()
    write_video(tmp_path / "videos" / "clip.mp4")
    (tmp_path / "link").symlink_to(tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    for given in ("overlays/q.jpg", "panoptic/a/q.png", "videos/clip.mp4", "link/videos", "videos"):
        with pytest.raises(SystemExit) as ended:
            call(tmp_path / given, "--model", models["panoptic"], "--output", tmp_path)
        printed = capsys.readouterr().err
        assert ended.value.code == 2 and len(printed.splitlines()) == 1
        assert f"predictions in {tmp_path} would overwrite {tmp_path / given};" in printed
        assert before == {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}


def test_an_output_that_is_a_file_is_one_line(models, tmp_path, capsys):
    write_pictures(tmp_path, ("1.png",))
    (tmp_path / "overlays").touch()
    with pytest.raises(SystemExit) as ended:
        call(tmp_path / "1.png", "--model", models["instance"], "--output", tmp_path)
    assert ended.value.code == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.endswith(f"predict.py: File exists: {tmp_path / 'overlays'}")


def test_help():
    status, out, _ = run("--help")
    assert status == 0 and "predict.py photo.jpg --model" in out and "--threshold" in out


# Its parts.


def test_sources_have_names_of_their_own(tmp_path):
    write_pictures(tmp_path, ("a/1.jpg", "a/1.png", "a/b/1.JPG", "c/1.jpg"))
    write_pictures(tmp_path, ("a/out/overlays/9.jpg", "a/out/contact_sheet.jpg"))
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
    os.mkfifo(tmp_path / "a" / "pipe.jpg")
    assert find("a")[0] == inside
    for path, problem in (
        ("gone", "there is no file or folder"),
        ("a/out", "predictions in .*/a/out would overwrite .*/a/out;"),
        ("a/pipe.jpg", "pipe.jpg is neither a file nor a folder"),
    ):
        with pytest.raises(UserError, match=problem):
            find(path)


def test_what_a_folder_has_besides_is_named(tmp_path, capsys):
    write_pictures(tmp_path / "in", ("1.jpg",))
    for name in ("2.gif", "b.GIF", "3.ppm", "4.mpe", "readme.txt"):
        (tmp_path / "in" / name).touch()
    (tmp_path / "in" / "gone.png").symlink_to("/nowhere/gone.png")
    found = sources(tmp_path / "in")
    assert [source.name for source in found] == ["1.jpg", "gone.png"]
    said = capsys.readouterr().err
    assert said.startswith(f"left out of {tmp_path / 'in'}: 2 .gif, 1 .mpe, 1 .ppm; accepted: .bmp")
    with semantic_predictions(tmp_path / "out") as predictions:
        problems = predict_pictures(Seer(), found, predictions)
    assert problems == [f"{tmp_path / 'in' / 'gone.png'}: No such file or directory"]


@pytest.mark.parametrize("output", ["in", "in/..", "in/b"])
def test_an_output_around_the_pictures_hides_only_predictions(tmp_path, output):
    write_pictures(tmp_path / "in", ("1.jpg", "b/2.jpg"))
    for folder in ("overlays", "panoptic"):
        write_pictures(tmp_path / output / folder, ("1.png",))
    pictures, _ = find_sources([str(tmp_path / "in")], tmp_path / output)
    assert [source.name for source in pictures] == ["1.jpg", "b/2.jpg"]


class Seer:
    """A segmenter that sees the first class in all of a picture, or nothing."""

    def __init__(self, label=1):
        self.label = label

    def result(self, image):
        labels = np.full(image.shape[:2], self.label)
        return Result("semantic", tiny_runs.categories("semantic"), image, labels)

    def stream(self, images, threshold=None):
        return map(self.result, images)


def sources(*paths):
    found = find_sources([str(path) for path in paths], Path("/nowhere"))
    return [source for kind in found for source in kind]


def semantic_predictions(folder):
    return Predictions(folder, "semantic", tiny_runs.categories("semantic"))


@pytest.mark.parametrize("task", TASKS)
def test_a_failed_start_leaves_earlier_predictions(tmp_path, task):
    (tmp_path / f"{task}.json").write_text("earlier")
    with (
        pytest.raises(KeyboardInterrupt),
        Predictions(tmp_path, task, tiny_runs.categories(task)),
    ):
        raise KeyboardInterrupt
    assert files(tmp_path) == {f"{task}.json"}
    assert (tmp_path / f"{task}.json").read_text() == "earlier"


def test_a_failed_start_leaves_an_earlier_video(tmp_path):
    class Fails:
        def stream(self, images, threshold):
            yield from iter([])
            raise KeyboardInterrupt

    write_video(tmp_path / "clip.mp4")
    [source] = sources(tmp_path / "clip.mp4")
    assert predict_video(Seer(), source, tmp_path / "out") is None
    before = {path: path.read_bytes() for path in (tmp_path / "out" / "videos").iterdir()}
    with pytest.raises(KeyboardInterrupt):
        predict_video(Fails(), source, tmp_path / "out")
    assert len(before) == 2
    assert before == {path: path.read_bytes() for path in (tmp_path / "out" / "videos").iterdir()}


def test_colors_stay_what_they_are(tmp_path):
    red = np.full((48, 64, 3), (230, 20, 10), np.uint8)
    Image.fromarray(red).save(tmp_path / "red.png")
    writer = cv2.VideoWriter(
        str(tmp_path / "clip.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 12, (64, 48)
    )
    writer.write(red[..., ::-1])
    writer.release()
    still, clip = sources(tmp_path / "red.png", tmp_path / "clip.mp4")
    with semantic_predictions(tmp_path) as predictions:
        assert predict_pictures(Seer(0), [still], predictions) == []
    assert predict_video(Seer(0), clip, tmp_path) is None
    for picture in (
        cv2.imread(str(tmp_path / "overlays" / "red.jpg")),
        cv2.imread(str(tmp_path / "contact_sheet.jpg"))[100:200, 100:200],
        read_video(tmp_path / "videos" / "clip.mp4")[0],
    ):
        np.testing.assert_allclose(picture.mean((0, 1)), (10, 20, 230), atol=12)


def test_results_of_a_video_replace_nothing_else(tmp_path):
    names = ("semantic", "images", "contact_sheet")
    write_pictures(tmp_path / "in", ("1.png",))
    for name in names:
        write_video(tmp_path / "in" / f"{name}.mp4", 1)
    still, *clips = sources(tmp_path / "in")
    with semantic_predictions(tmp_path) as predictions:
        predict_pictures(Seer(), [still], predictions)
    before = (tmp_path / "semantic.json").read_text(), (tmp_path / "images.json").read_text()
    for clip in clips:
        assert predict_video(Seer(), clip, tmp_path) is None
    assert before == (
        (tmp_path / "semantic.json").read_text(),
        (tmp_path / "images.json").read_text(),
    )
    assert {path.stem for path in (tmp_path / "videos").iterdir()} == set(names)


@pytest.mark.parametrize("code, name", [("MJPG", "clip.avi"), ("VP80", "clip.webm")])
def test_a_video_that_is_cut_off_is_named_and_kept(tmp_path, code, name):
    path = tmp_path / name
    write_video(path, 60, code=code)
    [source] = sources(path)
    assert predict_video(Seer(), source, tmp_path) is None
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    problem = predict_video(Seer(), source, tmp_path)
    number = len(read_video(tmp_path / "videos" / "clip.mp4"))
    assert 10 < number < 50 and problem == f"{path}: ends after {number} of 60 frames"
    records = json.loads((tmp_path / "videos" / "clip.json").read_text())
    assert [record["image_id"] for record in records] == list(range(number))


@pytest.mark.parametrize("rate", [29.97, 119.973, 239.76, 959.04])
def test_videos_of_any_rate(tmp_path, rate):
    write_video(tmp_path / "clip.avi", rate=rate, code="MJPG")
    [source] = sources(tmp_path / "clip.avi")
    assert predict_video(Seer(), source, tmp_path) is None
    written = cv2.VideoCapture(str(tmp_path / "videos" / "clip.mp4"))
    assert written.get(cv2.CAP_PROP_FPS) == pytest.approx(rate, rel=1e-3)


def test_frames_of_other_sizes_are_kept(tmp_path):
    class Shrinks(Seer):
        def stream(self, images, threshold):
            for number, image in enumerate(images):
                yield self.result(image[: 50 - 10 * number])

    write_video(tmp_path / "clip.mp4", 3)
    [source] = sources(tmp_path / "clip.mp4")
    assert predict_video(Shrinks(), source, tmp_path) is None
    frames = read_video(tmp_path / "videos" / "clip.mp4")
    assert [frame.shape for frame in frames] == [(50, 76, 3)] * 3


def test_a_video_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    write_video(tmp_path / "clip.mp4")
    monkeypatch.setattr(cv2.VideoWriter, "isOpened", lambda self: False)
    [source] = sources(tmp_path / "clip.mp4")
    problem = predict_video(Seer(), source, tmp_path)
    assert "OpenCV cannot write" in problem and "76x50 at 12.0 frames per second" in problem
    assert not list((tmp_path / "videos").iterdir())


@contextmanager
def largest_file(size):
    """No file may grow beyond so many bytes: in place of a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_no_file_is_half_written(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (99, 99, 3)).astype(np.uint8)
    writers = {
        "a.jpg": lambda path: save_picture(path, noise),
        "a.json": lambda path: write_json(path, list(range(999))),
        "b.json": lambda path: Seer().result(noise).save(path),
        "semantic/a.png": lambda path: semantic_predictions(path.parents[1])._results.add(
            1, "a.jpg", noise[..., 0] % 9
        ),
    }
    for name, write in writers.items():
        place = tmp_path / name
        place.parent.mkdir(exist_ok=True)
        place.write_text("earlier")
        with largest_file(100), pytest.raises(OSError, match="File too large") as caught:
            write(place)
        assert caught.value.filename == str(place) and place.read_text() == "earlier"
    assert files(tmp_path) == set(writers)


def test_a_video_that_is_not_written_whole_is_named(tmp_path):
    write_video(tmp_path / "clip.mp4", 30, (200, 300))
    [source] = sources(tmp_path / "clip.mp4")
    with largest_file(20_000):
        problem = predict_video(Seer(0), source, tmp_path)
    assert "OpenCV could not write all of" in problem
    assert files(tmp_path / "videos") == {"clip.json"}


def test_a_picture_of_any_size_is_skipped(tmp_path):
    write_pictures(tmp_path, ("1.jpg", "2.jpg"))
    data = (tmp_path / "1.jpg").read_bytes()
    start = data.index(b"\xff\xc0")
    huge = data[: start + 5] + b"\xff\xdc" * 2 + data[start + 9 : -50]
    (tmp_path / "1.jpg").write_bytes(huge)
    with semantic_predictions(tmp_path / "out") as predictions:
        [problem] = predict_pictures(Seer(), sources(tmp_path), predictions)
    assert problem == f"{tmp_path / '1.jpg'}: the picture is truncated"
    assert (tmp_path / "out" / "overlays" / "2.jpg").is_file()


class Stopped(Seer):
    """A segmenter during whose first picture the process is asked to stop."""

    def __init__(self):
        super().__init__()
        self.stop = StopRequest()

    def result(self, image):
        self.stop.signum = signal.SIGTERM
        return super().result(image)


def test_predictions_end_when_asked_to(tmp_path):
    write_pictures(tmp_path / "in", ("1.png", "2.png"))
    write_video(tmp_path / "in" / "clip.mp4")
    *stills, clip = sources(tmp_path / "in")
    seer = Stopped()
    with pytest.raises(Preempted), semantic_predictions(tmp_path) as predictions:
        predict_pictures(seer, stills, predictions, stop=seer.stop)
    listed = json.loads((tmp_path / "images.json").read_text())["images"]
    assert [image["file_name"] for image in listed] == ["1.png"]
    seer = Stopped()
    with pytest.raises(Preempted):
        predict_video(seer, clip, tmp_path, stop=seer.stop)
    assert len(read_video(tmp_path / "videos" / "clip.mp4")) == 1
    assert len(json.loads((tmp_path / "videos" / "clip.json").read_text())) == 1
    with pytest.raises(Preempted):  # before anything is read
        predict_video(seer, tmp_path / "gone.mp4", tmp_path, stop=seer.stop)


def test_what_cannot_be_read_does_not_keep_it_from_stopping(tmp_path, capsys):
    write_pictures(tmp_path, ("1.png",))
    for i in range(2, 9):
        (tmp_path / f"{i}.png").write_text("no picture")
    seer = Stopped()
    with pytest.raises(Preempted), semantic_predictions(tmp_path / "out") as predictions:
        predict_pictures(seer, sources(tmp_path), predictions, stop=seer.stop)
    assert "skipped" not in capsys.readouterr().err


@pytest.mark.parametrize("count, cells", [(1, 1), (3, 3), (4, 6), (10, 12)])
def test_a_contact_sheet_holds_all_pictures(count, cells):
    thumbnails = [
        thumbnail(np.full((30 + i, 90, 3), 40, np.uint8), f"{i}.jpg") for i in range(count)
    ]
    sheet = contact_sheet(thumbnails)
    assert sheet.dtype == np.uint8
    dark = (sheet == 40).all(-1).sum()
    assert dark == sum((cell == 40).all(-1).sum() for cell in thumbnails)
    rows, columns = np.divide(sheet.shape[:2], np.add(thumbnails[0].shape[:2], 2 * MARGIN))
    assert rows * columns == cells and columns == {1: 1, 10: 4}.get(count, 3)


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
