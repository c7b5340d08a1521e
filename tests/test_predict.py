"""Pictures and videos on disk: what is found, written and skipped."""

import json
import os
import signal
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import tiny_runs
from coco_readers import PanopticFile
from PIL import Image
from programs import largest_file, status_of
from tiny_runs import picture, write_video

from knet_jax.app import predict
from knet_jax.app.predictions import Predictions, find_ids, find_sources, predict_pictures
from knet_jax.app.videos import predict_video
from knet_jax.segmentation import rle
from knet_jax.segmentation.drawing import MARGIN, THUMBNAIL, contact_sheet, thumbnail
from knet_jax.segmentation.result import Result
from knet_jax.segmentation.segments import Categories
from knet_jax.system.errors import UserError

TASKS = ("panoptic", "instance", "semantic")


def write_pictures(folder, names):
    for seed, name in enumerate(names):
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(seed=seed)).save(place)


def read_video(path):
    """The frames, in OpenCV's BGR."""
    capture = cv2.VideoCapture(str(path))
    frames = []
    while (read := capture.read())[0]:
        frames.append(read[1])
    return frames


def files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def contents(folder):
    return {name: (folder / name).read_bytes() for name in files(folder)}


# All of it.

NAMES = ("1.jpg", "1.png", "b/1.png", "b/c/2.webp")
STEMS = ("1", "1.png", "b/1", "b/c/2")


@pytest.mark.parametrize("task", TASKS)
def test_a_folder_of_all_sorts(predict_files, tmp_path, capsys, task):
    source, output = tmp_path / "in", tmp_path / "in" / "out"
    write_pictures(source, NAMES)
    write_video(source / "b" / "clip.mp4")
    (source / "broken.jpg").write_text("no picture")
    (source / "broken.avi").write_text("no video")
    (source / "notes.txt").write_text("no picture, and not taken for one")
    outcome = predict_files(task, [str(source)], output, threshold=0.2)
    assert outcome.problems == [
        f"{source / 'broken.jpg'}: cannot be decoded",
        f"{source / 'broken.avi'}: no frame of it can be decoded",
    ]
    printed = capsys.readouterr()
    assert "problems with 2 files" in printed.out and "skipped" in printed.err
    assert any(f"{name}  " in printed.out for name in tiny_runs.categories(task).names)

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
        assert rle.decode(content[0]["segmentation"]).shape == (64, 96)
        assert min(record["score"] for record in content) >= 0.2
    else:
        labels = cv2.imread(str(output / "semantic" / "b" / "1.png"), cv2.IMREAD_UNCHANGED)
        assert labels.shape == (64, 96) and 1 <= labels.min() < labels.max() <= 9

    place = output / "videos" / "b" / "clip.mp4"
    assert cv2.VideoCapture(str(place)).get(cv2.CAP_PROP_FPS) == 12
    frames = read_video(place)
    assert len(frames) == 5 and frames[0].shape == (64, 96, 3) and frames[0].std() > 10
    records = json.loads(place.with_suffix(".json").read_text())
    assert {record["image_id"] for record in records} == set(range(5))


@pytest.mark.parametrize("task", TASKS)
def test_ids_are_those_of_a_test_set(predict_files, tmp_path, task, capsys):
    write_pictures(tmp_path / "in", ("1.png", "sub/2.png", "3.png"))
    info, output = tmp_path / "info.json", tmp_path / "out"
    listed = [("1.png", 501), ("2.png", 2**40), ("elsewhere.png", 7)]
    info.write_text(json.dumps({"images": [{"file_name": n, "id": id} for n, id in listed]}))
    predict_files(task, [str(tmp_path / "in")], output, threshold=0, image_info=info)
    assert "2 of 3 pictures are among the 3 of" in capsys.readouterr().out
    content = json.loads((output / f"{task}.json").read_text())
    records = {"panoptic": "annotations", "semantic": "images"}.get(task)
    found = {record.get("image_id", record.get("id")) for record in content[records or slice(None)]}
    assert found == {501, 2**40}
    names = json.loads((output / "images.json").read_text())["images"]
    assert {one["file_name"]: one["id"] for one in names} == {"1.png": 501, "sub/2.png": 2**40}


