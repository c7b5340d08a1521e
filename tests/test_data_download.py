import functools
import hashlib
import io
import threading
import zipfile
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import tiny_coco
import tiny_maps
from tensorflow_datasets.core.download import checksums

from knet_jax.data import download, pipeline
from knet_jax.data.download import Archive
from knet_jax.system.locks import lock

CUT = 3 * download.BLOCK
"""Bytes that a connection which breaks lets through."""


@pytest.fixture
def server(tmp_path):
    """A folder, the address where it is served, and the paths that have been asked for, behind each
    the range if there was one."""
    folder, asked = tmp_path / "server", []
    folder.mkdir()

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_GET(self):
            wanted = self.headers.get("Range", "")
            asked.append(self.path + wanted.removeprefix("bytes="))
            path = folder / self.path[1:]
            if not path.is_file():
                super().do_GET()
                return
            content, version = path.read_bytes(), f'"{path.stat().st_mtime_ns}"'
            start = int(wanted.removeprefix("bytes=").removesuffix("-") or 0)
            if self.headers.get("If-Range", version) != version:
                start = 0
            self.send_response(416 if start >= len(content) else 206 if start else 200)
            if start and not (folder / "terse").exists():
                last = f"{start}-{len(content) - 1}" if start < len(content) else "*"
                self.send_header("Content-Range", f"bytes {last}/{len(content)}")
            self.send_header("Content-Length", str(len(content) - start))
            self.send_header("ETag", version)
            self.end_headers()
            # A connection that breaks.
            stop = start + CUT if (folder / "cut").exists() else None
            self.wfile.write(content[start:stop])
            self.close_connection = True

    handler = functools.partial(Handler, directory=folder)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{http.server_port}", asked
        http.shutdown()


def zip_folder(source, prefix=""):
    """The bytes of an archive of all files below a folder."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for path in sorted(source.rglob("*")):
            archive.write(path, prefix + str(path.relative_to(source)))
    return stream.getvalue()


def test_coco_is_fetched_unpacked_and_prepared(server, tmp_path):
    """Archives as COCO's own: pictures by split, and PNG files in archives within an archive."""
    folder, address, asked = server
    source = tiny_coco.write(tmp_path / "source")
    for split in ("train2017", "val2017"):
        data = zip_folder(source / split, f"{split}/")
        (folder / f"{split}.zip").write_bytes(data)
        inner = source / f"annotations/panoptic_{split}"
        inner.with_suffix(".zip").write_bytes(zip_folder(inner, f"panoptic_{split}/"))
    annotations = tmp_path / "annotations"
    (annotations / "annotations").mkdir(parents=True)
    for path in (source / "annotations").glob("*.*"):
        path.rename(annotations / "annotations" / path.name)
    (folder / "panoptic.zip").write_bytes(zip_folder(annotations))
    archives = [
        Archive(f"{address}/train2017.zip"),
        Archive(f"{address}/val2017.zip"),
        download.ARCHIVES["coco", "panoptic"][-1]._replace(url=f"{address}/panoptic.zip"),
    ]
    root = tmp_path / "root"
    download.fetch(archives, str(root))
    config = tiny_coco.data_config(tmp_path / "prepared", root)
    assert len(pipeline.load_split(config, "val", "panoptic")) == 5
    assert len(asked) == 3
    download.fetch(archives, str(root))
    assert len(asked) == 3


def test_ade20k_is_fetched_and_found(server, tmp_path):
    folder, address, _ = server
    source = tiny_maps.write_ade20k(tmp_path / "source")
    data = zip_folder(source, "ADEChallengeData2016/")
    (folder / "ade.zip").write_bytes(data)
    archive = Archive(f"{address}/ade.zip", sha1=hashlib.sha1(data).hexdigest())
    download.fetch([archive], str(tmp_path / "root"))
    config = tiny_coco.data_config(tmp_path / "prepared", tmp_path / "root", dataset="ade20k")
    assert len(pipeline.load_split(config, "training", "semantic")) == 3


@pytest.fixture
def two(server, tmp_path):
    """Two archives with a file each."""
    folder, address, asked = server
    for name in ("a", "b"):
        source = tmp_path / name
        source.mkdir()
        (source / f"{name}.txt").write_text(name * 3 * CUT)
        (folder / f"{name}.zip").write_bytes(zip_folder(source))
    return folder, [Archive(f"{address}/{name}.zip") for name in ("a", "b")], asked


