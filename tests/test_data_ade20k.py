import shutil

import numpy as np
import pytest
import tiny_coco
import tiny_maps

from knet_jax.data import pipeline
from knet_jax.data.sources import ade20k


@pytest.fixture
def root(tmp_path):
    return tiny_maps.write_ade20k(tmp_path / "data" / "ADEChallengeData2016")


def load(root, tmp_path, split="training"):
    config = tiny_coco.data_config(tmp_path / "prepared", root, dataset="ade20k")
    return pipeline.load_split(config, split, "semantic")


@pytest.mark.parametrize("above", [False, True])
def test_index_0_is_ignored_and_1_is_the_first_class(root, tmp_path, above):
    split = load(root.parent if above else root, tmp_path)
    assert split.categories.num_things == 0 and len(split.categories.names) == 150
    assert split.categories.names[:2] == ("thing 1", "thing 2")
    assert split.categories.dataset_ids == tuple(range(1, 151))
    for index, size in enumerate(tiny_maps.SIZES):
        _, indices = tiny_maps.draw(index, size, (0, 1, 2, 17, 150))
        np.testing.assert_array_equal(split.truth(index), indices)
        assert split.file_name(index) == f"ADE_train_{index:08d}.jpg"


def test_slices(root, tmp_path):
    assert len(load(root, tmp_path, "validation[:2]")) == 2


def test_names_are_not_needed(root, tmp_path):
    (root / "objectInfo150.txt").unlink()
    assert load(root, tmp_path).categories.names[148:] == ("clock", "flag")


@pytest.mark.parametrize(
    "text, words", [("a\nb\n", "is not a table"), ("Idx\n1\t1\tx\n", "lists 1")]
)
def test_broken_names_are_named(root, text, words):
    (root / "objectInfo150.txt").write_text(text)
    with pytest.raises(ValueError, match=rf"config\.data\.root: .*objectInfo150\.txt {words}"):
        ade20k.read_object_info(root)


def test_index_beyond_150_is_named(root, tmp_path, capsys):
    tiny_maps.write_ade20k(root, values=(0, 1, 151))
    load(root, tmp_path)
    assert "ADE_train_00000000.jpg: indices [151] are no class, ignored" in capsys.readouterr().out


def test_missing_folders_are_named(root, tmp_path):
    for wrong in ("", tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=r"config\.data\.root: no ADE20K at"):
            ade20k.split_config(str(wrong), "training")
    with pytest.raises(ValueError, match=r"split 'train' needs the folder .*images/train$"):
        ade20k.split_config(str(root), "train")
    shutil.rmtree(root / "images" / "training")
    (root / "images" / "training").mkdir()
    with pytest.raises(ValueError, match=r"config\.data\.root: no picture in .*images/training$"):
        load(root, tmp_path)


def test_names_in_another_encoding_are_named(root):
    (root / "objectInfo150.txt").write_text("Idx\tName\n", encoding="utf-16")
    with pytest.raises(ValueError, match=r"config\.data\.root: .*is not a table of classes"):
        ade20k.read_object_info(root)