def test_no_file_of_the_user_is_overwritten(predict_files, tmp_path):
    write_pictures(tmp_path, ("overlays/q.jpg", "panoptic/a/q.png"))
    (tmp_path / "videos").mkdir()
    write_video(tmp_path / "videos" / "clip.mp4", [0])
    (tmp_path / "link").symlink_to(tmp_path)
    before = contents(tmp_path)
    for given in ("overlays/q.jpg", "panoptic/a/q.png", "videos/clip.mp4", "link/videos", "videos"):
        message = f"predictions in {tmp_path} would overwrite {tmp_path / given};"
        with pytest.raises(UserError, match=message):
            predict_files("panoptic", [str(tmp_path / given)], tmp_path)
        assert contents(tmp_path) == before


def test_an_output_that_is_a_file_is_named(predict_files, tmp_path):
    write_pictures(tmp_path, ("1.png",))
    (tmp_path / "overlays").touch()
    with pytest.raises(FileExistsError) as caught:
        predict_files("instance", [str(tmp_path / "1.png")], tmp_path)
    assert caught.value.filename == str(tmp_path / "overlays")


# Its parts.


def sources(*paths, output="/nowhere"):
    return [
        source
        for kind in find_sources([str(path) for path in paths], Path(output))
        for source in kind
    ]


def test_sources_have_names_of_their_own(tmp_path):
    write_pictures(tmp_path, ("a/1.jpg", "a/1.png", "a/b/1.JPG", "c/1.jpg"))
    write_pictures(tmp_path, ("a/out/overlays/9.jpg", "a/out/contact_sheet.jpg"))
    for name in ("a/v.MP4", "a/v.avi", "a/x.txt"):
        (tmp_path / name).touch()
    os.mkfifo(tmp_path / "a" / "pipe.jpg")
    (tmp_path / "empty").mkdir()

    def find(*paths):
        given = [str(tmp_path / path) for path in paths]
        return tuple(
            [(s.name, s.stem) for s in kind] for kind in find_sources(given, tmp_path / "a/out")
        )

    inside = [("1.jpg", "1"), ("1.png", "1.png"), ("b/1.JPG", "b/1")]
    assert find("a") == (inside, [("v.MP4", "v"), ("v.avi", "v.avi")])
    assert find("a/1.jpg", "a/1.jpg", "a/../a/1.jpg") == ([("1.jpg", "1")], [])
    assert find("a/1.jpg", "c") == ([("a/1.jpg", "a/1"), ("c/1.jpg", "c/1")], [])
    assert find("a/x.txt")[0] == [("x.txt", "x")]  # asked for by name
    for path, problem in (
        ("gone", "there is no file or folder"),
        ("empty", "no picture or video in .*; accepted: .bmp"),
        ("a/out", "predictions in .*/a/out would overwrite .*/a/out;"),
        ("a/pipe.jpg", "pipe.jpg is neither a file nor a folder"),
    ):
        with pytest.raises(UserError, match=problem):
            find(path)
    with pytest.raises(UserError, match="'' names no file or folder"):
        sources("")
    for output in (tmp_path / "a", tmp_path, tmp_path / "a/b"):  # hides predictions alone
        write_pictures(output, ("overlays/8.jpg", "semantic/8.png"))
        assert [s.name for s in sources(tmp_path / "c", output=output)] == ["1.jpg"]


def test_what_a_folder_has_besides_is_named(tmp_path, capsys):
    write_pictures(tmp_path / "in", ("1.jpg",))
    for name in ("2.gif", "b.GIF", "3.ppm", "4.mpe", "readme.txt"):
        (tmp_path / "in" / name).touch()
    (tmp_path / "in" / "gone.png").symlink_to("/nowhere/gone.png")
    found = sources(tmp_path / "in")
    assert [source.name for source in found] == ["1.jpg", "gone.png"]
    said = capsys.readouterr().err
    assert said.startswith(f"left out of {tmp_path / 'in'}: 2 .gif, 1 .mpe, 1 .ppm, 1 .txt;")
    with semantic_predictions(tmp_path / "out") as predictions:
        problems = predict_pictures(Seer(), found, predictions)
    assert problems == [f"{tmp_path / 'in' / 'gone.png'}: No such file or directory"]


