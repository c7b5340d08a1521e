"""The page: what it shows, its server, and the whole of it in a browser."""

import asyncio
import base64
import json
import re
import shutil
import signal
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
import tiny_runs
from devices import environment
from PIL import Image

from knet_jax.app.page import views
from knet_jax.app.page.page import Guard, count_categories, list_categories, make_app
from knet_jax.app.segmenter import Segmenter
from knet_jax.cli import demo
from knet_jax.saved.models import open_model
from knet_jax.segmentation import rle
from knet_jax.segmentation.image_files import segment_ids
from knet_jax.segmentation.result import Result
from knet_jax.segmentation.segments import Categories, Instance, PanopticMap, SegmentInfo
from knet_jax.system.errors import UserError

ROOT = Path(__file__).parents[1]
MAX_UPLOAD_MB = 3
PAGE = (0.2, 0.05)
"""Thresholds that the page starts with: those of the model's config."""

# A process that says when it is about to leave this machine, and does not.
AT_HOME = """
import runpy, socket, sys
HOME = ("127.0.0.1", "::1", "localhost", None)
def sealed(function, host_of):
    def call(*args, **kwargs):
        if host_of(*args) not in HOME:
            print("OUTSIDE:", args, file=sys.stderr, flush=True)
            raise OSError("outside")
        return function(*args, **kwargs)
    return call
is_ip = (socket.AF_INET, socket.AF_INET6)
host_of = lambda self, address: address[0] if self.family in is_ip else None
socket.socket.connect = sealed(socket.socket.connect, host_of)
socket.socket.connect_ex = sealed(socket.socket.connect_ex, host_of)
socket.getaddrinfo = sealed(socket.getaddrinfo, lambda host, *_: host)
runpy.run_module("knet_jax.demo", run_name="__main__", alter_sys=True)
"""


