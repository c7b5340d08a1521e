import numpy as np
import pytest

from knet_jax.data import shapes, transforms

SIDES = (96, 128)


@pytest.fixture(scope="module")
def drawn():
    return [shapes.draw("train", i, SIDES) for i in range(150)]


def ids_of(record):
    return transforms.segment_ids(transforms.load_panoptic(record.panoptic, record.size))


def test_same_arguments_same_record(drawn):
    assert shapes.draw("train", 3, SIDES) == drawn[3]
    assert shapes.draw("val", 3, SIDES).image != drawn[3].image
    assert drawn[4].image != drawn[3].image


def test_annotation_describes_the_pictures(drawn):
    for record in drawn[:50]:
        ids, counts = np.unique(ids_of(record), return_counts=True)
        found = {int(id): int(count) for id, count in zip(ids, counts) if id}
        assert found == {segment.id: segment.area for segment in record.segments}
        assert transforms.load_image(record.image, record.size).shape == (*record.size, 3)


def test_everything_occurs(drawn):
    num_things = shapes.CATEGORIES.num_things
    segments = [segment for record in drawn for segment in record.segments]
    assert {s.label for s in segments} == set(range(len(shapes.CATEGORIES.names)))
    assert any(s.iscrowd and s.label < num_things for s in segments)
    assert not any(s.iscrowd and s.label >= num_things for s in segments)
    assert any(all(s.label >= num_things for s in record.segments) for record in drawn)
    assert any(np.any(ids_of(record) == 0) for record in drawn)
    sizes = np.array([record.size for record in drawn])
    assert sizes.min() >= SIDES[0] and sizes.max() <= SIDES[1]
    assert np.any(sizes[:, 0] > sizes[:, 1]) and np.any(sizes[:, 0] < sizes[:, 1])


def test_things_overlap_but_stay_visible(drawn):
    num_things = shapes.CATEGORIES.num_things
    things = [s for r in drawn for s in r.segments if s.label < num_things and not s.iscrowd]
    assert min(thing.area for thing in things) > 40
    touching = 0
    for record in drawn:
        ids = ids_of(record)
        of = [s.id for s in record.segments if s.label < num_things]
        pairs = np.stack([ids[:, 1:], ids[:, :-1]], -1)[ids[:, 1:] != ids[:, :-1]]
        touching += bool(np.any(np.isin(pairs, of).all(-1)))
    assert touching > 30


def test_config_name_holds_everything_that_matters():
    names = {
        shapes.split_config("train", 10, (96, 128)).name,
        shapes.split_config("val", 10, (96, 128)).name,
        shapes.split_config("train", 11, (96, 128)).name,
        shapes.split_config("train", 10, (64, 128)).name,
    }
    assert len(names) == 4


@pytest.mark.parametrize("count, sides", [(0, (96, 128)), (5, (128, 96)), (5, (8, 128))])
def test_bad_configs_are_named(count, sides):
    with pytest.raises(ValueError, match=r"config\.data\.(num_train|image_side)"):
        shapes.split_config("train", count, sides)