def test_bad_lists_of_ids_are_named(tmp_path):
    write_pictures(tmp_path / "in", ("1.png", "2.png"))
    pictures = sources(tmp_path / "in")
    info = tmp_path / "info.json"
    with pytest.raises(UserError, match="image_info=.*No such file"):
        find_ids(info, pictures)
    one = '{"file_name": "1.png", "id": 7}'
    for images, words in (
        ("7", "cannot be read: TypeError"),
        ('[{"file_name": "1.png"}]', "KeyError"),
        ('[{"file_name": "1.png", "id": "7"}]', "the id of '1.png' is '7'"),
        ('[{"file_name": "1.png", "id": true}]', "the id of '1.png' is True"),
        ('[{"file_name": "1.png", "id": 9223372036854775808}]', "is 9223372036854775808"),
        (f'[{one}, {{"file_name": "1.png", "id": 8}}]', "'1.png' has two ids"),
        (f'[{one}, {{"file_name": "2.png", "id": 7}}]', "several of the pictures the same id"),
        ('[{"file_name": "9.png", "id": 7}]', "lists none of the 2 pictures; it has 9"),
        ("[]", "it has nothing"),
    ):
        info.write_text(f'{{"images": {images}}}')
        with pytest.raises(UserError) as raised:
            find_ids(info, pictures)
        assert words in str(raised.value) and "\n" not in str(raised.value)


class Seer:
    """A segmenter that sees one class in all of a picture."""

    def __init__(self, label=1):
        self.label = label

    def result(self, image):
        labels = np.full(image.shape[:2], self.label)
        return Result("semantic", tiny_runs.categories("semantic"), image, labels)

    def stream(self, images, threshold=None):
        return map(self.result, images)


def semantic_predictions(folder):
    return Predictions(folder, "semantic", tiny_runs.categories("semantic"))


def test_a_failed_start_leaves_what_there_was(tmp_path):
    class Fails:
        def stream(self, images, threshold):
            yield from ()
            raise KeyboardInterrupt

    write_pictures(tmp_path, ("1.png",))
    write_video(tmp_path / "clip.mp4")
    still, clip = sources(tmp_path / "1.png", tmp_path / "clip.mp4")
    assert predict_video(Seer(), clip, tmp_path / "out") is None
    for task in TASKS:
        (tmp_path / "out" / f"{task}.json").write_text("earlier")
    before = contents(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        predict_video(Fails(), clip, tmp_path / "out")
    for task in TASKS:
        with (
            pytest.raises(KeyboardInterrupt),
            Predictions(tmp_path / "out", task, tiny_runs.categories(task)) as predictions,
        ):
            predict_pictures(Fails(), [still], predictions)
    assert len(before) == 5 and contents(tmp_path / "out") == before


def test_colors_stay_what_they_are(tmp_path):
    red = np.full((48, 64, 3), (230, 20, 10), np.uint8)
    Image.fromarray(red).save(tmp_path / "red.png")
    code = cv2.VideoWriter.fourcc(*"mp4v")
    writer = cv2.VideoWriter(str(tmp_path / "clip.mp4"), code, 12, (64, 48))
    writer.write(red[..., ::-1])
    writer.release()
    still, clip = sources(tmp_path / "red.png", tmp_path / "clip.mp4")
    with semantic_predictions(tmp_path) as predictions:
        assert predict_pictures(Seer(0), [still], predictions) == []
    assert predict_video(Seer(0), clip, tmp_path) is None
    for seen in (
        cv2.imread(str(tmp_path / "overlays" / "red.jpg")),
        cv2.imread(str(tmp_path / "contact_sheet.jpg"))[100:200, 100:200],
        read_video(tmp_path / "videos" / "clip.mp4")[0],
    ):
        np.testing.assert_allclose(seen.mean((0, 1)), (10, 20, 230), atol=12)


def test_a_video_that_is_cut_off_is_named_and_kept(tmp_path):
    for code, name in (("MJPG", "clip.avi"), ("VP80", "clip.webm")):
        path = tmp_path / name
        write_video(path, range(60), code=code)
        [source] = sources(path)
        assert predict_video(Seer(), source, tmp_path) is None
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2])
        problem = predict_video(Seer(), source, tmp_path)
        number = len(read_video(tmp_path / "videos" / "clip.mp4"))
        assert 10 < number < 50 and problem == f"{path}: ends after {number} of 60 frames"
        records = json.loads((tmp_path / "videos" / "clip.json").read_text())
        assert [record["image_id"] for record in records] == list(range(number))


