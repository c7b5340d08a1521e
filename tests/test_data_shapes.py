import cv2
import numpy as np
import pytest
import tiny_coco
from pycocotools import mask as run_lengths

from knet_jax.data.sources import shapes
from knet_jax.segmentation import image_files, published_classes
from knet_jax.system.errors import UserError

SIDES = (96, 128)
CATEGORIES = published_classes.find("shapes", "panoptic")


@pytest.fixture(scope="module")
def drawn():
    return [shapes.draw("train", i, SIDES) for i in range(150)]


def ids_of(annotation, drawing):
    return image_files.segment_ids(image_files.load_panoptic(annotation.png, drawing.slots.shape))


def test_same_arguments_same_picture(drawn):
    again, other = shapes.draw("train", 3, SIDES), shapes.draw("val", 3, SIDES)
    for a, b in zip(again, drawn[3]):
        np.testing.assert_array_equal(list(a), list(b))
    for different in (other, drawn[4]):
        same_size = different.image.shape == drawn[3].image.shape
        assert not same_size or (different.image != drawn[3].image).any()


def test_everything_occurs(drawn):
    num_things = CATEGORIES.num_things
    listed = [shapes.annotate_panoptic(drawing).segments for drawing in drawn]
    segments = [segment for of_one in listed for segment in of_one]
    assert {s.label for s in segments} == set(range(len(CATEGORIES.names)))
    assert any(s.iscrowd and s.label < num_things for s in segments)
    assert not any(s.iscrowd and s.label >= num_things for s in segments)
    assert any(all(s.label >= num_things for s in of_one) for of_one in listed)
    assert any(np.any(drawing.slots == 0) for drawing in drawn)
    sizes = np.array([drawing.slots.shape for drawing in drawn])
    assert sizes.min() >= SIDES[0] and sizes.max() <= SIDES[1]
    assert np.any(sizes[:, 0] > sizes[:, 1]) and np.any(sizes[:, 0] < sizes[:, 1])


def test_things_overlap_but_stay_visible(drawn):
    num_things = CATEGORIES.num_things
    touching = 0
    for drawing in drawn:
        annotation = shapes.annotate_panoptic(drawing)
        ids = ids_of(annotation, drawing)
        things = [s for s in annotation.segments if s.label < num_things]
        assert all(thing.area > 40 for thing in things if not thing.iscrowd)
        pairs = np.stack([ids[:, 1:], ids[:, :-1]], -1)[ids[:, 1:] != ids[:, :-1]]
        touching += bool(np.any(np.isin(pairs, [s.id for s in things]).all(-1)))
    assert touching > 30


def test_instances_are_the_things_of_the_panoptic_annotation(drawn):
    for drawing in drawn[:50]:
        annotation = shapes.annotate_panoptic(drawing)
        ids = ids_of(annotation, drawing)
        things = [s for s in annotation.segments if s.label < CATEGORIES.num_things]
        instances = shapes.annotate_instances(drawing)
        assert len(instances) == len(things)
        for thing, instance in zip(things, instances):
            rle = {"size": list(ids.shape), "counts": instance.counts}
            np.testing.assert_array_equal(run_lengths.decode(rle), ids == thing.id)
            assert (instance.label, instance.iscrowd) == (thing.label, thing.iscrowd)
            assert instance.area == thing.area


def test_labels_are_the_classes_of_the_panoptic_annotation(drawn):
    for drawing in drawn[:50]:
        annotation = shapes.annotate_panoptic(drawing)
        ids = ids_of(annotation, drawing)
        expected = np.zeros(ids.shape, int)
        for segment in annotation.segments:
            if not segment.iscrowd:
                expected[ids == segment.id] = 1 + segment.label
        png = np.frombuffer(shapes.annotate_semantic(drawing), np.uint8)
        np.testing.assert_array_equal(cv2.imdecode(png, cv2.IMREAD_UNCHANGED), expected)


def find(split="train", task="panoptic", **changes):
    return shapes.find(task, tiny_coco.data_config("", **changes), split)


def test_names_hold_everything_that_matters():
    names = {
        find().name,
        find("val").name,
        find(num_train=11).name,
        find(image_side=(64, 128)).name,
        find(task="semantic").name,
    }
    assert len(names) == 5


def test_sides_that_are_too_short_are_named():
    with pytest.raises(UserError, match=r"config\.data\.image_side is \(8, 128\); accepted: sides"):
        find(image_side=(8, 128))
