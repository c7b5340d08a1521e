import itertools
import logging

import cv2
import numpy as np
import pytest
import tiny_coco
from pycocotools import mask as run_lengths
from pycocotools.coco import COCO

from knet_jax.data import pipeline, transforms
from knet_jax.data.annotations.instance import Loaded, StoredInstance
from knet_jax.segmentation.segments import Instance
from knet_jax.structs import EMPTY


@pytest.fixture
def tiny(tmp_path):
    """A config of a small dataset with instances, five pictures a split."""
    root = tiny_coco.write_instances(tmp_path / "coco")
    return tiny_coco.data_config(tmp_path / "prepared", root)


def take(count, config, split="train", **kwargs):
    split = pipeline.load_split(config, split, "instance")
    batches = pipeline.train_batches(split, config, 2, seed=0, start=0, **kwargs)
    return split, [batch for batch, _ in itertools.islice(batches, count)]


def unpack(masks):
    return np.unpackbits(masks, axis=-1)


def test_targets_are_the_sampled_pixels_of_the_masks(tiny):
    """Against a nearest resize of whole masks, a flip, padding, and the choice of pixels."""
    split, batches = take(6, tiny)
    flips = set()
    for batch in batches:
        height, width = batch.image.shape[1:3]
        masks, labels = batch.targets
        assert masks.shape == (2, 8, height // 2, width // 16) and masks.dtype == np.uint8
        assert labels.shape == (2, 8) and labels.dtype == np.int32
        for i, index in enumerate(batch.id):
            h, w = batch.size[i]
            original = batch.original_size[i]
            image = cv2.resize(split.image(index), (int(w), int(h)))
            flip = not np.array_equal(batch.image[i, :h, :w], image)
            flips.add(flip)
            drawn = tiny_coco.instance_masks(*original)[:2]  # the third is a crowd
            drawn.sort(key=lambda one: -one[2].sum())
            assert labels[i].tolist() == [{3: 0, 12: 1}[one[0]] for one in drawn] + [EMPTY] * 6
            for (_, _, mask), bits in zip(drawn, unpack(masks[i])):
                rows = np.floor((np.arange(h) + 0.5) * original[0] / h).astype(int)
                columns = np.floor((np.arange(w) + 0.5) * original[1] / w).astype(int)
                resized = mask[rows][:, columns]
                padded = np.zeros((height, width), np.uint8)
                padded[:h, :w] = resized[:, ::-1] if flip else resized
                quarters = padded.reshape(height // 4, 4, width // 4, 4)[:, 1:3, :, 1:3]
                expected = quarters.reshape(height // 2, width // 2)
                np.testing.assert_array_equal(bits, expected)
            assert not masks[i, 2:].any()
    assert flips == {False, True}


def test_masks_overlap(tiny):
    _, [batch] = take(1, tiny)
    dog, cat = unpack(batch.targets.masks)[0, :2]
    assert (dog & cat).any() and (dog & ~cat).any() and (cat & ~dog).any()


def test_more_things_than_slots(tiny, caplog):
    tiny.max_things = 1
    with caplog.at_level(logging.WARNING, "knet_jax"):
        _, batches = take(3, tiny)
    [warning] = [r.message for r in caplog.records if r.name.startswith("knet_jax")]
    assert warning.startswith("5 of 5 pictures have more than config.data.max_things = 1 things")
    assert all(batch.targets.labels.tolist() == [[1], [1]] for batch in batches)  # cats are larger


def test_pictures_without_things_are_shown(tmp_path):
    root = tiny_coco.write_instances(tmp_path / "coco")

    def change(content):
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] == 104]

    tiny_coco.edit(root, change, prefix="instances_")
    config = tiny_coco.data_config(tmp_path / "prepared", root)
    split, batches = take(6, config)
    assert len(split) == 5 and split.num_things.tolist() == [0, 0, 0, 0, 2]
    for batch in batches:
        empty = batch.id != 4
        assert (batch.targets.labels[empty] == EMPTY).all()
        assert not batch.targets.masks[empty].any()
    assert split.truth(0) == ()
    config.min_things = 1
    assert pipeline.steps_per_epoch(split, config, 2) == 1
    _, batches = take(3, config)
    assert all((batch.id == 4).all() for batch in batches)


def test_instances_survive_preparation(coco_mini, tmp_path):
    """Masks, crowds and areas as COCO's own tool reads them."""
    config = tiny_coco.data_config(tmp_path, coco_mini)
    split = pipeline.load_split(config, "val", "instance")
    assert split.categories.num_things == len(split.categories.names) == 80
    reference = COCO(coco_mini / "annotations" / "instances_val2017.json")
    assert len(split) == len(reference.imgs) == 60
    crowds = count = 0
    for index in range(len(split)):
        listed = reference.loadAnns(reference.getAnnIds([split.image_id(index)], iscrowd=None))
        instances = split.truth(index)
        assert len(instances) == len(listed)
        for instance, annotation in zip(instances, listed):
            assert isinstance(instance, Instance) and instance.score == 1
            expected = reference.annToMask(annotation)
            assert instance.rle["size"] == list(expected.shape)
            np.testing.assert_array_equal(run_lengths.decode(instance.rle), expected)
            assert split.categories.dataset_ids[instance.label] == annotation["category_id"]
            assert instance.iscrowd == bool(annotation["iscrowd"])
            assert instance.area == annotation["area"]
            crowds += instance.iscrowd
        count += len(instances)
    assert count == 418 and crowds == 4


def test_a_crop_of_instances_shows_the_window():
    from knet_jax.data.annotations import instance
    from knet_jax.structs import InstanceTargets

    rng = np.random.default_rng(0)
    mask = rng.integers(0, 2, (40, 50)).astype(np.uint8)
    stored = StoredInstance(run_lengths.encode(np.asfortranarray(mask))["counts"], 3, False, 9.0)
    targets = InstanceTargets(np.zeros((1, 2, 16, 4), np.uint8), np.full((1, 2), EMPTY, np.int32))
    view = transforms.View((40, 50), (5, 9), (32, 40))
    instance.fill(targets, 0, Loaded([stored], (40, 50)), view, (32, 64), None)
    window = np.zeros((32, 64), np.uint8)
    window[:, :40] = mask[5:37, 9:49]
    expected = window.reshape(8, 4, 16, 4)[:, 1:3, :, 1:3].reshape(16, 32)
    np.testing.assert_array_equal(unpack(targets.masks)[0, 0], expected)
    assert targets.labels.tolist() == [[3, EMPTY]]
