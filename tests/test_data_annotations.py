"""What each task learns from an annotation, and what it is evaluated with."""

import itertools
import logging

import cv2
import numpy as np
import pytest
import tiny_coco
import tiny_maps
from pycocotools import mask as run_lengths
from pycocotools.coco import COCO

from knet_jax.data import pipeline
from knet_jax.data.annotations import semantic
from knet_jax.data.annotations.kind import Record
from knet_jax.segmentation.segments import Instance
from knet_jax.structs import EMPTY
from knet_jax.system.errors import UserError


def take(count, config, task, batch_size=2):
    """A split, and batches of it."""
    split = pipeline.load_split(config, "train", task)
    batches = pipeline.train_batches(split, config, batch_size, seed=0, start=0)
    return split, list(itertools.islice(batches, count))


def coco_config(folder, task, change=None, **changes):
    """A config of a small dataset in COCO's layout, five pictures a split."""
    if task == "instance":
        root, prefix = tiny_coco.write_instances(folder, splits=("train",)), "instances_"
    else:
        root, prefix = tiny_coco.write(folder, splits=("train",)), "panoptic_"
    if change:
        tiny_coco.edit(root, change, prefix=prefix)
    return tiny_coco.data_config(folder / "prepared", root, **changes)


def quarters(mask, size, flip, canvas):
    """The pixels that targets average, by a nearest resize of a whole mask, a flip and padding."""
    rows, columns = (
        np.floor((np.arange(new) + 0.5) * old / new).astype(int)
        for new, old in zip(size, mask.shape)
    )
    resized = mask[rows][:, columns]
    padded = np.zeros(canvas, mask.dtype)
    padded[: size[0], : size[1]] = resized[:, ::-1] if flip else resized
    height, width = canvas
    blocks = padded.reshape(height // 4, 4, width // 4, 4)[:, 1:3, :, 1:3]
    return blocks.reshape(height // 2, width // 2)


def is_flipped(batch, place, image):
    """Whether a picture was flipped; it must be the resized picture, flipped or not."""
    height, width = batch.size[place].tolist()
    seen = batch.image[place, :height, :width]
    resized = cv2.resize(image, (width, height))
    assert np.array_equal(seen, resized) or np.array_equal(seen, resized[:, ::-1])
    assert not batch.image[place, height:].any() and not batch.image[place, :, width:].any()
    return not np.array_equal(seen, resized)


# Panoptic.


def test_panoptic_targets(tmp_path):
    split, batches = take(6, coco_config(tmp_path, "panoptic"), "panoptic")
    flips = set()
    for batch in batches:
        portrait = batch.original_size[0, 0] > batch.original_size[0, 1]
        canvas = (128, 96) if portrait else (96, 128)
        segment_map, labels, stuff_labels = batch.targets
        assert batch.image.shape == (2, *canvas, 3) and batch.image.dtype == np.uint8
        assert segment_map.shape == (2, canvas[0] // 2, canvas[1] // 2)
        assert segment_map.dtype == np.uint8
        assert labels.shape == (2, 8) and labels.dtype == stuff_labels.dtype == np.int32
        for place, index in enumerate(batch.id):
            assert tuple(batch.original_size[place]) == tuple(split.sizes[index])
            flips.add(flip := is_flipped(batch, place, split.image(index)))
            truth = split.truth(index)
            grass, sky = truth.segments[1], truth.segments[0]
            order = sorted(truth.segments[2:4], key=lambda s: -np.sum(truth.ids == s.id))
            assert labels[place].tolist() == [s.label for s in order] + [EMPTY] * 6
            assert stuff_labels[place].tolist() == [2, 3]
            # Slots 1 and 2, grass is the first and sky the second stuff class; crowds are nothing.
            values = {order[0].id: 1, order[1].id: 2, grass.id: 9, sky.id: 10}
            whole = np.zeros(truth.ids.shape, np.uint8)
            for id, value in values.items():
                whole[truth.ids == id] = value
            expected = quarters(whole, batch.size[place], flip, canvas)
            np.testing.assert_array_equal(segment_map[place], expected)
    assert flips == {False, True}


def test_panoptic_slots(tmp_path, caplog):
    config = coco_config(tmp_path, "panoptic", max_things=300)
    _, [batch] = take(1, config, "panoptic")
    assert batch.targets.segment_map.dtype == np.uint16
    assert batch.targets.segment_map.max() == 1 + 300 + 1

    config.max_things = 1
    with caplog.at_level(logging.WARNING, "knet_jax"):
        split, batches = take(6, config, "panoptic", batch_size=1)
    [warning] = [r.message for r in caplog.records if r.name.startswith("knet_jax")]
    assert warning.startswith("5 of 5 pictures have more than config.data.max_things = 1 things")
    for batch in batches:
        truth = split.truth(int(batch.id[0]))
        largest = max(truth.segments[2:4], key=lambda s: np.sum(truth.ids == s.id))
        assert batch.targets.labels[0].tolist() == [largest.label]
        assert batch.targets.stuff_labels[0].tolist() == [2, 3]
        assert set(np.unique(batch.targets.segment_map)) <= {0, 1, 2, 3}


def test_panoptic_pictures_without_things_and_ids_that_are_not_listed(tmp_path):
    def change(content):
        for annotation in content["annotations"]:
            del annotation["segments_info"][2:]

    split, [batch] = take(1, coco_config(tmp_path, "panoptic", change), "panoptic")
    assert np.all(batch.targets.labels == EMPTY) and np.all(batch.targets.stuff_labels == [2, 3])
    assert set(np.unique(batch.targets.segment_map)) == {0, 9, 10}
    _, ids, segments = tiny_coco.draw(0, 60, 80)
    listed = np.isin(ids, [segment["id"] for segment in segments[:2]])
    np.testing.assert_array_equal(split.truth(0).ids, np.where(listed, ids, 0))


# Instances.


def test_instance_targets(tmp_path):
    split, batches = take(6, coco_config(tmp_path, "instance"), "instance")
    flips = set()
    for batch in batches:
        height, width = batch.image.shape[1:3]
        masks, labels = batch.targets
        assert masks.shape == (2, 8, height // 2, width // 16) and masks.dtype == np.uint8
        assert labels.shape == (2, 8) and labels.dtype == np.int32
        for place, index in enumerate(batch.id):
            flips.add(flip := is_flipped(batch, place, split.image(index)))
            drawn = tiny_coco.instance_masks(*batch.original_size[place])[:2]  # then a crowd
            drawn.sort(key=lambda one: -int(one[2].sum()))
            assert labels[place].tolist() == [{3: 0, 12: 1}[one[0]] for one in drawn] + [EMPTY] * 6
            for (_, _, mask), bits in zip(drawn, np.unpackbits(masks[place], axis=-1)):
                expected = quarters(mask, batch.size[place], flip, (height, width))
                np.testing.assert_array_equal(bits, expected)
            assert not masks[place, 2:].any()
            dog, cat = np.unpackbits(masks[place, :2], axis=-1)
            assert (dog & cat).any() and (dog & ~cat).any() and (cat & ~dog).any()  # overlaps stay
    assert flips == {False, True}


def test_instance_slots(tmp_path):
    _, batches = take(3, coco_config(tmp_path, "instance", max_things=1), "instance")
    assert all(batch.targets.labels.tolist() == [[1], [1]] for batch in batches)  # cats are larger


def test_pictures_without_instances(tmp_path):
    def change(content):
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] == 104]

    config = coco_config(tmp_path, "instance", change)
    split, batches = take(6, config, "instance")
    assert split.num_things.tolist() == [0, 0, 0, 0, 2] and split.truth(0) == ()
    for batch in batches:
        empty = batch.id != 4
        assert (batch.targets.labels[empty] == EMPTY).all()
        assert not batch.targets.masks[empty].any()
    config.min_things = 1
    assert pipeline.steps_per_epoch(split, config, 2) == 1
    assert all((batch.id == 4).all() for batch in take(3, config, "instance")[1])


# Maps of classes.


def expected_map(index, size):
    """0 is ignored, 1 + k is class k."""
    _, indices = tiny_maps.draw(index, size, (0, 1, 2, 255))
    return np.where(indices == 255, 0, indices + 1)


def test_semantic_targets(tmp_path):
    """A picture whose colors are its labels shows the label map of its own crop."""
    root = tiny_maps.write_folder(tmp_path / "maps")
    config = tiny_coco.data_config(tmp_path, root, **tiny_maps.FOLDER, photometric=False)
    for i, size in enumerate(tiny_maps.SIZES):
        image = np.repeat(80 * expected_map(i, size)[..., None], 3, -1)
        quality = [cv2.IMWRITE_JPEG_QUALITY, 100]
        cv2.imwrite(f"{config.root}/images/train/{i}.jpg", image, quality)
    split, plain = take(12, config, "semantic")
    for index, size in enumerate(tiny_maps.SIZES):
        truth = split.truth(index)
        assert truth.dtype == np.uint8
        np.testing.assert_array_equal(truth, expected_map(index, size))
    for batch in plain:
        assert batch.image.shape == (2, 64, 96, 3)
        assert batch.targets.label_map.shape == (2, 64, 96)
        assert batch.targets.label_map.dtype == np.uint8
        for place, (height, width) in enumerate(batch.size):
            label_map = batch.targets.label_map[place]
            assert not label_map[height:].any() and not label_map[:, width:].any()
            assert not batch.image[place, height:].any() and not batch.image[place, :, width:].any()
            seen = np.rint(batch.image[place, :height, :width, 0] / 80)
            assert (seen == label_map[:height, :width]).mean() > 0.85
    assert any((batch.size < (64, 96)).any() for batch in plain)  # smaller than the crop
    assert any((batch.size == (64, 96)).all(1).any() for batch in plain)

    config.photometric = True
    changed = 0
    for a, b in zip(take(8, config, "semantic")[1], plain):
        np.testing.assert_array_equal(a.size, b.size)
        changed += (a.image != b.image).any()
        for place, (height, width) in enumerate(a.size):  # padding stays as it is
            assert not a.image[place, height:].any() and not a.image[place, :, width:].any()
    assert changed >= 6


def test_more_than_255_classes_need_sixteen_bits(tmp_path):
    root = tiny_maps.write_folder(tmp_path / "maps", values=(0, 7, 299, 65535))
    (root / "classes.txt").write_text("".join(f"class {i}\n" for i in range(300)))
    changes = tiny_maps.FOLDER | {"ignore_index": 65535}
    config = tiny_coco.data_config(tmp_path, root, **changes)
    split, [batch] = take(1, config, "semantic")
    _, indices = tiny_maps.draw(0, tiny_maps.SIZES[0], (0, 7, 299, 65535))
    truth = split.truth(0)
    assert truth.dtype == np.uint16
    np.testing.assert_array_equal(truth, np.where(indices == 65535, 0, indices + 1))
    assert batch.targets.label_map.dtype == np.uint16 and batch.targets.label_map.max() == 300


def test_damaged_maps_are_named():
    record = Record(b"", 0, "", (9, 11), semantic.encode_map(np.zeros((9, 11), int)))
    color = cv2.imencode(".png", np.zeros((9, 11, 3), np.uint8))[1].tobytes()
    for broken, message in (
        (record._replace(size=(11, 9)), "is 11x9 where 9x11 is expected"),
        (record._replace(annotation=record.annotation[:20]), "cannot be decoded"),
        (record._replace(annotation=color), "has 3 channels"),
    ):
        with pytest.raises(UserError, match=message):
            semantic.SemanticKind(None).load(broken)


# All of them, from COCO's files to prepared records and back.


def test_coco_survives_preparation(coco_mini, tmp_path, capsys):
    config = tiny_coco.data_config(tmp_path, coco_mini)
    panoptic, labels, instances = (
        pipeline.load_split(config, "val", task) for task in ("panoptic", "semantic", "instance")
    )
    out = capsys.readouterr().out
    assert "60 images" in out and "0 problems" in out
    assert labels.categories == panoptic.categories._replace(num_things=0)
    assert instances.categories.num_things == len(instances.categories.names) == 80
    assert (panoptic.categories.num_things, panoptic.categories.names[80]) == (80, "banner")
    reference = COCO(coco_mini / "annotations" / "instances_val2017.json")
    folder = coco_mini / "annotations" / "panoptic_val2017"
    assert len(panoptic) == len(labels) == len(instances) == len(reference.imgs) == 60
    crowds = count = 0
    for index in range(60):
        name, image_id = panoptic.file_name(index), panoptic.image_id(index)
        assert image_id == labels.image_id(index) == int(name.removesuffix(".jpg"))
        if index % 10 == 0:
            picture = cv2.imread(str(coco_mini / "val2017" / name))
            np.testing.assert_array_equal(panoptic.image(index)[..., ::-1], picture)
        colors = cv2.imread(str(folder / name.replace("jpg", "png"))).astype(int)
        truth = panoptic.truth(index)
        assert truth.ids.dtype == np.int32
        np.testing.assert_array_equal(truth.ids, colors @ [65536, 256, 1])
        assert {segment.id for segment in truth.segments} == set(np.unique(truth.ids)) - {0}
        assert tuple(panoptic.sizes[index]) == truth.ids.shape
        expected = np.zeros(truth.ids.shape, np.uint8)
        for segment in truth.segments:
            if not segment.iscrowd:
                expected[truth.ids == segment.id] = 1 + segment.label
        np.testing.assert_array_equal(labels.truth(index), expected)

        found = instances.truth(index)
        ids = reference.getAnnIds([instances.image_id(index)], iscrowd=None)
        for instance, annotation in zip(found, reference.loadAnns(ids), strict=True):
            assert isinstance(instance, Instance) and instance.score == 1
            mask = reference.annToMask(annotation)
            assert instance.rle["size"] == list(mask.shape)
            np.testing.assert_array_equal(run_lengths.decode(instance.rle), mask)
            category = instances.categories.dataset_ids[instance.label]
            assert category == annotation["category_id"]
            assert instance.iscrowd == bool(annotation["iscrowd"])
            assert instance.area == annotation["area"]
            crowds += instance.iscrowd
        count += len(found)
    assert count == 418 and crowds == 4