def test_what_is_whole_is_not_fetched_again(two, tmp_path):
    folder, archives, asked = two
    hidden = folder / "b.zip"
    hidden.rename(folder / "hidden")
    with pytest.raises(ValueError, match=r"b\.zip cannot be downloaded: .*404.* goes on"):
        download.fetch(archives, str(tmp_path / "root"))
    (folder / "hidden").rename(hidden)
    download.fetch(archives, str(tmp_path / "root"))
    assert asked == ["/a.zip", "/b.zip", "/b.zip"]
    assert (tmp_path / "root" / "b.txt").read_text() == "b" * 3 * CUT


def cut_off(folder, archives, root):
    (folder / "cut").touch()
    with pytest.raises(ValueError, match=r"a\.zip cannot be downloaded.*the same command goes on"):
        download.fetch(archives, str(root))
    (folder / "cut").unlink()


def test_a_connection_that_breaks_goes_on_where_it_broke(two, tmp_path):
    folder, archives, asked = two
    for _ in range(2):
        cut_off(folder, archives, tmp_path / "root")
    download.fetch(archives, str(tmp_path / "root"))
    assert asked == ["/a.zip", f"/a.zip{CUT}-", f"/a.zip{2 * CUT}-", "/b.zip"]
    assert (tmp_path / "root" / "a.txt").read_text() == "a" * 3 * CUT
    assert not list((tmp_path / "root").glob("**/*.tmp.*"))
    assert not list((tmp_path / "root").glob("**/*.part*"))


def test_an_archive_that_is_another_by_now_begins_anew(two, tmp_path):
    folder, archives, asked = two
    cut_off(folder, archives, tmp_path / "root")
    with zipfile.ZipFile(folder / "a.zip", "w") as archive:
        archive.writestr("a.txt", "new" * CUT)
    download.fetch(archives, str(tmp_path / "root"))
    assert asked == ["/a.zip", f"/a.zip{CUT}-", "/b.zip"]
    assert (tmp_path / "root" / "a.txt").read_text() == "new" * CUT


def test_an_archive_that_had_come_whole_is_not_fetched_again(two, tmp_path):
    """Killed before TFDS knew of it."""
    folder, archives, asked = two
    cut_off(folder, archives, tmp_path / "root")
    [part] = (tmp_path / "root").glob("downloads/**/a.zip.part")
    content = (folder / "a.zip").read_bytes()
    part.write_bytes(content)
    download.fetch(archives, str(tmp_path / "root"))
    assert asked == ["/a.zip", f"/a.zip{len(content)}-", "/b.zip"]
    assert (tmp_path / "root" / "a.txt").read_text() == "a" * 3 * CUT


def test_a_part_that_the_server_has_not_begins_anew(two, tmp_path):
    folder, archives, asked = two
    cut_off(folder, archives, tmp_path / "root")
    [part] = (tmp_path / "root").glob("downloads/**/a.zip.part")
    part.write_bytes(b"x" * 10 * CUT)
    (folder / "terse").touch()
    with pytest.raises(ValueError, match=r"a\.zip cannot be downloaded: HTTP code 416; the same"):
        download.fetch(archives, str(tmp_path / "root"))
    download.fetch(archives, str(tmp_path / "root"))
    assert asked == ["/a.zip", f"/a.zip{10 * CUT}-", "/a.zip", "/b.zip"]
    assert (tmp_path / "root" / "a.txt").read_text() == "a" * 3 * CUT


def test_a_download_is_in_the_thread_that_an_interruption_ends(two, tmp_path, monkeypatch):
    _, archives, _ = two
    threads = []

    def fetch(downloader, url, destination_path, verify=True):
        threads.append(threading.current_thread())
        raise KeyboardInterrupt

    monkeypatch.setattr(download._Downloader, "_sync_download", fetch)
    with pytest.raises(KeyboardInterrupt):
        download.fetch(archives, str(tmp_path / "root"))
    assert threads == [threading.main_thread()]


