import itertools

import cv2
import numpy as np
import pytest
import tiny_coco
import tiny_maps

from knet_jax.data import pipeline, transforms
from knet_jax.data.annotations import semantic
from knet_jax.segmentation import image_files
from knet_jax.segmentation.segments import Categories


@pytest.fixture
def config(tmp_path):
    """A config of a small dataset of label maps, three pictures a split."""
    root = tiny_maps.write_folder(tmp_path / "maps")
    return tiny_coco.data_config(tmp_path / "prepared", root, **tiny_maps.FOLDER)


def expected_map(index, size):
    """0 is ignored, 1 + k is class k."""
    _, indices = tiny_maps.draw(index, size, (0, 1, 2, 255))
    return np.where(indices == 255, 0, indices + 1)


def take(count, config, batch_size=2):
    split = pipeline.load_split(config, "train", "semantic")
    batches = pipeline.train_batches(split, config, batch_size, seed=0, start=0)
    return split, [batch for batch, _ in itertools.islice(batches, count)]


def test_truth_is_the_map_at_original_size(config):
    split = pipeline.load_split(config, "train", "semantic")
    assert split.categories == (("wall", "floor", "lamp"), (0, 1, 2), 0)
    assert len(split) == 3 and split.num_things.tolist() == [0, 0, 0]
    for index, size in enumerate(tiny_maps.SIZES):
        truth = split.truth(index)
        assert truth.dtype == np.uint8
        np.testing.assert_array_equal(truth, expected_map(index, size))


def test_crops_of_pictures_and_of_their_maps_agree(config):
    """A picture whose colors are its labels shows the label map of its own crop."""
    root = config.root
    for i, size in enumerate(tiny_maps.SIZES):
        _, indices = tiny_maps.draw(i, size, (0, 1, 2, 255))
        image = np.repeat(np.where(indices == 255, 0, 80 * (indices + 1))[..., None], 3, -1)
        cv2.imwrite(f"{root}/images/train/{i}.jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 100])
    config.photometric = False
    _, batches = take(12, config)
    for batch in batches:
        assert batch.image.shape == (2, 64, 96, 3)
        assert batch.targets.label_map.shape == (2, 64, 96)
        assert batch.targets.label_map.dtype == np.uint8
        for place in range(2):
            height, width = batch.size[place]
            label_map = batch.targets.label_map[place]
            assert not label_map[height:].any() and not label_map[:, width:].any()
            assert not batch.image[place, height:].any() and not batch.image[place, :, width:].any()
            seen = np.rint(batch.image[place, :height, :width, 0] / 80)
            assert (seen == label_map[:height, :width]).mean() > 0.85
    assert any((batch.size < (64, 96)).any() for batch in batches)  # smaller than the crop
    assert any((batch.size == (64, 96)).all(1).any() for batch in batches)


def test_photometric_distortion_leaves_the_padding_and_the_labels(config):
    _, distorted = take(8, config)
    config.photometric = False
    _, plain = take(8, config)
    changed = 0
    for a, b in zip(distorted, plain):
        np.testing.assert_array_equal(a.size, b.size)
        changed += (a.image != b.image).any()
        for place, (height, width) in enumerate(a.size):
            assert not a.image[place, height:].any() and not a.image[place, :, width:].any()
    assert changed >= 6


def test_flips_of_distorted_crops_show_the_same_labels(config):
    """The flip is drawn after the window, so it mirrors what would be seen without it."""
    config.flip = 0.0
    _, plain = take(4, config)
    config.flip = 1.0
    _, flipped = take(4, config)
    for a, b in zip(plain, flipped):
        np.testing.assert_array_equal(a.size, b.size)
        for place, (height, width) in enumerate(a.size):
            one, two = (x.targets.label_map[place, :height, :width] for x in (a, b))
            assert (one == two[:, ::-1]).mean() > 0.97  # ties of the nearest pixel


def test_evaluation_shows_whole_pictures(config):
    split = pipeline.load_split(config, "val", "semantic")
    seen = []
    for (batch,), truths in pipeline.eval_batches(split, config, 2):
        for place, (index, truth) in enumerate(truths):
            size = transforms.resized_size(truth.shape, 96, 128)
            assert tuple(batch.size[place]) == size
            assert batch.image.shape[1:3] == tuple(-(-side // 32) * 32 for side in size)
            np.testing.assert_array_equal(truth, expected_map(index, truth.shape))
            seen.append(index)
    assert sorted(seen) == [0, 1, 2]


def test_more_than_255_classes_need_sixteen_bits(tmp_path):
    root = tiny_maps.write_folder(tmp_path / "maps", values=(0, 7, 299, 65535))
    (root / "classes.txt").write_text("".join(f"class {i}\n" for i in range(300)))
    changes = tiny_maps.FOLDER | {"ignore_index": 65535}
    config = tiny_coco.data_config(tmp_path / "prepared", root, **changes)
    split, [batch] = take(1, config)
    _, indices = tiny_maps.draw(0, tiny_maps.SIZES[0], (0, 7, 299, 65535))
    truth = split.truth(0)
    assert truth.dtype == np.uint16
    np.testing.assert_array_equal(truth, np.where(indices == 65535, 0, indices + 1))
    assert batch.targets.label_map.dtype == np.uint16 and batch.targets.label_map.max() == 300


def test_coco_as_labels_of_pixels(coco_mini, tmp_path):
    """All 133 classes; pixels of crowds and void are ignored."""
    config = tiny_coco.data_config(tmp_path, coco_mini)
    split = pipeline.load_split(config, "val", "semantic")
    panoptic = pipeline.load_split(config, "val", "panoptic")
    assert split.categories == panoptic.categories._replace(num_things=0)
    assert split.categories.num_stuff == 133
    crowds = 0
    for index in range(len(split)):
        truth = panoptic.truth(index)
        expected = np.zeros(truth.ids.shape, np.uint8)
        for segment in truth.segments:
            crowds += segment.iscrowd
            if not segment.iscrowd:
                expected[truth.ids == segment.id] = 1 + segment.label
        np.testing.assert_array_equal(split.truth(index), expected)
        assert split.image_id(index) == panoptic.image_id(index)
    assert crowds == 4


@pytest.mark.parametrize("greatest, dtype", [(0, np.uint8), (255, np.uint8), (256, np.uint16)])
def test_encoded_maps_survive(greatest, dtype):
    label_map = np.random.default_rng(0).integers(0, greatest + 1, (9, 11))
    label_map[0, 0] = greatest
    decoded = image_files.load_label_map(semantic.encode_map(label_map), (9, 11))
    assert decoded.dtype == dtype
    np.testing.assert_array_equal(decoded, label_map)


def test_maps_that_do_not_fit_are_refused():
    categories = Categories(("a", "b"), (0, 1), 0)
    png = semantic.encode_map(np.full((4, 5), 3))
    with pytest.raises(ValueError, match="has class 2 of 2"):
        semantic.load(png, (4, 5), categories)
    with pytest.raises(ValueError, match="is 5x4 where 4x5 is expected"):
        semantic.load(png, (5, 4), categories)
    with pytest.raises(ValueError, match="cannot be decoded"):
        semantic.load(png[:20], (4, 5), categories)
    color = cv2.imencode(".png", np.zeros((4, 5, 3), np.uint8))[1].tobytes()
    with pytest.raises(ValueError, match="has 3 channels"):
        semantic.load(color, (4, 5), categories)
