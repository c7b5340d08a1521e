import itertools
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

from knet_jax.data import batches, pipeline, records, transforms
from knet_jax.data.sources import shapes as shapes_module
from knet_jax.segmentation import class_lists, image_files
from knet_jax.segmentation.segments import Categories, PanopticMap
from knet_jax.structs import EMPTY


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """A config and its prepared training split."""
    config = tiny_coco.data_config(tmp_path_factory.mktemp("shapes"))
    return config, pipeline.load_split(config, "train", "panoptic")


@pytest.fixture(scope="module", params=["panoptic", "instance", "semantic"])
def any_task(request, tmp_path_factory):
    """A config and its prepared training split, for each task."""
    config = tiny_coco.data_config(tmp_path_factory.mktemp(request.param))
    return config, pipeline.load_split(config, "train", request.param)


@pytest.fixture(scope="module")
def semantic(tmp_path_factory):
    """A config and its prepared training split, of maps of classes."""
    config = tiny_coco.data_config(tmp_path_factory.mktemp("semantic_only"))
    return config, pipeline.load_split(config, "train", "semantic")


@pytest.fixture
def tiny(tmp_path):
    """A config of a small dataset in COCO's layout, five pictures a split."""
    root = tiny_coco.write(tmp_path / "coco")
    return tiny_coco.data_config(tmp_path / "prepared", root)


def take(count, *args, **kwargs):
    return list(itertools.islice(pipeline.train_batches(*args, **kwargs), count))


def part_of(batch, rows):
    return jax.tree.map(lambda x: x[rows], batch)


def assert_equal(a, b):
    assert len(a) == len(b)
    for (batch_a, skipped_a), (batch_b, skipped_b) in zip(a, b):
        assert skipped_a == skipped_b
        leaves = zip(jax.tree.leaves_with_path(batch_a), jax.tree.leaves(batch_b), strict=True)
        for (path, x), y in leaves:
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(x, y, err_msg=str(path))


def _feed_for_ever(config, pids):
    config.num_workers = 2
    split = pipeline.load_split(config, "train", "panoptic")
    for _ in pipeline.train_batches(split, config, 4, seed=0, start=0):
        if not pids.empty():
            continue
        for child in multiprocessing.active_children():
            pids.put(child.pid)