def picture(height, width, seed=0):
    """Smooth spots."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 7, 3)).astype(np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def save(path, array):
    Image.fromarray(array).save(path)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_runs.write(tmp_path_factory.mktemp("model") / "run", "panoptic")


@pytest.fixture(scope="module")
def segmenter(model):
    return Segmenter(open_model(model))


def summary(result):
    return [(s.name, round(s.score, 2), s.area) for s in result.segments]


# What is seen.

CATEGORIES = Categories(("cat", "<b>", "sky"), (17, 18, 119), 2)
IDS = np.array([[1, 1, 3, 3, 3, 0], [1, 1, 3, 3, 3, 0], [2, 2, 2, 3, 0, 0], [2, 2, 2, 3, 0, 0]])
PANOPTIC = Result(
    "panoptic",
    CATEGORIES,
    np.full((4, 6, 3), 100, np.uint8),
    PanopticMap(
        IDS.astype(np.int32),
        (SegmentInfo(3, 2, score=0.9), SegmentInfo(1, 0, score=0.8), SegmentInfo(2, 1, score=0.4)),
    ),
)


def decode(url):
    """An address that holds a picture -> uint8 [H, W, 3], RGB."""
    data = np.frombuffer(base64.b64decode(url.partition(",")[2]), np.uint8)
    return cv2.imdecode(data, cv2.IMREAD_COLOR_RGB)


def test_a_panoptic_result_is_seen_as_each_task():
    assert views.as_task(PANOPTIC, "panoptic") is PANOPTIC
    things = views.as_task(PANOPTIC, "instance")
    assert [(s.name, s.score, s.area) for s in things.segments] == [
        ("cat", 0.8, 4),
        ("<b>", 0.4, 6),
    ]
    np.testing.assert_array_equal(things.segments[1].mask, IDS == 2)
    classes = views.as_task(PANOPTIC, "semantic")
    np.testing.assert_array_equal(classes.semantic, PANOPTIC.semantic)
    assert [s.name for s in classes.segments] == ["cat", "<b>", "sky"]


def test_what_the_page_is_given():
    given = views.display(views.Seen(PANOPTIC, (40, 60), "segmented in 1.00 s"))
    assert json.loads(json.dumps(given)) == given
    picture, ids = decode(given["picture"]), segment_ids(decode(given["ids"]))
    assert picture.shape == (427, 640, 3) and ids.shape == (427, 640)  # enlarged
    np.testing.assert_array_equal(ids[50::107, 50::107], IDS)
    assert given["facts"] == ["60 × 40 pixels", "3 segments", "segmented in 1.00 s"]
    assert [(s["id"], s["name"], s["score"], s["share"]) for s in given["segments"]] == [
        (3, "sky", "0.90", "33.3 %"),
        (1, "cat", "0.80", "16.7 %"),
        (2, "<b>", "0.40", "25.0 %"),
    ]
    assert len({s["color"] for s in given["segments"]}) == 3
    for segment in given["segments"]:  # a chip has the color that is in the picture
        y, x = np.argwhere(ids == segment["id"])[0] + 10
        color = [int(value) for value in re.findall(r"\d+", segment["color"])]
        np.testing.assert_allclose(picture[y, x].astype(int), color, atol=6)

    classes = views.display(views.Seen(views.as_task(PANOPTIC, "semantic"), (4, 6), ""))
    assert [s["score"] for s in classes["segments"]] == [""] * 3
    assert classes["facts"][1] == "3 classes"
    np.testing.assert_array_equal(
        segment_ids(decode(classes["ids"]))[50::107, 50::107], PANOPTIC.semantic + 1
    )


def test_instances_of_which_one_hides_the_other():
    masks = [np.ones((4, 6), np.uint8), np.uint8(IDS == 1)]
    both = tuple(
        Instance(rle.encode(mask), label, 0.5 + label / 10, area=float(mask.sum()))
        for label, mask in enumerate(masks)
    )
    given = views.display(
        views.Seen(Result("instance", CATEGORIES, PANOPTIC.image, both), (4, 6), "")
    )
    ids = segment_ids(decode(given["ids"]))[50::107, 50::107]
    names = {s["id"]: s["name"] for s in given["segments"]}
    assert [names[i] for i in (ids[0, 0], ids[3, 5])] == ["<b>", "cat"]
    assert [s["share"] for s in given["segments"]] == ["100.0 %", "16.7 %"]
    hidden = (Instance(rle.encode(masks[1]), 0, 0.9, area=4.0),) * 2
    given = views.display(
        views.Seen(Result("instance", CATEGORIES, PANOPTIC.image, hidden), (4, 6), "")
    )
    assert sorted(s["color"] != "" for s in given["segments"]) == [False, True]


def test_names_are_no_html():
    assert "<b>" not in list_categories(CATEGORIES)
    assert "&lt;b&gt;" in list_categories(CATEGORIES)
    assert count_categories(CATEGORIES) == "Categories: 2 of things, 1 of stuff"
    assert count_categories(CATEGORIES._replace(num_things=0)) == "Categories: 3 classes"


# Pictures.


def test_the_page_sees_what_the_segmenter_sees(segmenter, tmp_path):
    path = str(save(tmp_path / "a.png", picture(64, 96)))
    pictures = views.Pictures(segmenter, 1)
    for threshold in (0.0, 0.2, 0.5):
        seen = pictures.see(path, "a.png", "panoptic", threshold, 0.1)
        expected = segmenter(path, threshold, 0.1)
        assert seen.size == (64, 96) and summary(seen.result) == summary(expected)
        np.testing.assert_array_equal(seen.result.panoptic.ids > 0, expected.panoptic.ids > 0)
    assert pictures.see(path, "a.png", "semantic", 0.2, 0.1).result.task == "semantic"
    assert pictures._reduced.cache_info().misses == 1  # none of these starts the network again
    pictures.see(path, "a.png", "panoptic", 0.2, 0.9)
    assert pictures._reduced.cache_info().misses == 2


def test_large_pictures_are_reduced_for_the_page_alone(segmenter, tmp_path):
    path = str(save(tmp_path / "a.png", picture(100, 2000)))
    pictures = views.Pictures(segmenter, 1)
    seen = pictures.see(path, "a.png", "panoptic", 0.2, 0.1)
    assert seen.size == (100, 2000) and seen.result.size == (80, views.MAX_SIDE)
    whole = pictures.see(path, "a.png", "panoptic", 0.2, 0.1, whole=True)
    assert whole.result.size == whole.size == (100, 2000)
    assert views.display(seen)["facts"][0] == "2000 × 100 pixels"


@pytest.mark.parametrize(
    "name, message",
    [
        ("text.jpg", "text.jpg: no picture that can be read; accepted: .bmp, .jpeg, "),
        ("empty.png", "empty.png: no picture that can be read"),
        ("half.jpg", "half.jpg: the picture is truncated"),
        ("drawing.gif", "drawing.gif: no picture that can be read"),
        ("large.png", "large.png: 0.8 megapixels; accepted: up to 0.5"),
        ("bomb.png", "bomb.png: far too many megapixels; accepted: up to 0.5"),
        ("missing.png", "missing.png: no longer here; drop it again"),
    ],
)
def test_what_is_no_picture(segmenter, tmp_path, name, message):
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "empty.png").touch()
    save(tmp_path / "whole.jpg", picture(64, 64))
    (tmp_path / "half.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:700])
    save(tmp_path / "drawing.gif", picture(8, 8))
    save(tmp_path / "large.png", picture(800, 1000))
    png = bytearray(save(tmp_path / "small.png", picture(8, 8)).read_bytes())
    png[16:24] = (30_000).to_bytes(4, "big") * 2  # what the head says; its checksum follows
    png[29:33] = zlib.crc32(png[12:29]).to_bytes(4, "big")
    (tmp_path / "bomb.png").write_bytes(png)
    with pytest.raises(ValueError) as error:
        views.Pictures(segmenter, 0.5).see(str(tmp_path / name), name, "panoptic", 0.2, 0.1)
    assert str(error.value).startswith(message)


# The server.


def ask(guard, headers, method="POST"):
    """Status and headers of an answer."""
    sent = []

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": method, "headers": headers}
    asyncio.run(guard(scope, None, send))
    return sent[0]["status"], dict(sent[0]["headers"])


def test_a_guard_refuses_large_bodies_and_seals_pages():
    async def app(scope, receive, send):
        headers = [(b"content-type", b"text/html")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

    guard = Guard(app, 100)
    for headers in ([], [(b"content-length", b"100")]):
        status, answered = ask(guard, headers)
        assert status == 200 and answered[b"content-type"] == b"text/html"
        assert b"default-src 'self';" in answered[b"content-security-policy"]
    for header in ((b"content-length", b"101"), (b"transfer-encoding", b"chunked")):
        assert ask(guard, [header])[0] == 413


def test_an_address_that_cannot_be_had():
    with demo.listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        assert demo.address(listener) == f"http://127.0.0.1:{port}"
        with pytest.raises(UserError, match=f"--port={port}: Address already in use; --port=0"):
            demo.listen("127.0.0.1", port)
    with pytest.raises(UserError, match="--host=nowhere.invalid"):
        demo.listen("nowhere.invalid", 0)


def run_demo(code, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        env=environment(1),
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
def test_mistakes_are_one_line(model):
    status, _, said = run_demo(AT_HOME)
    assert (status, said.count("\n")) == (2, 1) and said.startswith("demo.py: --model is missing")
    without = "import sys; sys.modules['gradio'] = None\n" + AT_HOME
    status, _, said = run_demo(without, "--model", model)
    assert (status, said) == (2, "demo.py: the page needs gradio: pip install -e '.[demo]'\n")


@pytest.mark.slow
def test_help_teaches():
    status, said, _ = run_demo(AT_HOME, "--help")
    assert status == 0
    for text in ("python -m knet_jax.demo --model runs/demo", "--host:", "--max_megapixels:"):
        assert text in said


@pytest.mark.parametrize(
    "task, captions, sliders",
    [
        ("panoptic", ["Panoptic", "Instances", "Semantic"], {"Score": 0.2, "Overlap": 0.05}),
        ("instance", [], {"Score": 0.3}),
        ("semantic", [], {}),
    ],
)
def test_the_page_offers_what_the_model_does(task, captions, sliders, model, tmp_path):
    pytest.importorskip("gradio", reason="needs gradio: pip install -e '.[demo]'")
    import httpx

    folder = model if task == "panoptic" else tiny_runs.write(tmp_path / "run", task)
    segmenter = Segmenter(open_model(folder))
    app = make_app(segmenter, "<i>", 50, 50)

    async def ask():
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return (await client.get("/config")).json()

    config = asyncio.run(ask())
    assert not config["analytics_enabled"]
    seen = [one["props"] | {"type": one["type"]} for one in config["components"]]
    seen = [one for one in seen if one.get("visible", True)]
    offered = [[name for name, _ in one["choices"]] for one in seen if one["type"] == "radio"]
    assert offered == ([captions] if captions else [])
    found = {one["label"].split()[0]: one["value"] for one in seen if one["type"] == "slider"}
    assert found == sliders
    [head, *_] = [one["value"] for one in seen if one["type"] == "html"]
    assert f"{task} segmentation · model &lt;i&gt;, step 1 · float32 on cpu" in head

    shown = views.Pictures(segmenter, 1).see(
        str(save(tmp_path / "a.png", picture(64, 96))), "a.png", task, 0.3, 0.0
    )
    assert summary(shown.result) == summary(segmenter(picture(64, 96), 0.3, 0.0))
    assert len(views.display(shown)["segments"]) == len(shown.result.segments) > 0


@pytest.fixture(scope="module")
def url(model, tmp_path_factory):
    """Of a server, which ends by Ctrl-C, leaves no file, and never asks the network."""
    pytest.importorskip("gradio", reason="needs gradio: pip install -e '.[demo]'")
    folder = tmp_path_factory.mktemp("server")
    (folder / "files").mkdir()
    # What a shell starts in the background would ignore Ctrl-C.
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)" + AT_HOME
    arguments = ["--model", model, "--port", "0", "--max_upload_mb", MAX_UPLOAD_MB]
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)],
            cwd=ROOT,
            env=environment(1) | {"TMPDIR": str(folder / "files")},
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    try:
        said = process.stdout.readline()
        assert said.startswith("run (panoptic, step 1): http://127.0.0.1:"), (
            said + (folder / "log").read_text()
        )
        yield said.split()[-1]
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
        log = (folder / "log").read_text()
        assert log == "demo.py: interrupted\n"
        assert not [path for path in (folder / "files").iterdir() if "knet_jax" in path.name]
    finally:
        process.kill()


@pytest.fixture(scope="module")
def client(url):
    gradio_client = pytest.importorskip("gradio_client")
    return gradio_client.Client(url, verbose=False, download_files=True)


def uploaded(path):
    from gradio_client import handle_file

    return handle_file(str(path))


@pytest.mark.slow
def test_a_picture_by_way_of_the_interface(client, segmenter, tmp_path):
    path = save(tmp_path / "spots.png", picture(64, 96))
    expected = segmenter(path, *PAGE)
    shown = client.predict(uploaded(path), "Panoptic", *PAGE, api_name="/segment")
    assert [s["name"] for s in shown["segments"]] == [s.name for s in expected.segments]
    assert shown["facts"][0] == "96 × 64 pixels"
    written = client.predict(uploaded(path), "Panoptic", *PAGE, api_name="/write_json")
    assert json.loads(Path(written).read_text()) == json.loads(json.dumps(expected.to_coco()))
    assert Path(written).name == "spots_panoptic_0.2_0.05.json"
    written = client.predict(uploaded(path), "Panoptic", *PAGE, api_name="/write_png")
    assert np.asarray(Image.open(written)).shape == (427, 640, 3)
    shown = client.predict(uploaded(path), "Instances", 1.0, 0.0, api_name="/segment")
    assert shown["segments"] == [] and shown["facts"][1] == "0 segments"
    assert "message" in client.predict(None, "Panoptic", *PAGE, api_name="/segment")


@pytest.mark.slow
def test_what_is_too_much_is_refused_and_the_rest_answered(client, url, tmp_path):
    import httpx

    text = tmp_path / "text.jpg"
    text.write_text("no picture")
    huge = tmp_path / "huge.png"
    Image.new("L", (7100, 7100)).save(huge)
    for path, message in (
        (text, "text.jpg: no picture that can be read; accepted: .bmp, "),
        (huge, "huge.png: 50.4 megapixels; accepted: up to 50"),
    ):
        shown = client.predict(uploaded(path), "Panoptic", *PAGE, api_name="/segment")
        assert shown["error"] and shown["message"].startswith(message)
    large = tmp_path / "large.png"
    Image.new("L", (7070, 7070)).save(large)
    shown = client.predict(uploaded(large), "Panoptic", *PAGE, api_name="/segment")
    assert shown["facts"][0] == "7070 × 7070 pixels"

    heavy = {"files": ("heavy.bmp", bytes((MAX_UPLOAD_MB << 20) + 1))}
    assert httpx.post(f"{url}/gradio_api/upload", files=heavy).status_code == 413
    flood = httpx.post(f"{url}/gradio_api/queue/join", content=bytes(5 << 20))
    assert flood.status_code == 413

    # Neither files of the server nor addresses elsewhere.
    mine = save(tmp_path / "mine.png", picture(64, 96))
    for place in (str(mine), f"{url}/favicon.ico", "http://192.0.2.1/a.png"):
        picked = {"path": place, "meta": {"_type": "gradio.FileData"}}
        asked = httpx.post(
            f"{url}/gradio_api/call/segment", json={"data": [picked, "Panoptic", *PAGE]}
        ).json()
        said = httpx.get(f"{url}/gradio_api/call/segment/{asked['event_id']}", timeout=60).text
        assert "event: error" in said and "Only a picture that was uploaded is read." in said
    assert httpx.get(f"{url}/gradio_api/file={mine}").status_code == 403
    assert httpx.get(url).status_code == 200


@pytest.mark.slow
def test_ten_uploads_at_once(client, url, tmp_path):
    import httpx

    paths = [save(tmp_path / f"{i}.png", picture(64, 96, i)) for i in range(10)]

    def segment(path):
        return client.predict(uploaded(path), "Panoptic", *PAGE, api_name="/segment")

    with ThreadPoolExecutor(10) as pool:
        answers = [pool.submit(segment, path) for path in paths]
        start = time.perf_counter()
        assert httpx.get(url, timeout=30).status_code == 200  # the page comes meanwhile
        page_after = time.perf_counter() - start
        shown = [answer.result(timeout=120) for answer in answers]
    assert all(one["facts"][0] == "96 × 64 pixels" for one in shown)
    assert len({one["picture"] for one in shown}) == 10
    assert page_after < 20


# In a browser.


@pytest.fixture
def page(url):
    """A tab of headless Chromium that shows the page; ends with what it asked of others: nothing."""
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright, a Python package")
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        pytest.skip("needs Chromium")
    asked, errors = [], []
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1280, "height": 900})
        tab.set_default_timeout(60_000)
        tab.on("request", lambda request: asked.append(request.url))
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.goto(url)
        yield tab
        browser.close()
    elsewhere = [one for one in asked if not one.startswith((url, "data:", "blob:"))]
    assert asked and not elsewhere and not errors


def settled(page, text):
    """Waits until the line under the picture holds a text."""
    page.wait_for_function(
        "text => document.querySelector('#viewer *:has(*), #viewer') && [...document.querySelectorAll"
        "('#viewer, #viewer *')].some(e => e.shadowRoot?.querySelector('figcaption')"
        ".textContent.includes(text))",
        arg=text,
    )


def names(page):
    return [button.inner_text() for button in page.locator("#viewer li button").all()]


@pytest.mark.slow
def test_the_page_in_a_browser(page, segmenter, tmp_path):
    path = save(tmp_path / "spots.png", picture(64, 96))
    assert "Drop a picture" in page.locator("#viewer .message").inner_text()
    assert "model run, step 1" in page.locator("body").inner_text()
    page.set_input_files("input[type=file]", path)
    expected = segmenter(path, *PAGE)
    settled(page, f"{len(expected.segments)} segments")
    assert names(page) == [f"{s.name} {s.score:.2f}" for s in expected.segments]
    page.screenshot(path=tmp_path / "page.png")

    # Names where the pointer is.
    box = page.locator("#viewer canvas").bounding_box()
    for segment in expected.segments[:3]:
        inside = cv2.distanceTransform(np.pad(np.uint8(segment.mask), 1), cv2.DIST_L2, 5)
        y, x = np.unravel_index(inside.argmax(), inside.shape)
        page.mouse.move(
            box["x"] + (x - 0.5) / 96 * box["width"], box["y"] + (y - 0.5) / 64 * box["height"]
        )
        shown = page.locator("#viewer .name")
        assert shown.inner_text().startswith(f"{segment.name} · {segment.score:.2f} · ")
        assert page.locator("#viewer button.lit").count() == 1

    # What is saved.
    with page.expect_download() as download:
        page.get_by_role("button", name="Save JSON").click()
    assert download.value.suggested_filename == "spots_panoptic_0.2_0.05.json"
    saved = json.loads(Path(download.value.path()).read_text())
    assert saved == json.loads(json.dumps(expected.to_coco()))
    with page.expect_download() as download:
        page.get_by_role("button", name="Save PNG").click()
    assert np.asarray(Image.open(download.value.path())).shape == (427, 640, 3)

    # Thresholds and views.
    sliders = page.locator("input[type=number]")
    sliders.first.fill("1")
    sliders.first.press("Enter")
    without = segmenter(path, 1.0, PAGE[1])
    assert len(without.segments) < len(expected.segments)
    settled(page, f"· {len(without.segments)} segments")
    page.get_by_label("Semantic").click()
    settled(page, f"· {len(views.as_task(without, 'semantic').segments)} classes")
    page.get_by_label("Instances").click()
    settled(page, "· 0 segments")

    # What is no picture.
    text = tmp_path / "text.jpg"
    text.write_text("no picture")
    page.set_input_files("input[type=file]", text)
    page.wait_for_selector("#viewer .error")
    assert "text.jpg: no picture" in page.locator("#viewer .error").inner_text()
    assert names(page) == [] and not page.locator("#viewer canvas").is_visible()
    heavy = tmp_path / "heavy.png"
    heavy.write_bytes(bytes((MAX_UPLOAD_MB << 20) + 1))
    page.set_input_files("input[type=file]", heavy)
    page.get_by_text("exceed the maximum allowed size of 3").first.wait_for()
