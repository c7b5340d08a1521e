"""Splits are prepared once and read by position; batches come in an order that nothing changes."""

import contextlib
import io
import itertools
import json
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from pathlib import Path

import cv2
import jax
import numpy as np
import pytest
import tiny_coco

from knet_jax.data import batches, pipeline, recipes, records, sampler, shards, transforms
from knet_jax.data.sources import shapes as shapes_module
from knet_jax.segmentation import class_lists
from knet_jax.segmentation.segments import Categories, PanopticMap
from knet_jax.structs import EMPTY
from knet_jax.system import workers
from knet_jax.system.errors import UserError

TASKS = ("panoptic", "instance", "semantic")


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    """A config, and its prepared training split for each task."""
    config = tiny_coco.data_config(tmp_path_factory.mktemp("shapes"))
    return config, {task: pipeline.load_split(config, "train", task) for task in TASKS}


@pytest.fixture
def shapes(splits):
    """A config and its prepared training split, panoptic."""
    config, found = splits
    return config.copy_and_resolve_references(), found["panoptic"]


def take(count, *args, **kwargs):
    return list(itertools.islice(pipeline.train_batches(*args, **kwargs), count))


def assert_equal(a, b):
    for (path, x), y in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y, err_msg=str(path))


# Datasets and splits.


def test_classes_of_two_splits_are_compared():
    a = Categories(("dog", "sky"), (1, 2), 1)
    class_lists.check_same_classes(a, a)
    for b, message in (
        (a._replace(names=("dog", "sea")), r"first \('sky', 2\) and \('sea', 2\)"),
        (Categories(("dog",), (1,), 1), r"first \('sky', 2\) and None"),
        (a._replace(num_things=2), "first 1 and 2"),
    ):
        with pytest.raises(UserError, match=message):
            class_lists.check_same_classes(a, b)


def test_report_counts_classes_crowds_and_problems(tmp_path, capsys, monkeypatch):
    root = tiny_coco.write(tmp_path / "coco", splits=("train",))
    (root / "train2017" / "train_1.jpg").unlink()
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "elsewhere"))
    split = pipeline.load_split(tiny_coco.data_config("", root), "train", "panoptic")
    assert split.directory.is_relative_to(tmp_path / "elsewhere")
    out = capsys.readouterr().out
    assert "4 images, 16 segments, 4 crowds" in out
    assert "cat    thing         4 + 4 crowd" in out
    assert "1 problems:" in out and "train_1.jpg is missing" in out
    pipeline.load_split(tiny_coco.data_config("", root), "train", "panoptic")
    assert "prepared already" in capsys.readouterr().out


def test_slices(shapes):
    config, whole = shapes
    part = pipeline.load_split(config, "train[4:7]", "panoptic")
    assert len(part) == 3
    np.testing.assert_array_equal(part.sizes, whole.sizes[4:7])
    np.testing.assert_array_equal(part.num_things, whole.num_things[4:7])
    assert [part.file_name(i) for i in range(3)] == [whole.file_name(i) for i in range(4, 7)]
    for spec, message in (
        *((spec, "must be a name or a slice") for spec in ("", "a b", "train[", "train+val")),
        *((spec, "cannot be read") for spec in ("train[x]", "train[30:]")),
        *((spec, "holds no picture") for spec in ("train[3:3]", "train[5:3]", "train[24:]")),
    ):
        with pytest.raises(UserError, match=f"^config.data: split .* {message}"):
            pipeline.load_split(config, spec, "panoptic")