def test_workers_end_with_a_parent_that_is_killed(shapes):
    context = multiprocessing.get_context("spawn")
    pids = context.Queue()
    process = context.Process(target=_feed_for_ever, args=(shapes[0], pids))
    process.start()
    try:
        workers = [pids.get(timeout=120) for _ in range(2)]
        assert all(is_alive(pid) for pid in workers)
    finally:
        process.kill()
        process.join()
    deadline = time.monotonic() + 60
    while any(is_alive(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(is_alive(pid) for pid in workers)


def _feed_in_a_storm(config, counts):
    """Signals to the whole group, from before its workers start until they have all given batches."""
    os.setsid()
    for signum in pipeline.GROUP_SIGNALS:
        signal.signal(signum, lambda *_: None)
    done = threading.Event()

    def signal_all():
        while not done.wait(0.05):
            for signum in pipeline.GROUP_SIGNALS:
                os.killpg(0, signum)

    config.num_workers = 2
    split = pipeline.load_split(config, "train", "panoptic")
    threading.Thread(target=signal_all).start()
    counts.put(sum(1 for _ in take(4, split, config, 4, seed=0, start=0)))
    done.set()


def test_workers_start_through_signals_to_the_whole_group(shapes):
    context = multiprocessing.get_context("spawn")
    counts = context.Queue()
    process = context.Process(target=_feed_in_a_storm, args=(shapes[0], counts))
    process.start()
    try:
        assert counts.get(timeout=120) == 4
    finally:
        process.kill()
        process.join()


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# Preparation.


def test_coco_survives_preparation(coco_mini, tmp_path, capsys):
    config = tiny_coco.data_config(tmp_path, coco_mini)
    split = pipeline.load_split(config, "val", "panoptic")
    assert len(split) == 60
    out = capsys.readouterr().out
    assert "60 images" in out and "0 problems" in out
    pictures, folder = coco_mini / "val2017", coco_mini / "annotations" / "panoptic_val2017"
    for index in range(0, 60, 7):
        name = split.file_name(index)
        assert split.image_id(index) == int(name.removesuffix(".jpg"))
        np.testing.assert_array_equal(split.image(index)[..., ::-1], cv2.imread(pictures / name))
        colors = cv2.imread(folder / name.replace("jpg", "png")).astype(int)
        truth = split.truth(index)
        assert truth.ids.dtype == np.int32
        np.testing.assert_array_equal(truth.ids, colors @ [65536, 256, 1])
        assert {segment.id for segment in truth.segments} == set(np.unique(truth.ids)) - {0}
        assert tuple(split.sizes[index]) == truth.ids.shape

    pipeline.load_split(config, "val", "panoptic")
    assert "prepared already" in capsys.readouterr().out


def test_unlisted_ids_are_void_in_truth(tiny):
    def change(content):
        content["annotations"][0]["segments_info"].pop(1)

    tiny_coco.edit(Path(tiny.root), change)
    truth = pipeline.load_split(tiny, "train", "panoptic").truth(0)
    _, ids, segments = tiny_coco.draw(0, 60, 80)
    np.testing.assert_array_equal(truth.ids, np.where(ids == segments[1]["id"], 0, ids))


def test_report_counts_classes_crowds_and_problems(tiny, capsys):
    (Path(tiny.root) / "train2017" / "train_1.jpg").unlink()
    pipeline.prepare(tiny, "train", "panoptic")
    out = capsys.readouterr().out
    assert "4 images, 16 segments, 4 crowds" in out
    assert "cat    thing         4 + 4 crowd" in out
    assert "1 problems:" in out and "train_1.jpg is missing" in out


def test_slices(shapes):
    config, whole = shapes
    part = pipeline.load_split(config, "train[4:7]", "panoptic")
    assert len(part) == 3
    np.testing.assert_array_equal(part.sizes, whole.sizes[4:7])
    np.testing.assert_array_equal(part.num_things, whole.num_things[4:7])
    assert [part.file_name(i) for i in range(3)] == [whole.file_name(i) for i in range(4, 7)]


@pytest.mark.parametrize(
    "spec",
    [
        "",
        "a b",
        "train[",
        "train[x]",
        "train+val",
        "train[:1]+train[2:3]",
        "train[3:3]",
        "train[30:]",
        "train[:3",
    ],
)
def test_bad_splits_are_named(shapes, spec):
    with pytest.raises(ValueError, match="config.data"):
        pipeline.load_split(shapes[0], spec, "panoptic")


def test_bad_dataset_is_named(shapes):
    config = shapes[0].copy_and_resolve_references()
    config.dataset = "voc"
    with pytest.raises(ValueError, match="config.data.dataset is 'voc'; accepted: .*shapes"):
        pipeline.prepare(config, "train", "panoptic")


def test_roots_do_not_collide(tmp_path):
    prepared = set()
    for name, sizes in (("a", [(60, 80)]), ("b", [(60, 80), (80, 60)])):
        root = tiny_coco.write(tmp_path / name, sizes)
        config = tiny_coco.data_config(tmp_path / "prepared", root)
        assert len(pipeline.load_split(config, "train", "panoptic")) == len(sizes)
        prepared.add(pipeline.prepare(config, "train", "panoptic"))
        prepared.add(pipeline.prepare(config, "val", "panoptic"))
    assert len(prepared) == 4


def test_different_categories_are_named():
    a = Categories(("dog", "sky"), (1, 2), 1)
    class_lists.check_same_classes(a, a)
    with pytest.raises(ValueError, match=r"first \('sky', 2\) and \('sea', 2\)"):
        class_lists.check_same_classes(a, a._replace(names=("dog", "sea")))
    with pytest.raises(ValueError, match=r"first \('sky', 2\) and None"):
        class_lists.check_same_classes(a, Categories(("dog",), (1,), 1))
    with pytest.raises(ValueError, match="first 1 and 2"):
        class_lists.check_same_classes(a, a._replace(num_things=2))


@pytest.mark.parametrize("records_per_file", [1, 8, 24, 23])
def test_records_are_written_in_order_to_several_files(tmp_path, monkeypatch, records_per_file):
    monkeypatch.setattr(records, "RECORDS_PER_FILE", records_per_file)
    config = tiny_coco.data_config(tmp_path)
    files = list(pipeline.prepare(config, "train", "panoptic").glob("*array_record*"))
    assert len(files) == -(-24 // records_per_file)
    split = pipeline.load_split(config, "train", "panoptic")
    names = [split.file_name(i) for i in range(len(split))]
    assert names == [f"train_{i:06d}.png" for i in range(24)]
    assert "tensorflow" not in sys.modules


def _prepare_slowly(config):
    def draw(*args, draw=shapes_module.draw):
        time.sleep(0.2)
        return draw(*args)

    shapes_module.draw = draw
    pipeline.prepare(config, "train", "panoptic")


def test_killed_preparation_starts_anew(tmp_path):
    config = tiny_coco.data_config(tmp_path)
    process = multiprocessing.get_context("spawn").Process(target=_prepare_slowly, args=(config,))
    process.start()
    deadline = time.time() + 60
    while not list(tmp_path.glob("shapes/*/*/*")) and time.time() < deadline:
        time.sleep(0.02)
    time.sleep(0.5)
    assert process.is_alive()
    process.kill()
    process.join()
    assert list(tmp_path.glob("shapes/*/incomplete*/*"))
    assert not list(tmp_path.glob("shapes/*/1.0.0"))
    assert len(pipeline.load_split(config, "train", "panoptic")) == 24


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


def test_deleted_files_are_named(tmp_path):
    config = tiny_coco.data_config(tmp_path)
    [file] = pipeline.prepare(config, "train", "panoptic").glob("*array_record*")
    file.unlink()
    with pytest.raises(ValueError, match=r"config\.data\.data_dir: .* is missing, remove"):
        pipeline.load_split(config, "train", "panoptic")


def test_data_dir_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        ValueError, match=r"config\.data\.data_dir: split 'train' cannot be written"
    ):
        pipeline.prepare(tiny_coco.data_config(tmp_path / "file"), "train", "panoptic")


def test_data_dir_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "elsewhere"))
    directory = pipeline.prepare(tiny_coco.data_config(""), "train", "panoptic")
    assert directory.is_relative_to(tmp_path / "elsewhere") and directory.is_dir()


