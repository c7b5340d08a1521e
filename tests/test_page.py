"""The page: what it shows, its server, and the whole of it in a browser."""

import asyncio
import base64
import json
import re
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
from devices import environment
from PIL import Image
from tiny_runs import picture

from knet_jax.app.page import views
from knet_jax.app.page.guard import Guard
from knet_jax.app.page.page import count_categories, list_categories, make_app
from knet_jax.cli import demo
from knet_jax.segmentation import rle
from knet_jax.segmentation.image_files import segment_ids
from knet_jax.segmentation.result import Result
from knet_jax.segmentation.segments import Categories, Instance, PanopticMap, SegmentInfo
from knet_jax.system.errors import UserError

ROOT = Path(__file__).parents[1]
MAX_UPLOAD_MB = 3
PAGE = (0.2, 0.05)
"""Thresholds that the page starts with: those of the model's config."""

# A process that says when it is about to leave this machine, and does not. What a shell starts in the
# background would ignore Ctrl-C.
AT_HOME = """
import runpy, signal, socket, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
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


def save(path, array):
    Image.fromarray(array).save(path)
    return path


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
    assert summary(things) == [("cat", 0.8, 4), ("<b>", 0.4, 6)]
    np.testing.assert_array_equal(things.segments[1].mask, IDS == 2)
    classes = views.as_task(PANOPTIC, "semantic")
    np.testing.assert_array_equal(classes.semantic, PANOPTIC.semantic)
    assert [s.name for s in classes.segments] == ["cat", "<b>", "sky"]


def test_what_the_page_is_given():
    given = views.display(views.Seen(PANOPTIC, (40, 60), 1.0))
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
    for segment in given["segments"]:  # a chip has the color that covers the segment
        y, x = np.argwhere(ids == segment["id"])[0] + 10
        color = np.array([int(value) for value in re.findall(r"\d+", segment["color"])])
        opacity = 0.4 if segment["name"] == "sky" else 0.55
        covered = (1 - opacity) * 100 + opacity * color
        np.testing.assert_allclose(picture[y, x].astype(int), covered, atol=6)

    classes = views.display(views.Seen(views.as_task(PANOPTIC, "semantic"), (4, 6), 0.0))
    assert [s["score"] for s in classes["segments"]] == [""] * 3
    assert classes["facts"][1] == "3 classes"
    ids = segment_ids(decode(classes["ids"]))[50::107, 50::107]
    np.testing.assert_array_equal(ids, PANOPTIC.semantic + 1)


def test_instances_of_which_one_hides_the_other():
    masks = [np.ones((4, 6), np.uint8), np.uint8(IDS == 1)]
    both = tuple(
        Instance(rle.encode(mask), label, 0.5 + label / 10, area=float(mask.sum()))
        for label, mask in enumerate(masks)
    )
    result = Result("instance", CATEGORIES, PANOPTIC.image, both)
    given = views.display(views.Seen(result, (4, 6), 0.0))
    ids = segment_ids(decode(given["ids"]))[50::107, 50::107]
    names = {s["id"]: s["name"] for s in given["segments"]}
    assert [names[i] for i in (ids[0, 0], ids[3, 5])] == ["<b>", "cat"]
    assert [s["share"] for s in given["segments"]] == ["100.0 %", "16.7 %"]


def test_names_are_no_html():
    assert "<b>" not in list_categories(CATEGORIES)
    assert "&lt;b&gt;" in list_categories(CATEGORIES)
    assert count_categories(CATEGORIES) == "Categories: 2 of things, 1 of stuff"
    assert count_categories(CATEGORIES._replace(num_things=0)) == "Categories: 3 classes"


# Pictures.


def test_the_page_sees_what_the_segmenter_sees(segmenters, tmp_path):
    path = str(save(tmp_path / "a.png", picture()))
    calls = []

    def segmenter(*args):
        calls.append(args)
        return segmenters["panoptic"](*args)

    pictures = views.Pictures(segmenter, 1)
    for threshold in (0.0, 0.2, 0.5):
        seen = pictures.see(path, "a.png", "panoptic", threshold, 0.1)
        expected = segmenters["panoptic"](path, threshold, 0.1)
        assert seen.size == (64, 96) and summary(seen.result) == summary(expected)
        np.testing.assert_array_equal(seen.result.panoptic.ids > 0, expected.panoptic.ids > 0)
    assert pictures.see(path, "a.png", "semantic", 0.2, 0.1).result.task == "semantic"
    assert len(calls) == 1  # none of these starts the network again
    pictures.see(path, "a.png", "panoptic", 0.2, 0.9)
    assert len(calls) == 2


def test_large_pictures_are_reduced_for_the_page_alone(tmp_path):
    def segmenter(image, *_):
        labels = np.ones(image.shape[:2], np.uint8)
        return Result("semantic", CATEGORIES, image, labels)

    path = str(save(tmp_path / "a.png", picture(100, 2000)))
    pictures = views.Pictures(segmenter, 1)
    seen = pictures.see(path, "a.png", "semantic", 0.2, 0.1)
    assert seen.size == (100, 2000) and seen.result.size == (80, views.MAX_SIDE)
    assert pictures.see(path, "a.png", "semantic", 0.2, 0.1, whole=True).result.size == (100, 2000)
    assert views.display(seen)["facts"][0] == "2000 × 100 pixels"


def test_what_is_no_picture(tmp_path):
    (tmp_path / "text.jpg").write_text("no picture")
    save(tmp_path / "drawing.gif", picture(8, 8))
    save(tmp_path / "whole.jpg", picture(64, 64))
    (tmp_path / "half.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:700])
    save(tmp_path / "large.png", picture(800, 1000))
    for name, message in {
        "text.jpg": "no picture that can be read; accepted: .bmp, .jpeg, ",
        "drawing.gif": "no picture that can be read",
        "half.jpg": "the picture is truncated",
        "large.png": "0.8 megapixels; accepted: up to 0.5",
        "missing.png": "no longer here; drop it again",
    }.items():
        with pytest.raises(UserError, match=f"^{name}: {message}"):
            views.Pictures(None, 0.5).see(str(tmp_path / name), name, "panoptic", 0.2, 0.1)


# The server.


def test_a_guard_narrows_what_requests_may_ask(tmp_path, capsys):
    async def app(scope, receive, send):
        if scope["path"] == "/assets/fault":
            raise KeyError("a fault of Gradio")
        body = (await receive())["body"] if scope["method"] == "POST" else b""
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body})

    guard = Guard(app, 5 << 20, tmp_path, ["page.example"])
    join = "POST /gradio_api/queue/join"

    def ask(route=join, body=b"", **headers):
        """Status, headers and body of the answer to a request, which comes in two parts."""
        sent, parts = [], [body[:9], body[9:]]
        messages = [
            {"type": "http.request", "body": part, "more_body": i == 0}
            for i, part in enumerate(parts)
        ]

        async def receive():
            return messages.pop(0)

        async def send(message):
            sent.append(message)

        given = {"host": "127.0.0.1:7860", "content-length": str(len(body)), **headers}
        given = [(key.encode(), value.encode()) for key, value in given.items()]
        method, path = route.split(" ", 1)
        scope = {"type": "http", "method": method, "path": path, "headers": given}
        asyncio.run(guard(scope, receive, send))
        return (sent[0]["status"], dict(sent[0]["headers"]), sent[1]["body"]) if sent else sent

    status, headers, _ = ask("GET /")
    assert status == 200 and b"default-src 'self';" in headers[b"content-security-policy"]
    mine = tmp_path / "1" / "a.png"
    for route, expected in {
        "GET /config": 200,
        "GET /assets/a.js": 200,
        f"GET /gradio_api/file={mine}": 200,
        "GET /gradio_api/file=/etc/passwd": 403,
        f"GET /gradio_api/file={tmp_path}/../a.png": 403,
        "GET /gradio_api/file=http://192.0.2.1/x": 403,
        "GET /gradio_api/file=a\0b": 403,
        "GET /gradio_api/proxy=http://192.0.2.1/x": 404,
        "GET /gradio_api/vibe-code": 404,
        "DELETE /": 404,
        "OPTIONS /gradio_api/upload": 404,
    }.items():
        assert ask(route)[0] == expected, route
    for host, origin, expected in (
        ("[::1]:7860", "http://[::1]:7860", 200),
        ("localhost:1", "http://localhost:1", 200),
        ("page.example", "https://page.example", 200),
        ("127.0.0.1:7860", "https://page.example", 200),  # a proxy
        ("127.0.0.1:7860", "http://127.0.0.1:8000", 403),
        ("127.0.0.1:7860", "http://evil.example", 403),
        ("127.0.0.1:7860", "null", 403),
        ("127.0.0.1:7860", "http://[", 403),
        ("evil.example", "http://evil.example", 421),
        ("127.0.0.1.evil.example", "", 421),
        ("[", "", 421),
        ("", "", 421),
    ):
        assert ask("GET /", host=host, origin=origin)[0] == expected, (host, origin)
    upload, form = "POST /gradio_api/upload", {"content-type": "multipart/form-data; boundary=x"}
    assert ask(upload, bytes(2 << 20), **form)[0] == 200
    assert ask(upload, bytes(6 << 20), **form)[0] == 413
    assert ask(body=bytes(2 << 20))[0] == 413
    assert ask(body=b"{}", **{"transfer-encoding": "chunked"})[0] == 413
    good = [{"path": str(mine)}, "Panoptic", 0.5, 0]
    for data, expected in (
        (good, 200),
        ([None, *good[1:]], 200),
        ([{"path": f"{tmp_path}/../a.png"}, *good[1:]], 403),
        ([{"path": "http://192.0.2.1/a.png"}, *good[1:]], 403),
        ([good[0] | {"orig_name": {"path": "/etc/passwd"}}, *good[1:]], 403),
        (good[:3], 400),
        ([*good[:3], "1"], 400),
        ([*good[:3], float("nan")], 400),
        ([good[0], ["Panoptic"], 1, 1], 400),
        ([{"path": 5}, *good[1:]], 400),
        ([good[0] | {"orig_name": "\ud800"}, *good[1:]], 400),
        (5, 400),
    ):
        body = json.dumps({"data": data}).encode()
        status, _, answer = ask(body=body)
        assert status == expected and (answer == body) == (status == 200), data
    assert ask(body=b"[" * 100_000)[0] == ask(body=b"\xff")[0] == ask()[0] == 400
    capsys.readouterr()
    assert ask("GET /assets/fault") == []
    assert capsys.readouterr().err == "GET '/assets/fault': KeyError('a fault of Gradio')\n"


def test_an_address_that_cannot_be_had():
    with demo.listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        assert demo.address(listener) == f"http://127.0.0.1:{port}"
        with pytest.raises(UserError, match=f"--port={port}: Address already in use; --port=0"):
            demo.listen("127.0.0.1", port)
    with pytest.raises(UserError, match="--host=nowhere.invalid"):
        demo.listen("nowhere.invalid", 0)


def test_the_page_offers_what_the_model_does(segmenters, tmp_path, monkeypatch):
    pytest.importorskip("gradio", reason="needs gradio: pip install -e '.[demo]'")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    import httpx

    async def ask(app):
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return (await client.get("/config")).json()

    for task, captions, sliders in (
        ("panoptic", ["Panoptic", "Instances", "Semantic"], {"Score": 0.2, "Overlap": 0.05}),
        ("instance", [], {"Score": 0.3}),
        ("semantic", [], {}),
    ):
        config = asyncio.run(ask(make_app(segmenters[task], "<i>", 50, 50)))
        assert not config["analytics_enabled"]
        seen = [one["props"] | {"type": one["type"]} for one in config["components"]]
        seen = [one for one in seen if one.get("visible", True)]
        offered = [[name for name, _ in one["choices"]] for one in seen if one["type"] == "radio"]
        assert offered == ([captions] if captions else [])
        found = {one["label"].split()[0]: one["value"] for one in seen if one["type"] == "slider"}
        assert found == sliders
        [head, *_] = [one["value"] for one in seen if one["type"] == "html"]
        assert f"{task} segmentation · model &lt;i&gt;, step 1 · float32 on cpu" in head


@pytest.fixture(scope="module")
def url(tiny_models, tmp_path_factory):
    """Of a server, which ends by Ctrl-C, leaves no file, and never asks the network."""
    pytest.importorskip("gradio", reason="needs gradio: pip install -e '.[demo]'")
    folder = tmp_path_factory.mktemp("server")
    (folder / "files").mkdir()
    arguments = ["--model", tiny_models["panoptic"], "--port", "0"]
    arguments += ["--max_upload_mb", MAX_UPLOAD_MB]
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", AT_HOME, *map(str, arguments)],
            cwd=ROOT,
            env=environment(1) | {"TMPDIR": str(folder / "files")},
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    try:
        said = process.stdout.readline()
        assert said.startswith("panoptic (panoptic, step 1): http://127.0.0.1:"), (
            said + (folder / "log").read_text()
        )
        yield said.split()[-1]
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
        log = (folder / "log").read_text()
        *others, end = log.splitlines()
        assert end.endswith(": interrupted")
        assert others in ([], ["there is no view 'Depth'; accepted: Panoptic, Instances, Semantic"])
        assert not [path for path in (folder / "files").iterdir() if "knet_jax" in path.name]
    finally:
        process.kill()


@pytest.fixture(scope="module")
def client(url):
    gradio_client = pytest.importorskip("gradio_client")
    return gradio_client.Client(url, verbose=False, download_files=True)


@pytest.fixture(scope="module")
def ask(client):
    """Calls a function of the page for the picture in a file."""
    from gradio_client import handle_file

    def call(path, function, *settings):
        upload = path and handle_file(str(path))
        return client.predict(upload, *(settings or ("Panoptic", *PAGE)), api_name=f"/{function}")

    return call


@pytest.mark.slow
def test_pictures_by_way_of_the_interface(ask, segmenters, tmp_path):
    path = save(tmp_path / "spots.png", picture())
    expected = segmenters["panoptic"](path, *PAGE)
    shown = ask(path, "segment")
    assert [s["name"] for s in shown["segments"]] == [s.name for s in expected.segments]
    assert shown["facts"][0] == "96 × 64 pixels"
    written = ask(path, "write_json")
    assert json.loads(Path(written).read_text()) == json.loads(json.dumps(expected.to_coco()))
    assert Path(written).name == "spots_panoptic_0.2_0.05.json"
    assert np.asarray(Image.open(ask(path, "write_png"))).shape == (427, 640, 3)
    shown = ask(path, "segment", "Instances", 1.0, 0.0)
    assert shown["segments"] == [] and shown["facts"][1] == "0 segments"
    assert "message" in ask(None, "segment")

    paths = [save(tmp_path / f"{i}.png", picture(seed=i)) for i in range(10)]
    with ThreadPoolExecutor(10) as pool:
        shown = list(pool.map(lambda path: ask(path, "segment"), paths))
    assert len({one["picture"] for one in shown}) == 10


@pytest.mark.slow
def test_what_is_too_much_is_refused_and_the_rest_answered(ask, url, tmp_path):
    import httpx

    (tmp_path / "text.jpg").write_text("no picture")
    Image.new("L", (7100, 7100)).save(tmp_path / "huge.png")
    for name, message in (
        ("text.jpg", "text.jpg: no picture that can be read; accepted: .bmp, "),
        ("huge.png", "huge.png: 50.4 megapixels; accepted: up to 50"),
    ):
        shown = ask(tmp_path / name, "segment")
        assert shown["error"] and shown["message"].startswith(message)

    heavy = {"files": ("heavy.bmp", bytes((MAX_UPLOAD_MB << 20) + 1))}
    assert httpx.post(f"{url}/gradio_api/upload", files=heavy).status_code == 413
    flood = httpx.post(f"{url}/gradio_api/queue/join", content=bytes(5 << 20))
    assert flood.status_code == 413

    # Neither files of the server nor addresses elsewhere.
    mine = save(tmp_path / "mine.png", picture())
    for place in (str(mine), f"{url}/favicon.ico", "http://192.0.2.1/a.png"):
        picked = {"path": place, "meta": {"_type": "gradio.FileData"}}
        for route in ("call/segment", "queue/join"):
            data = {"data": [picked, "Panoptic", *PAGE]}
            assert httpx.post(f"{url}/gradio_api/{route}", json=data).status_code == 403
    assert httpx.get(f"{url}/gradio_api/file={mine}").status_code == 403
    with pytest.raises(Exception, match="there is no view .*Depth.*; accepted: Panoptic"):
        ask(mine, "write_json", "Depth", *PAGE)
    assert httpx.get(url).status_code == 200


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
        "text => [...document.querySelectorAll('#viewer, #viewer *')].some("
        "e => e.shadowRoot?.querySelector('figcaption').textContent.includes(text))",
        arg=text,
    )


def names(page):
    return [button.inner_text() for button in page.locator("#viewer li button").all()]


@pytest.mark.slow
def test_the_page_in_a_browser(page, segmenters, tmp_path):
    path = save(tmp_path / "spots.png", picture())
    assert "Drop a picture" in page.locator("#viewer .message").inner_text()
    assert "model panoptic, step 1" in page.locator("body").inner_text()
    page.set_input_files("input[type=file]", path)
    expected = segmenters["panoptic"](path, *PAGE)
    settled(page, f"{len(expected.segments)} segments")
    assert names(page) == [f"{s.name} {s.score:.2f}" for s in expected.segments]

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
    without = segmenters["panoptic"](path, 1.0, PAGE[1])
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