def test_records_are_written_in_order_to_several_files(tmp_path, monkeypatch):
    for records_per_file in (8, 23):
        monkeypatch.setattr(shards, "RECORDS_PER_FILE", records_per_file)
        config = tiny_coco.data_config(tmp_path / str(records_per_file))
        split = pipeline.load_split(config, "train", "panoptic")
        files = list(split.directory.glob("*array_record*"))
        assert len(files) == -(-24 // records_per_file)
        names = [split.file_name(i) for i in range(len(split))]
        assert names == [f"train_{i:06d}.png" for i in range(24)]
    assert "tensorflow" not in sys.modules
    folder = split.directory
    sound = {path: path.read_bytes() for path in folder.iterdir()}
    for path, content in sound.items():
        for harm in (b"", content[:-40], b"\0" * len(content), None):
            path.unlink() if harm is None else path.write_bytes(harm)
            try:
                damaged = pipeline.load_split(config, "train", "panoptic")
                [damaged.record(i) for i in range(len(damaged))]
                assert path.name == "features.json" and harm  # whose end says nothing
            except UserError as error:
                assert f"in {folder} is damaged; remove that folder" in str(error)
            path.write_bytes(content)
    # What leaves everything in order is noticed too.
    np.save(folder / "things.npy", split.num_things[::-1].copy())
    with pytest.raises(UserError, match="is damaged; remove that folder"):
        pipeline.load_split(config, "train", "panoptic")
    # Older ones hold all in their metadata, the oldest without a digest.
    path = folder / "metadata.json"
    metadata = json.loads(sound[path])
    del metadata["digest"]
    for name in ("sizes", "things"):
        metadata[name] = np.load(io.BytesIO(sound[folder / f"{name}.npy"])).tolist()
        (folder / f"{name}.npy").unlink()
    for digest in ({}, {"digest": records.digest(metadata, [])}):
        path.write_text(json.dumps(metadata | digest))
        older = pipeline.load_split(config, "train", "panoptic")
        assert older.facts() == split.facts() and older.description == split.description


def test_names_and_features_of_what_is_prepared(splits):
    """What was prepared by other versions is found again by these, and read."""
    config, found = splits
    directories = {task: split.directory for task, split in found.items()}
    for task, directory in directories.items():
        assert directory == Path(config.data_dir) / f"shapes/{task}-train-24-64-96/1.0.0"
    counts = {task: (len(s.categories.names), s.categories.num_things) for task, s in found.items()}
    assert counts == {"panoptic": (9, 5), "instance": (5, 5), "semantic": (9, 0)}
    assert records.config_name("panoptic", "val", ("/a", 3, 5)) == "panoptic-val-ce640e27e2"


def test_two_processes_may_prepare_at_once(tmp_path, monkeypatch):
    config = tiny_coco.data_config(tmp_path)
    draw = shapes_module.draw

    def draw_late(*args):
        # While this process still draws, another one finishes.
        monkeypatch.setattr(shapes_module, "draw", draw)
        assert len(pipeline.load_split(config, "train", "panoptic")) == 24
        return draw(*args)

    monkeypatch.setattr(shapes_module, "draw", draw_late)
    assert len(pipeline.load_split(config, "train", "panoptic")) == 24


def test_data_dir_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"data\.data_dir: split 'train' cannot be written"):
        pipeline.load_split(tiny_coco.data_config(tmp_path / "file"), "train", "panoptic")


# The order of batches.


def test_seed_start_and_processes(splits):
    """A run goes on exactly where it stopped; processes have their rows of the same batches."""
    config, found = splits
    for split in found.values():
        steps = 2 * pipeline.steps_per_epoch(split, config, 4) + 3
        whole = take(steps, split, config, 4, seed=2, start=0)
        for step in (1, steps - 2):
            rest = take(steps - step, split, config, 4, seed=2, start=4 * step)
            assert_equal(rest, whole[step:])
        other = take(3, split, config, 4, seed=3, start=0)
        assert any(np.any(x.id != y.id) for x, y in zip(whole, other))
        for index in range(2):
            part = take(3, split, config, 4, seed=2, start=4, process_index=index, process_count=2)
            rows = slice(2 * index, 2 * index + 2)
            assert_equal(part, jax.tree.map(lambda x, rows=rows: x[rows], whole[1:4]))


def test_an_epoch_shows_every_picture_at_random(shapes):
    config, split = shapes
    steps = pipeline.steps_per_epoch(split, config, 1)
    assert steps == len(split)
    result = take(3 * steps, split, config, 1, seed=0, start=0)
    ids = [int(batch.id[0]) for batch in result]
    assert sorted(ids[:steps]) == list(range(len(split)))
    epochs = sampler.EpochSampler(recipes.find("panoptic", config).groups(split), 1, seed=0)
    assert ids == [epochs.batch(index)[1][0] for index in range(3 * steps)]
    flipped, sides = [], set()
    for batch in result:
        height, width = batch.size[0].tolist()
        sides.add(min(height, width))
        image = cv2.resize(split.image(batch.id[0]), (width, height))
        seen = batch.image[0, :height, :width]
        assert np.array_equal(seen, image) or np.array_equal(seen, image[:, ::-1])
        flipped.append(np.array_equal(seen, image[:, ::-1]))
    assert 0.3 < np.mean(flipped) < 0.7
    assert min(sides) >= 64 and max(sides) <= 96 and len(sides) > 10