def test_videos_of_any_rate(tmp_path):
    for rate in (29.97, 959.04):
        write_video(tmp_path / "clip.avi", rate=rate, code="MJPG")
        [source] = sources(tmp_path / "clip.avi")
        assert predict_video(Seer(), source, tmp_path) is None
        written = cv2.VideoCapture(str(tmp_path / "videos" / "clip.mp4"))
        assert written.get(cv2.CAP_PROP_FPS) == pytest.approx(rate, rel=1e-3)


def test_frames_of_other_sizes_are_kept(tmp_path):
    class Shrinks(Seer):
        def stream(self, images, threshold):
            for number, image in enumerate(images):
                yield self.result(image[: 60 - 10 * number])

    write_video(tmp_path / "clip.mp4", range(3))
    [source] = sources(tmp_path / "clip.mp4")
    assert predict_video(Shrinks(), source, tmp_path) is None
    frames = read_video(tmp_path / "videos" / "clip.mp4")
    assert [frame.shape for frame in frames] == [(64, 96, 3)] * 3


def test_a_video_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    write_video(tmp_path / "clip.mp4", range(30), (200, 300))
    [source] = sources(tmp_path / "clip.mp4")
    with largest_file(20_000):
        problem = predict_video(Seer(0), source, tmp_path)
    assert "OpenCV could not write all of" in problem
    assert files(tmp_path / "videos") == {"clip.json"}
    monkeypatch.setattr(cv2.VideoWriter, "isOpened", lambda self: False)
    problem = predict_video(Seer(), source, tmp_path)
    assert "OpenCV cannot write" in problem and "300x200 at 12.0 frames per second" in problem
    assert files(tmp_path / "videos") == {"clip.json"}


def claims_to_be(path, width, height):
    """Writes a small picture whose head says that it is of another size."""
    data = bytearray(cv2.imencode(path.suffix, picture(64, 64))[1].tobytes())
    if path.suffix == ".png":
        data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
        data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    elif path.suffix == ".jpg":
        start = data.index(b"\xff\xc0")
        data[start + 5 : start + 9] = height.to_bytes(2, "big") + width.to_bytes(2, "big")
        del data[-50:]
    else:
        data[18:26] = width.to_bytes(4, "little") + height.to_bytes(4, "little")
    path.write_bytes(data)


def test_a_picture_of_any_size_is_skipped(tmp_path, capsys):
    claims_to_be(tmp_path / "1.png", 30_000, 30_000)
    claims_to_be(tmp_path / "2.jpg", 13_000, 13_000)
    claims_to_be(tmp_path / "3.bmp", 1, 60_000_000)
    claims_to_be(tmp_path / "4.jpg", 2000, 2000)
    claims_to_be(tmp_path / "4.png", 1, 2_000_000)
    write_pictures(tmp_path, ("5.jpg",))
    write_video(tmp_path / "6.avi", [0], (1200, 1000), code="MJPG")
    *pictures, video = sources(tmp_path)
    with semantic_predictions(tmp_path / "out") as predictions:
        problems = predict_pictures(Seer(), pictures, predictions)
    limit = "megapixels; accepted: up to 50 (--max_megapixels)"
    assert problems == [
        f"{tmp_path / '1.png'}: far too many {limit}",
        f"{tmp_path / '2.jpg'}: 169.0 {limit}",
        f"{tmp_path / '3.bmp'}: 60.0 {limit}",
        f"{tmp_path / '4.jpg'}: the picture is truncated",
        f"{tmp_path / '4.png'}: with a side of 1 as costly as 256.0 {limit}",
    ]
    assert capsys.readouterr().err.count("skipped ") == 5
    assert [*files(tmp_path / "out" / "overlays")] == ["5.jpg"]
    problem = predict_video(Seer(), video, tmp_path, max_megapixels=1)
    assert problem == f"{tmp_path / '6.avi'}: 1.2 megapixels; accepted: up to 1 (--max_megapixels)"