def test_a_second_download_into_a_root_waits(two, tmp_path):
    _, archives, asked = two
    (tmp_path / "root" / "downloads").mkdir(parents=True)
    with (
        lock(tmp_path / "root" / "downloads", ""),
        pytest.raises(ValueError, match="another download"),
    ):
        download.fetch(archives, str(tmp_path / "root"))
    assert not asked
    download.fetch(archives, str(tmp_path / "root"))


def test_unpacking_goes_on_where_it_stopped(two, tmp_path):
    _, archives, asked = two
    root = tmp_path / "root"
    download.fetch(archives, str(root))
    [marker] = root.glob("downloads/a.zip.unpacked")
    marker.unlink()
    (root / "a.txt").write_text("cut off")
    untouched = (root / "b.txt").stat().st_mtime_ns
    download.fetch(archives, str(root))
    assert (root / "a.txt").read_text() == "a" * 3 * CUT
    assert (root / "b.txt").stat().st_mtime_ns == untouched and len(asked) == 2


def test_wrong_checksums_are_named_and_fetched_again(two, tmp_path):
    folder, [archive, _], asked = two
    wrong = archive._replace(sha1="0" * 40)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"a\.zip has SHA-1 .*, expected 0{40}; it has been"):
            download.fetch([wrong], str(tmp_path / "root"))
    assert len(asked) == 2 and not (tmp_path / "root" / "a.txt").exists()
    right = hashlib.sha1((folder / "a.zip").read_bytes()).hexdigest()
    download.fetch([archive._replace(sha1=right)], str(tmp_path / "root"))
    assert (tmp_path / "root" / "a.txt").exists()


def test_checksums_that_tfds_knows_are_compared(two, tmp_path, monkeypatch):
    _, [archive, _], _ = two
    known = checksums.get_all_url_infos()
    for archives in download.ARCHIVES.values():
        for one in archives:
            assert one.url in known or one.sha1
    [size, digest] = [5, "0" * 64]
    wrong = {archive.url: checksums.UrlInfo(size=size, checksum=digest, filename="a.zip")}
    monkeypatch.setattr(checksums, "get_all_url_infos", lambda: dict(wrong))
    with pytest.raises(ValueError, match=r"a\.zip cannot be downloaded: .*wrong checksum"):
        download.fetch([archive], str(tmp_path / "root"))
    assert not (tmp_path / "root" / "a.txt").exists()


def test_a_damaged_member_is_named_and_its_archive_fetched_again(two, tmp_path):
    folder, [archive, _], _ = two
    sound = (folder / "a.zip").read_bytes()
    with zipfile.ZipFile(folder / "a.zip") as file:
        [member] = [info for info in file.infolist() if info.file_size]
    start = member.header_offset + 30 + len(member.filename)
    (folder / "a.zip").write_bytes(sound[:start] + b"\xff" * 8 + sound[start + 8 :])
    with pytest.raises(ValueError, match=r"a\.zip: .* is no whole zip file and has been"):
        download.fetch([archive], str(tmp_path / "root"))
    (folder / "a.zip").write_bytes(sound)
    download.fetch([archive], str(tmp_path / "root"))
    assert (tmp_path / "root" / "a.txt").read_text() == "a" * 3 * CUT


def test_what_is_no_archive_is_named(two, tmp_path):
    folder, [archive, _], asked = two
    (folder / "a.zip").write_text("<html>moved</html>")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"a\.zip: .* is no whole zip file and has been"):
            download.fetch([archive], str(tmp_path / "root"))
    assert len(asked) == 2


def test_nothing_is_written_outside_the_root(server, tmp_path):
    folder, address, _ = server
    with zipfile.ZipFile(folder / "evil.zip", "w") as archive:
        archive.writestr("../../outside.txt", "x")
    root = tmp_path / "deep" / "root"
    download.fetch([Archive(f"{address}/evil.zip")], str(root))
    assert not list(tmp_path.glob("outside.txt")) and not list(tmp_path.glob("deep/outside.txt"))


@pytest.mark.parametrize("dataset, task", [("cityscapes", "semantic"), ("shapes", "panoptic")])
def test_datasets_without_archives_are_named(dataset, task):
    with pytest.raises(ValueError, match=rf"'{dataset}' cannot be downloaded .*: ade20k, coco"):
        download.find(dataset, task)


def test_a_root_is_needed():
    with pytest.raises(ValueError, match=r"config\.data\.root is empty"):
        download.fetch(download.find("coco", "instance"), "")