def test_workers_change_nothing(shapes):
    config, split = shapes
    expected = take(5, split, config, 4, seed=5, start=8)
    config.num_workers = 2
    assert_equal(take(5, split, config, 4, seed=5, start=8), expected)


# Evaluation.


def check_evaluation(split, results):
    """Every picture once, whole, with its truth; flat canvases first."""
    seen, tall, kept = [], [], []
    for (batch,), truths in results:
        real = batch.id[batch.id != EMPTY]
        assert [id for id, _ in truths] == real.tolist()
        assert not batch.image[batch.id == EMPTY].any() and batch.targets is None
        tall.append(batch.image.shape[1] > batch.image.shape[2])
        for place, (id, truth) in enumerate(truths):
            size = transforms.resized_size(truth.ids.shape, 96, 128)
            assert tuple(batch.size[place]) == size
            resized = cv2.resize(split.image(id), size[::-1])
            np.testing.assert_array_equal(batch.image[place, : size[0], : size[1]], resized)
            assert (truth.ids.shape[0] > truth.ids.shape[1]) == tall[-1]
        seen += real.tolist()
        kept += truths
    assert sorted(seen) == list(range(len(split)))
    assert tall == sorted(tall) and len(set(tall)) == 2
    for id, truth in kept:  # after the batches are gone
        expected = split.truth(id)
        assert isinstance(truth, PanopticMap) and truth.segments == expected.segments
        np.testing.assert_array_equal(truth.ids, expected.ids)


def test_evaluation_shows_everything_once(shapes):
    config, split = shapes
    config.eval_multiple = 0
    check_evaluation(split, pipeline.eval_batches(split, config, 5))
    config.num_workers = 1
    check_evaluation(split, pipeline.eval_batches(split, config, 5))


def test_parts_of_an_evaluation(splits):
    config, found = splits
    split = found["panoptic"]
    ids = [id for _, truths in pipeline.eval_batches(split, config, 4, limit=7) for id, _ in truths]
    assert sorted(ids) == list(range(7))
    for split in found.values():
        whole = pipeline.eval_batches(split, config, 4)
        parts = (
            pipeline.eval_batches(split, config, 4, process_index=i, process_count=2)
            for i in range(2)
        )
        for ((batch,), truths), ((a,), of_a), ((b,), of_b) in zip(whole, *parts, strict=True):
            np.testing.assert_array_equal(batch.image, np.concatenate([a.image, b.image]))
            assert [id for id, _ in truths] == [id for id, _ in of_a + of_b]
    with pytest.raises(UserError, match="config.eval.batch_size 4 .* 3 processes"):
        pipeline.eval_batches(split, config, 4, process_count=3)


def test_other_ratios_show_the_same_pictures(splits):
    config, split = splits[0], splits[1]["semantic"]
    for ratio in (0.5, 1.5):
        plain = pipeline.eval_batches(split, config, 4)
        scaled = pipeline.eval_batches(split, config, 4, ratios=(1.0, ratio))
        for ((a,), truths_a), ((same, b), truths_b) in zip(plain, scaled, strict=True):
            jax.tree.map(np.testing.assert_array_equal, (a, truths_a), (same, truths_b))
            np.testing.assert_array_equal(a.id, b.id)
            np.testing.assert_allclose(b.size, ratio * a.size, atol=1.5)
            assert b.image.shape[1] % 32 == b.image.shape[2] % 32 == 0


# Broken pictures.


def break_pictures(monkeypatch, names):
    """Lets the pictures of these names turn out to be broken when they are decoded."""
    sound = batches._load

    def load(split, record):
        if record.file_name in names:
            record = record._replace(image=record.image[:200])
        return sound(split, record)

    monkeypatch.setattr(batches, "_load", load)