def test_pictures_of_any_name_are_segmented(tmp_path, capsys):
    names = (
        *("scan of\npage 1.jpg", "a\r\x1b[31mb.jpg", "m" + "图" * 83 + "x.jpg", "x" * 251 + ".jpg"),
        *(os.fsdecode(b"caf\xe9.jpg"), "\u202egpj.exe.jpg", ".jpg.jpg"),
    )
    write_pictures(tmp_path / "in", names)
    (tmp_path / "in" / "no\npicture.jpg").touch()
    with semantic_predictions(tmp_path / "out") as predictions:
        [problem] = predict_pictures(Seer(), sources(tmp_path / "in"), predictions)
    assert problem == f"{tmp_path / 'in'}/no picture.jpg: cannot be decoded"
    assert "skipped " + problem in capsys.readouterr().err
    listed = json.loads((tmp_path / "out" / "images.json").read_text())["images"]
    assert {image["file_name"] for image in listed} == {*names}
    written = files(tmp_path / "out" / "overlays")
    assert len(written) == len(names) and all(name.isprintable() for name in written)


class Stopped(Seer):
    """A segmenter during whose pictures the process is asked to stop."""

    task, step, categories = "semantic", 1, tiny_runs.categories("semantic")

    def result(self, image):
        os.kill(os.getpid(), signal.SIGTERM)
        return super().result(image)


def test_what_was_done_before_an_interruption_is_kept(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(predict, "load", lambda *_, **__: Stopped())
    write_pictures(tmp_path / "in", ("1.png", "2.png"))
    for i in range(3, 9):
        (tmp_path / "in" / f"{i}.png").write_text("no picture")
    write_video(tmp_path / "clip.mp4")
    for source in (tmp_path / "in", tmp_path / "clip.mp4"):
        status = status_of("predict", source, "--model", "run", "--output", tmp_path / "out")
        said = capsys.readouterr().err
        assert status == 143 and said.endswith("stopped; what was done is kept\n")
        assert "skipped" not in said  # also past what cannot be read
    listed = json.loads((tmp_path / "out" / "images.json").read_text())["images"]
    assert [image["file_name"] for image in listed] == ["1.png"]
    assert "overlays/1.jpg" in files(tmp_path / "out")
    assert len(read_video(tmp_path / "out" / "videos" / "clip.mp4")) == 1
    assert len(json.loads((tmp_path / "out" / "videos" / "clip.json").read_text())) == 1


def test_a_contact_sheet_holds_all_pictures():
    for count, cells in ((1, 1), (3, 3), (4, 6), (10, 12)):
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
    cells = [
        thumbnail(np.full((*size, 3), 9, np.uint8), caption)
        for size in ((1, 1), (1, 900), (3000, 20), (400, 640))
        for caption in captions
    ]
    assert {cell.shape for cell in cells} == {cells[0].shape}
    assert cells[0].shape[1] == THUMBNAIL and (cells[9][100:200] == 9).any()


def test_the_overlay_of_a_panorama_is_reduced_to_what_its_file_holds(tmp_path):
    shape = (20, 70_000)
    categories = Categories(("cat",), (1,), 0)
    image = np.zeros((*shape, 3), np.uint8)
    result = Result("semantic", categories, image, np.ones(shape, np.uint8))
    write_pictures(tmp_path, ("w.png",))
    with Predictions(tmp_path / "out", "semantic", categories) as predictions:
        predictions.add(*sources(tmp_path / "w.png"), result)
    assert Image.open(tmp_path / "out" / "overlays" / "w.jpg").size == (65500, 19)