# Batches.


def test_batch_holds_what_structs_say(tiny):
    tiny.flip = 0.0
    split = pipeline.load_split(tiny, "train", "panoptic")
    (batch, skipped), *_ = take(1, split, tiny, 2, seed=0, start=0)
    assert skipped == ()
    portrait = batch.original_size[0, 0] > batch.original_size[0, 1]
    canvas = (128, 96) if portrait else (96, 128)
    assert batch.image.shape == (2, *canvas, 3) and batch.image.dtype == np.uint8
    assert batch.targets.segment_map.shape == (2, canvas[0] // 2, canvas[1] // 2)
    assert batch.targets.segment_map.dtype == np.uint8
    assert batch.targets.labels.shape == (2, 8 + 2) and batch.targets.labels.dtype == np.int32
    for place, index in enumerate(batch.id):
        height, width = batch.size[place]
        assert tuple(batch.original_size[place]) == tuple(split.sizes[index])
        assert not batch.image[place, height:].any() and not batch.image[place, :, width:].any()
        resized = cv2.resize(split.image(index), (int(width), int(height)))
        np.testing.assert_array_equal(batch.image[place, :height, :width], resized)
        truth = split.truth(index)
        dog, cat = truth.segments[2:4]
        areas = [np.sum(truth.ids == s.id) for s in (dog, cat)]
        order = [dog, cat] if areas[0] >= areas[1] else [cat, dog]
        labels = [s.label for s in order] + [EMPTY] * 6 + [2, 3]
        assert batch.targets.labels[place].tolist() == labels
        # Slots 1 and 2, grass is the first and sky the second stuff class; the crowd is nothing.
        values = {order[0].id: 1, order[1].id: 2}
        values |= {truth.segments[0].id: 1 + 8 + 1, truth.segments[1].id: 1 + 8}
        sampled = transforms.sample_segments(
            image_files.segment_colors(truth.ids),
            transforms.whole((int(height), int(width))),
            canvas,
            list(values),
            list(values.values()),
            np.uint8,
        )
        np.testing.assert_array_equal(batch.targets.segment_map[place], sampled)


def test_many_slots_need_sixteen_bits(tiny):
    tiny.max_things = 300
    split = pipeline.load_split(tiny, "train", "panoptic")
    [(batch, _)] = take(1, split, tiny, 1, seed=0, start=0)
    segment_map = batch.targets.segment_map
    assert segment_map.dtype == np.uint16 and segment_map.max() == 1 + 300 + 1


def test_more_things_than_slots(tiny, caplog):
    tiny.max_things = 1
    split = pipeline.load_split(tiny, "train", "panoptic")
    with caplog.at_level(logging.WARNING, "knet_jax"):
        result = take(6, split, tiny, 1, seed=0, start=0)
    [warning] = [r.message for r in caplog.records if r.name.startswith("knet_jax")]
    assert warning.startswith("5 of 5 pictures have more than config.data.max_things = 1 things")
    for batch, _ in result:
        truth = split.truth(int(batch.id[0]))
        largest = max(truth.segments[2:4], key=lambda s: np.sum(truth.ids == s.id))
        assert batch.targets.labels[0].tolist() == [largest.label, 2, 3]
        assert set(np.unique(batch.targets.segment_map)) <= {0, 1, 2, 3}


def test_picture_without_things(tmp_path):
    def change(content):
        for annotation in content["annotations"]:
            del annotation["segments_info"][2:]

    root = tiny_coco.write(tmp_path / "coco")
    tiny_coco.edit(root, change)
    config = tiny_coco.data_config(tmp_path / "prepared", root)
    [(batch, _)] = take(
        1, pipeline.load_split(config, "train", "panoptic"), config, 2, seed=0, start=0
    )
    assert np.all(batch.targets.labels == [EMPTY] * 8 + [2, 3])
    assert set(np.unique(batch.targets.segment_map)) == {0, 9, 10}


def test_flip_and_scales_are_used(shapes):
    config, split = shapes
    result = take(40, split, config, 2, seed=0, start=0)
    flipped, heights = [], set()
    for batch, _ in result:
        for place, index in enumerate(batch.id):
            height, width = batch.size[place]
            heights.add(int(min(height, width)))
            image = cv2.resize(split.image(index), (int(width), int(height)))
            seen = batch.image[place, :height, :width]
            assert np.array_equal(seen, image) or np.array_equal(seen, image[:, ::-1])
            flipped.append(np.array_equal(seen, image[:, ::-1]))
    assert 0.3 < np.mean(flipped) < 0.7
    assert min(heights) >= 64 and max(heights) <= 96 and len(heights) > 10


def test_worker_count_changes_nothing(any_task):
    config, split = any_task
    config = config.copy_and_resolve_references()
    expected = take(7, split, config, 4, seed=5, start=8)
    for config.num_workers in (1, 3):
        assert_equal(take(7, split, config, 4, seed=5, start=8), expected)


def test_seed_changes_the_order(any_task):
    config, split = any_task
    a, b = (take(3, split, config, 4, seed=seed, start=0) for seed in (0, 1))
    assert any(np.any(x.id != y.id) for (x, _), (y, _) in zip(a, b))


def test_resuming_anywhere_equals_going_on(any_task):
    config, split = any_task
    steps = 2 * pipeline.steps_per_epoch(split, config, 4) + 3
    whole = take(steps, split, config, 4, seed=2, start=0)
    for step in (1, 5, steps - 2):
        assert_equal(take(steps - step, split, config, 4, seed=2, start=4 * step), whole[step:])
    with pytest.raises(ValueError, match="6 examples .* config.train.batch_size 4"):
        pipeline.train_batches(split, config, 4, seed=2, start=6)


def test_negative_seed_is_named(shapes):
    with pytest.raises(ValueError, match="config.seed -1"):
        pipeline.train_batches(shapes[1], shapes[0], 4, seed=-1, start=0)


def test_epoch_length(shapes):
    config, split = shapes
    steps = pipeline.steps_per_epoch(split, config, 1)
    assert steps == len(split)
    ids = [int(batch.id[0]) for batch, _ in take(steps, split, config, 1, seed=0, start=0)]
    assert sorted(ids) == list(range(len(split)))


def test_processes_share_a_batch(any_task):
    config, split = any_task
    whole = take(5, split, config, 4, seed=3, start=4)
    for index in range(2):
        part = take(5, split, config, 4, seed=3, start=4, process_index=index, process_count=2)
        rows = slice(2 * index, 2 * index + 2)
        expected = [(part_of(batch, rows), skipped) for batch, skipped in whole]
        assert_equal(part, expected)
    with pytest.raises(ValueError, match="config.train.batch_size 4 .* 3 processes"):
        pipeline.train_batches(split, config, 4, seed=3, start=0, process_count=3)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_evaluation_shows_everything_once(shapes, num_workers):
    config, split = shapes
    config = config.copy_and_resolve_references()
    config.num_workers = num_workers
    seen, tall = [], []
    for (batch,), truths in pipeline.eval_batches(split, config, 5):
        real = batch.id[batch.id != EMPTY]
        assert [id for id, _ in truths] == real.tolist()
        assert not batch.image[batch.id == EMPTY].any()
        assert batch.targets is None
        tall.append(batch.image.shape[1] > batch.image.shape[2])
        for place, (id, truth) in enumerate(truths):
            assert isinstance(truth, PanopticMap)
            expected = split.truth(id)
            np.testing.assert_array_equal(truth.ids, expected.ids)
            assert truth.segments == expected.segments
            size = transforms.resized_size(truth.ids.shape, 96, 128)
            assert tuple(batch.size[place]) == size
            resized = cv2.resize(split.image(id), size[::-1])
            np.testing.assert_array_equal(batch.image[place, : size[0], : size[1]], resized)
            assert (truth.ids.shape[0] > truth.ids.shape[1]) == tall[-1]
        seen += real.tolist()
    assert sorted(seen) == list(range(len(split)))
    assert tall == sorted(tall) and len(set(tall)) == 2


@pytest.mark.parametrize("ratio", [0.5, 1.5])
def test_other_ratios_show_the_same_pictures(semantic, ratio):
    config, split = semantic
    plain = pipeline.eval_batches(split, config, 4)
    scaled = pipeline.eval_batches(split, config, 4, ratios=(1.0, ratio))
    for ((a,), truths_a), ((same, b), truths_b) in zip(plain, scaled, strict=True):
        jax.tree.map(np.testing.assert_array_equal, (a, truths_a), (same, truths_b))
        np.testing.assert_array_equal(a.id, b.id)
        np.testing.assert_allclose(b.size, ratio * a.size, atol=1.5)
        assert b.image.shape[1] % 32 == b.image.shape[2] % 32 == 0


def test_truths_of_workers_are_kept(any_task):
    config, split = any_task
    config = config.copy_and_resolve_references()
    config.num_workers = 1
    kept = [pair for _, truths in pipeline.eval_batches(split, config, 4) for pair in truths]
    assert sorted(id for id, _ in kept) == list(range(len(split)))
    for id, truth in kept:
        jax.tree.map(np.testing.assert_array_equal, truth, split.truth(id))


def test_evaluation_of_a_few(shapes):
    config, split = shapes
    ids = [id for _, truths in pipeline.eval_batches(split, config, 4, limit=7) for id, _ in truths]
    assert sorted(ids) == list(range(7))


def test_processes_share_an_evaluation(any_task):
    config, split = any_task
    whole = list(pipeline.eval_batches(split, config, 4))
    parts = [
        list(pipeline.eval_batches(split, config, 4, process_index=i, process_count=2))
        for i in range(2)
    ]
    assert len(parts[0]) == len(parts[1]) == len(whole)
    for ((batch,), truths), ((first,), of_first), ((second,), of_second) in zip(whole, *parts):
        np.testing.assert_array_equal(batch.image, np.concatenate([first.image, second.image]))
        assert [id for id, _ in truths] == [id for id, _ in of_first + of_second]


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
    for (expected, _), (batch, skipped) in zip(sound, result):
        hit = expected.id == broken
        np.testing.assert_array_equal(batch.id, np.where(hit, successor, expected.id))
        np.testing.assert_array_equal(batch.image[~hit], expected.image[~hit])
        assert skipped == (name,) * hit.sum()
        times += hit.sum()
    assert times >= 3
    assert [r.message for r in caplog.records] == [f"broken picture {name}: cannot be decoded"]
    assert_equal(take(4, split, config, 4, seed=0, start=8), result[2:6])


def test_too_many_broken_pictures_stop_training(shapes, monkeypatch):
    config, split = shapes
    names = {split.file_name(i) for i in range(3)}
    break_pictures(monkeypatch, names)
    with pytest.raises(ValueError, match=r"6 of \d+ pictures .* config.data.max_broken_share"):
        take(1000, split, config, 4, seed=0, start=0)
    config = config.copy_and_resolve_references()
    config.max_broken_share = 1.0
    assert len(take(40, split, config, 4, seed=0, start=0)) == 40


def test_all_broken_ends_in_an_error(shapes, monkeypatch):
    config, split = shapes
    break_pictures(monkeypatch, {split.file_name(i) for i in range(len(split))})
    with pytest.raises(ValueError, match="pictures are broken"):
        take(1, split, config, 4, seed=0, start=0)
    with pytest.raises(ValueError, match="pictures are broken"):
        list(pipeline.eval_batches(split, config, 4))


def test_broken_picture_is_left_out_of_evaluation(shapes, monkeypatch, caplog):
    config, split = shapes
    break_pictures(monkeypatch, {split.file_name(2)})
    with caplog.at_level(logging.WARNING, "knet_jax"):
        results = list(pipeline.eval_batches(split, config, 4))
    ids = [id for _, truths in results for id, _ in truths]
    assert sorted(ids) == sorted(set(range(len(split))) - {2})
    assert all([id for id, _ in t] == b.id[b.id != EMPTY].tolist() for (b,), t in results)
    assert len(caplog.records) == 1 and split.file_name(2) in caplog.text


def test_truncated_file_on_disk(tmp_path):
    """The header is sound, so only the loader can notice."""
    root = tiny_coco.write(tmp_path / "coco")
    path = root / "train2017" / "train_1.jpg"
    path.write_bytes(path.read_bytes()[:-300])
    config = tiny_coco.data_config(tmp_path / "prepared", root, num_workers=2)
    result = take(10, pipeline.load_split(config, "train", "panoptic"), config, 1, seed=0, start=0)
    assert {name for _, skipped in result for name in skipped} == {"train_1.jpg"}
    assert all(batch.id[0] != 1 for batch, _ in result)


def test_small_shared_memory_is_named(shapes, monkeypatch):
    config, split = shapes
    config = config.copy_and_resolve_references()
    usage = type("Usage", (), {"free": 1 << 10})
    monkeypatch.setattr(pipeline.shutil, "disk_usage", lambda path: usage)
    assert take(1, split, config, 4, seed=0, start=0)
    config.num_workers = 2
    with pytest.raises(ValueError, match=r"config.data.num_workers 2 need .*docker run --shm-size"):
        take(1, split, config, 4, seed=0, start=0)