def test_broken_picture_is_replaced_and_named(shapes, monkeypatch, caplog):
    config, split = shapes
    landscape = np.flatnonzero(split.sizes[:, 1] >= split.sizes[:, 0])
    broken, successor = int(landscape[-1]), int(landscape[0])
    steps = 3 * pipeline.steps_per_epoch(split, config, 4)
    sound = take(steps, split, config, 4, seed=0, start=0)
    name = split.file_name(broken)
    break_pictures(monkeypatch, {name})
    with caplog.at_level(logging.WARNING, "knet_jax"):
        result = take(steps, split, config, 4, seed=0, start=0)
    times = 0
    for expected, batch in zip(sound, result):
        hit = expected.id == broken
        np.testing.assert_array_equal(batch.id, np.where(hit, successor, expected.id))
        np.testing.assert_array_equal(batch.image[~hit], expected.image[~hit])
        times += hit.sum()
    assert times >= 3
    assert [r.message for r in caplog.records] == [f"broken picture {name}: cannot be decoded"]
    assert_equal(take(4, split, config, 4, seed=0, start=8), result[2:6])

    caplog.clear()
    with caplog.at_level(logging.WARNING, "knet_jax"):
        results = list(pipeline.eval_batches(split, config, 4))
    ids = [id for _, truths in results for id, _ in truths]
    assert sorted(ids) == sorted(set(range(len(split))) - {broken})
    assert all([id for id, _ in t] == b.id[b.id != EMPTY].tolist() for (b,), t in results)
    assert len(caplog.records) == 1 and name in caplog.text


def test_the_end_of_a_worker_is_one_line(shapes):
    config, _ = shapes
    config.num_workers = 1
    recipe = recipes.find("panoptic", config)

    class Killed:
        def to_iter_dataset(self, options):
            return self

        def mp_prefetch(self, options, worker_init_fn):
            yield batches.Prepared((), [], {})
            raise RuntimeError("terminated unexpectedly with exit code -9")

    iterator = pipeline._run_workers(Killed(), recipe, 24)
    next(iterator)
    with pytest.raises(UserError, match="was ended: .* code -9 .* config.data.num_workers is 1"):
        next(iterator)


def test_too_many_broken_pictures_stop_a_run(shapes, monkeypatch):
    config, split = shapes
    names = [split.file_name(i) for i in range(len(split))]
    with monkeypatch.context() as patch:
        break_pictures(patch, names[:5])  # one percent of 500, however often they are seen
        assert len(take(60, split, config, 4, seed=0, start=0)) == 60
        break_pictures(patch, names[:6])
        with pytest.raises(UserError, match=r"6 of 24 pictures .* config.data.max_broken_share"):
            take(1000, split, config, 4, seed=0, start=0)
    break_pictures(monkeypatch, names)
    with pytest.raises(UserError, match="pictures are broken"):
        take(1, split, config, 4, seed=0, start=0)
    with pytest.raises(UserError, match="pictures are broken"):
        list(pipeline.eval_batches(split, config, 4))


# Processes that are killed or signalled.


@contextlib.contextmanager
def process(target, *args):
    """A process with a queue as its last argument, killed at the end."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    started = context.Process(target=target, args=(*args, queue))
    started.start()
    try:
        yield started, queue
    finally:
        started.kill()
        started.join()


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _feed_for_ever(config, pids):
    config.num_workers = 2
    split = pipeline.load_split(config, "train", "panoptic")
    for _ in pipeline.train_batches(split, config, 4, seed=0, start=0):
        if pids.empty():
            for child in multiprocessing.active_children():
                pids.put(child.pid)


@pytest.mark.slow
def test_workers_end_with_a_parent_that_is_killed(shapes):
    with process(_feed_for_ever, shapes[0]) as (_, pids):
        workers = [pids.get(timeout=120) for _ in range(2)]
        assert all(is_alive(pid) for pid in workers)
    deadline = time.monotonic() + 60
    while any(is_alive(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(is_alive(pid) for pid in workers)


def _feed_in_a_storm(config, counts):
    """Signals to the whole group, from before its workers start until they have all given batches."""
    os.setsid()
    for signum in workers.GROUP_SIGNALS:
        signal.signal(signum, lambda *_: None)
    done = threading.Event()

    def signal_all():
        while not done.wait(0.05):
            for signum in workers.GROUP_SIGNALS:
                os.killpg(0, signum)

    config.num_workers = 2
    split = pipeline.load_split(config, "train", "panoptic")
    threading.Thread(target=signal_all).start()
    counts.put(sum(1 for _ in take(4, split, config, 4, seed=0, start=0)))
    done.set()


@pytest.mark.slow
def test_workers_start_through_signals_to_the_whole_group(shapes):
    with process(_feed_in_a_storm, shapes[0]) as (_, counts):
        assert counts.get(timeout=120) == 4
