"""Datasets are written by any number of processes alike, and what was killed goes on."""

import functools
import importlib.util
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time

import pytest
import tiny_coco

from knet_jax.data import pipeline, prepared_split, shards
from knet_jax.data.sources import by_name, examine
from knet_jax.system.errors import UserError

NEEDS_BEAM = pytest.mark.skipif(
    not importlib.util.find_spec("apache_beam"), reason="Apache Beam is not installed"
)
WAYS = {
    "1": functools.partial(shards.write_locally, 1),
    "2": functools.partial(shards.write_locally, 2),
    "4": functools.partial(shards.write_locally, 4),
    "beam": lambda parts: shards.beam_writer(["--runner=DirectRunner"])(parts),
}


def content(split):
    """All that is known of a split and of its pictures."""
    return split.facts(), split.description, [split.record(i) for i in range(len(split))]


@pytest.mark.parametrize(
    "way",
    ["2", pytest.param("4", marks=pytest.mark.slow), pytest.param("beam", marks=NEEDS_BEAM)],
)
def test_all_ways_write_the_same(coco_mini, tmp_path, monkeypatch, way):
    monkeypatch.setattr(shards, "RECORDS_PER_FILE", 16)
    found = []
    for name in ("1", way):
        config = tiny_coco.data_config(tmp_path / name, coco_mini)
        split = pipeline.load_split(config, "val", "panoptic", write=WAYS[name])
        assert len(list(split.directory.glob("*.array_record-*-of-00004"))) == 4
        found.append(content(split))
    assert found[0] == found[1] and len(found[0][2]) == 60


def test_a_large_dataset_has_few_files(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "RECORDS_PER_FILE", 2)
    monkeypatch.setattr(shards, "MAX_FILES", 5)
    config = tiny_coco.data_config(tmp_path)
    split = pipeline.load_split(config, "train", "panoptic", write=WAYS["1"])
    assert len(list(split.directory.glob("*.array_record-*-of-00005"))) == 5 and len(split) == 24


def test_a_shard_may_lose_all_its_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "RECORDS_PER_FILE", 2)
    root = tiny_coco.write(tmp_path / "coco", splits=("train",))
    for index in (0, 1, 4):
        (root / f"train2017/train_{index}.jpg").unlink()
    config = tiny_coco.data_config(tmp_path / "prepared", root)
    split = pipeline.load_split(config, "train", "panoptic", write=WAYS["1"])
    assert [split.file_name(i) for i in range(2)] == ["train_2.jpg", "train_3.jpg"]
    assert len(split) == 2 and "3 problems" in split.description


def test_what_is_finished_is_kept(tmp_path, monkeypatch):
    """Of a preparation that was ended, the shards that were whole are not written again."""
    monkeypatch.setattr(shards, "RECORDS_PER_FILE", 2)
    config = tiny_coco.data_config(tmp_path / "prepared", tiny_coco.write(tmp_path / "coco"))

    def end_after_two(parts):
        yield from map(shards.write, parts[:2])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline.load_split(config, "train", "panoptic", write=end_after_two)
    read, seen = shards._read, []
    monkeypatch.setattr(shards, "_read", lambda *args: seen.append(args[1][0]) or read(*args))
    split = pipeline.load_split(config, "train", "panoptic", write=WAYS["1"])
    assert seen == ["train_4.jpg"] and len(split) == 5


def test_a_dataset_that_is_mended_begins_anew(tmp_path):
    root = tiny_coco.write(tmp_path / "coco", splits=("train",))
    shutil.move(root / "train2017", tmp_path / "elsewhere")
    config = tiny_coco.data_config(tmp_path / "prepared", root)
    with pytest.raises(UserError, match="the first of 5 problems"):
        pipeline.load_split(config, "train", "panoptic")
    shutil.move(tmp_path / "elsewhere", root / "train2017")
    assert len(pipeline.load_split(config, "train", "panoptic")) == 5


@NEEDS_BEAM
def test_what_a_cluster_does_wrong_is_one_line(tmp_path):
    source = by_name.find(tiny_coco.data_config(tmp_path), "train", "panoptic")
    with pytest.raises(UserError, match="cannot be written .*--runner=NoRunner: .*NoRunner"):
        prepared_split.prepare(source, tmp_path, shards.beam_writer(["--runner=NoRunner"]))
    assert list(tmp_path.glob("shapes/*/incomplete/parts/*.part"))


def test_absent_beam_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(UserError, match=r"Apache Beam is missing: pip install 'knet-jax\[beam\]'"):
        shards.beam_writer([])


def _prepare_slowly(root, data_dir, started):
    def read_picture(*args, read=examine.read_picture):
        time.sleep(0.05)
        return read(*args)

    os.setsid()
    examine.read_picture = read_picture
    shards.RECORDS_PER_FILE = 2
    started.put(True)
    config = tiny_coco.data_config(data_dir, root)
    pipeline.load_split(config, "train", "panoptic", write=WAYS["1"])


@pytest.mark.slow
def test_killed_ten_times_it_ends_whole(coco_mini, tmp_path):
    processes, rng = multiprocessing.get_context("forkserver"), random.Random(0)
    processes.set_forkserver_preload(["knet_jax.data.pipeline"])  # imports take longest
    written, progress = {}, set()
    for _ in range(10):
        started = processes.Queue()
        args = (coco_mini, tmp_path / "killed", started)
        process = processes.Process(target=_prepare_slowly, args=args)
        process.start()
        started.get(timeout=60)
        process.join(rng.uniform(0, 1))
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        parts = (tmp_path / "killed").glob("coco/*/incomplete/parts/*.found")
        before, written = written, {path: path.stat().st_mtime_ns for path in parts}
        assert written.items() >= before.items()  # what is done is not done again
        assert len(list((tmp_path / "killed").glob("coco/*/incomplete/parts/*.draft"))) <= 1
        progress.add(len(written))
    assert len(progress) > 3
    splits = [
        pipeline.load_split(tiny_coco.data_config(tmp_path / name, coco_mini), "train", "panoptic")
        for name in ("killed", "whole")
    ]
    assert content(splits[0]) == content(splits[1])
    assert not list(tmp_path.glob("*/coco/*/incomplete"))
