"""Fetching the official archives of COCO and ADE20K, on request.

TFDS' download manager fetches them: archives that are whole are not fetched again, and those whose
checksum it knows (COCO's) are compared with it. Two things are done here: it would begin anew with an
archive that was cut off (COCO's largest has 18 GiB), and its extraction needs TensorFlow. What is
unpacked already is left alone.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import zipfile
import zlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import requests
import tensorflow_datasets as tfds
import tqdm
from promise import Promise
from requests.adapters import HTTPAdapter, Retry
from tensorflow_datasets.core.download import downloader
from tensorflow_datasets.core.download.checksums import UrlInfo
from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError
from tensorflow_datasets.core.download.util import DownloadError

from knet_jax.system.errors import UserError
from knet_jax.system.locks import lock

COCO = "http://images.cocodataset.org"
ADE20K = "http://data.csail.mit.edu/places/ADEchallenge"
FOLDER = "downloads"
"""Of the archives, below the root; it may be removed once all is unpacked."""

BLOCK = 1 << 16
"""Bytes that are fetched at a time; of a connection that breaks, so many are lost at most."""


class Archive(NamedTuple):
    """A zip file."""

    url: str
    inner: tuple[str, ...] = ()
    """Archives in it, which are unpacked beside themselves."""
    sha1: str = ""
    """Where it is known and TFDS does not know another checksum."""


_PICTURES = (Archive(f"{COCO}/zips/train2017.zip"), Archive(f"{COCO}/zips/val2017.zip"))
_PANOPTIC = Archive(
    f"{COCO}/annotations/panoptic_annotations_trainval2017.zip",
    ("annotations/panoptic_train2017.zip", "annotations/panoptic_val2017.zip"),
)
_INSTANCES = Archive(f"{COCO}/annotations/annotations_trainval2017.zip")
ARCHIVES = {
    ("coco", "panoptic"): (*_PICTURES, _PANOPTIC),
    ("coco", "semantic"): (*_PICTURES, _PANOPTIC),
    ("coco", "instance"): (*_PICTURES, _INSTANCES),
    ("ade20k", "semantic"): (
        Archive(
            f"{ADE20K}/ADEChallengeData2016.zip", sha1="219e1696abb36c8ba3a3afe7fb2f4b4606a897c7"
        ),
    ),
}
"""By the name of the dataset and the task."""


def find(dataset: str, task: str) -> Sequence[Archive]:
    """The archives of a dataset. Raises ValueError where none can be fetched."""
    if (dataset, task) not in ARCHIVES:
        known = ", ".join(sorted({name for name, _ in ARCHIVES}))
        raise UserError(
            f"config.data.dataset '{dataset}' cannot be downloaded for config.task '{task}'; "
            f"accepted: {known}"
        )
    return ARCHIVES[dataset, task]


def fetch(archives: Sequence[Archive], root: str) -> None:
    """Downloads and unpacks archives. The same call goes on after an interruption.

    Args:
        archives: which ones.
        root: the folder that they are unpacked into, `config.data.root`.

    Raises:
        ValueError: there is no root, another download into it is under way, or an archive cannot be
            fetched or is damaged.
    """
    if not root:
        raise UserError("config.data.root is empty, it must name the folder to download to")
    target = Path(os.path.expanduser(root))
    folder = target / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder, f"another download into {target} is under way; wait for its end"):
        _fetch(archives, target, folder)


def _fetch(archives: Sequence[Archive], target: Path, folder: Path) -> None:
    for leftover in folder.glob("**/*.tmp.*"):
        shutil.rmtree(leftover, ignore_errors=True)
    manager = _Manager(download_dir=folder)
    for archive in archives:
        name = archive.url.rpartition("/")[2]
        done = folder / f"{name}.unpacked"
        if done.exists():
            print(f"{name}: unpacked already in {target}", flush=True)
            continue
        path = _download(manager, archive)
        unpack(path, target, name)
        for inner in archive.inner:
            unpack(target / inner, (target / inner).parent, inner)
        done.touch()
        print(f"{name}: unpacked in {target}", flush=True)


class _Manager(tfds.download.DownloadManager):
    """The manager of TFDS, with another way to fetch a file."""

    @cached_property
    def _downloader(self) -> _Downloader:
        return _Downloader()


class _Downloader(downloader._Downloader):
    """Goes on with a file that was cut off, if the server still has the same one."""

    def download(self, url: str, destination_path: Path, verify: bool = True) -> Promise:
        """See `downloader._Downloader`. Not in a thread, which an interruption would not end."""
        self._pbar_url.update_total(1)
        return Promise.resolve(self._sync_download(url, destination_path, verify))

    def _sync_download(
        self, url: str, destination_path: Path, verify: bool = True
    ) -> downloader.DownloadResult:
        """See `downloader._Downloader`. What has come of a file is kept beside its destination."""
        whole = Path(destination_path) / url.rpartition("/")[2]
        part = whole.parents[1] / f"{whole.name}.part"
        version = part.with_name(f"{part.name}.version")
        start = part.stat().st_size if part.exists() and version.exists() else 0
        headers = {"Accept-Encoding": "identity"}
        if start:
            headers |= {"Range": f"bytes={start}-", "If-Range": version.read_text()}
        with _session() as session:
            response = session.get(url, headers=headers, stream=True, timeout=60, verify=verify)
            is_whole = response.headers.get("Content-Range") == f"bytes */{start}"
            if response.status_code == 416 and not is_whole:
                part.unlink()  # the server has no such part of it; the next attempt begins anew
            if response.status_code not in (200, 206) and not is_whole:
                raise DownloadError(f"HTTP code {response.status_code}")
            if response.status_code == 200:
                start = 0
                part.unlink(missing_ok=True)  # before what it would be taken for a part of
                version.unlink(missing_ok=True)
                if found := _version(response):
                    version.write_text(found)
            size = start + (0 if is_whole else int(response.headers.get("Content-Length", 0)))
            self._pbar_dl_size.update_total(size >> 20)
            self._pbar_dl_size.update(start >> 20)
            with part.open("ab") as file:
                for block in response.iter_content(BLOCK) if not is_whole else ():
                    file.write(block)
                    done = file.tell()
                    self._pbar_dl_size.update((done >> 20) - (done - len(block) >> 20))
        if part.stat().st_size < size:
            raise DownloadError(f"only {part.stat().st_size} of {size} bytes came")
        with part.open("rb") as file:
            checksum = hashlib.file_digest(file, "sha256").hexdigest()
        part.replace(whole)
        version.unlink(missing_ok=True)
        self._pbar_url.update(1)
        info = UrlInfo(tfds.core.units.Size(whole.stat().st_size), checksum, whole.name)
        return downloader.DownloadResult(tfds.core.Path(whole), info)


def _session() -> requests.Session:
    """A session that tries again where a server is busy or a connection is refused."""
    session = requests.Session()
    retries = Retry(total=10, backoff_factor=0.2, status_forcelist=(500, 502, 503, 504))
    for scheme in ("http://", "https://"):
        session.mount(scheme, HTTPAdapter(max_retries=retries))
    return session


def _version(response: requests.Response) -> str | None:
    """What tells one version of a file from another, None where the server does not say."""
    tag = response.headers.get("ETag", "W/")
    return response.headers.get("Last-Modified") if tag.startswith("W/") else tag


def _download(manager: tfds.download.DownloadManager, archive: Archive) -> Path:
    """The path of an archive, fetched if need be."""
    try:
        path = Path(manager.download(archive.url))
    except (DownloadError, NonMatchingChecksumError, requests.RequestException) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{archive.url} cannot be downloaded: {reason}; the same command goes on"
        ) from error
    if archive.sha1:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha1").hexdigest()
        if found != archive.sha1:
            _forget(path)
            raise UserError(
                f"{archive.url} has SHA-1 {found}, expected {archive.sha1}; it has been removed"
            )
    return path


def _forget(path: Path) -> None:
    """Removes an archive and what TFDS noted of it."""
    for file in (path, path.with_name(f"{path.name}.INFO")):
        file.unlink(missing_ok=True)


def unpack(path: Path, folder: Path, title: str) -> None:
    """Unpacks a zip file, but for files that are there with the right size already.

    Raises:
        ValueError: it is damaged; it has been removed, so that it is fetched again.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            for member in tqdm.tqdm(archive.infolist(), f"Unpacking {title}", unit="file"):
                there = folder / member.filename
                if there.is_file() and there.stat().st_size == member.file_size:
                    continue
                archive.extract(member, folder)
    except (zipfile.BadZipFile, EOFError, zlib.error) as error:
        _forget(path)
        raise UserError(
            f"{title}: {path} is no whole zip file and has been removed: {error}"
        ) from error
