import numpy as np
import pytest
import tiny_coco
import tiny_maps

from knet_jax.data import pipeline
from knet_jax.data.sources import cityscapes

# The ids and the order of the 19 classes, from the table of the dataset's own scripts.
TRAIN_IDS = {
    7: 0,
    8: 1,
    11: 2,
    12: 3,
    13: 4,
    17: 5,
    19: 6,
    20: 7,
    21: 8,
    22: 9,
    23: 10,
    24: 11,
    25: 12,
    26: 13,
    27: 14,
    28: 15,
    31: 16,
    32: 17,
    33: 18,
}


@pytest.fixture
def config(tmp_path):
    root = tiny_maps.write_cityscapes(tmp_path / "city", values=range(34))
    return tiny_coco.data_config(tmp_path / "prepared", root, dataset="cityscapes")


def test_ids_become_the_19_classes(config, capsys):
    split = pipeline.load_split(config, "train", "semantic")
    assert "0 problems" in capsys.readouterr().out
    assert len(split.categories.names) == 19 and split.categories.num_things == 0
    assert split.categories.names[0] == "road" and split.categories.names[18] == "bicycle"
    names = [split.file_name(i) for i in range(3)]
    assert names[0] == "aachen_000000_000019_leftImg8bit.png" and "bochum" in names[2]
    for position, index in enumerate((0, 2, 1)):  # by city
        _, indices = tiny_maps.draw(index, tiny_maps.SIZES[index], range(34))
        expected = np.zeros_like(indices)
        for id, train_id in TRAIN_IDS.items():
            expected[indices == id] = 1 + train_id
        np.testing.assert_array_equal(split.truth(position), expected)


def test_missing_annotation_is_named(config, tmp_path, capsys):
    next((tmp_path / "city/gtFine/train/aachen").glob("*_labelIds.png")).unlink()
    assert len(pipeline.load_split(config, "train", "semantic")) == 2
    assert "_gtFine_labelIds.png is missing, left out" in capsys.readouterr().out


def test_missing_folders_are_named(config):
    with pytest.raises(ValueError, match=r"no Cityscapes at .*expected .*leftImg8bit/test"):
        pipeline.load_split(config, "test", "semantic")
    with pytest.raises(ValueError, match="no Cityscapes at ''"):
        cityscapes.split_config("", "train")


def test_another_city_is_another_dataset(config, tmp_path):
    root = tmp_path / "city"
    name = cityscapes.split_config(str(root), "train").name
    assert cityscapes.split_config(str(root), "train").name == name
    (root / "gtFine/train/aachen/new.png").touch()
    assert cityscapes.split_config(str(root), "train").name != name
