import shutil

import numpy as np
import pytest
import tiny_coco
import tiny_maps

from knet_jax.data import pipeline
from knet_jax.data.sources import folder
from knet_jax.segmentation import class_lists


@pytest.fixture
def root(tmp_path):
    return tiny_maps.write_folder(tmp_path / "maps")


def config_of(root, **changes):
    values = tiny_maps.FOLDER | changes
    return tiny_coco.data_config(root.parent / "prepared", root, **values)


def load(root, **changes):
    return pipeline.load_split(config_of(root, **changes), "train", "semantic")


def test_lines_name_the_indices(root):
    split = load(root)
    assert split.categories == (("wall", "floor", "lamp"), (0, 1, 2), 0)
    _, indices = tiny_maps.draw(1, tiny_maps.SIZES[1], (0, 1, 2, 255))
    np.testing.assert_array_equal(split.truth(1), np.where(indices == 255, 0, indices + 1))


def test_a_listed_class_may_be_ignored(root):
    tiny_maps.write_folder(root, values=(0, 1, 2))
    split = load(root, ignore_index=0)
    assert split.categories == (("floor", "lamp"), (1, 2), 0)
    _, indices = tiny_maps.draw(1, tiny_maps.SIZES[1], (0, 1, 2))
    np.testing.assert_array_equal(split.truth(1), indices)


def test_subfolders_agree(root):
    for part in ("images", "labels"):
        (root / part / "train" / "deep").mkdir()
        [file] = (root / part / "train").glob("2.*")
        file.rename(file.parent / "deep" / file.name)
    split = load(root)
    names = [split.file_name(i) for i in range(3)]
    assert sorted(names) == ["0.jpg", "1.jpg", "deep/2.jpg"]


def test_one_folder_can_serve_all_splits(root):
    config = config_of(root, images="images/train", labels="labels/train")
    assert len(pipeline.load_split(config, "anything", "semantic")) == 3


def test_class_list_shorter_than_the_labels(root):
    (root / "classes.txt").write_text("wall\nfloor\n")
    with pytest.raises(
        ValueError, match=r"\.png has indices \[2\] that are no class: name them in"
    ) as error:
        load(root)
    message = str(error.value)
    assert "config.data.classes" in message and "config.data.ignore_index, 255" in message
    assert "\n" not in message


@pytest.mark.parametrize("text", ["", "wall\n\nlamp\n", "wall\nwall\nlamp\n"])
def test_bad_class_lists_are_named(root, text):
    (root / "classes.txt").write_text(text)
    with pytest.raises(ValueError, match=r"config\.data\.classes: .*classes\.txt must name"):
        load(root)


def test_class_lists_of_other_encodings(root):
    path = root / "classes.txt"
    path.write_text("wall\nsky\nlamp\n", encoding="utf-8-sig")  # as some editors do
    assert class_lists.read_class_list(path, 255).names == ("wall", "sky", "lamp")
    path.write_text("wall\nsky\nlamp\n", encoding="utf-16")
    with pytest.raises(ValueError, match=r"config\.data\.classes: .*must be text in UTF-8"):
        load(root)


def test_missing_png_is_named(root, capsys):
    (root / "labels/train/1.png").unlink()
    assert len(load(root)) == 2
    assert "1.jpg: " in (out := capsys.readouterr().out) and "1.png is missing, left out" in out


def test_png_of_another_size_is_named(root, capsys):
    shutil.copy(root / "labels/train/0.png", root / "labels/train/1.png")
    assert len(load(root)) == 2
    assert "1.jpg: picture is 60x80 but its index PNG 80x60" in capsys.readouterr().out


def test_empty_split_is_named(root):
    shutil.rmtree(root / "images/train")
    (root / "images/train").mkdir()
    with pytest.raises(ValueError, match=r"config\.data\.images: split 'train': no picture in"):
        load(root)


@pytest.mark.parametrize("key", ["images", "labels", "classes"])
def test_missing_paths_are_named(root, key):
    with pytest.raises(
        ValueError, match=rf"config\.data\.{key}: split 'train' needs the .*nowhere"
    ):
        load(root, **{key: "nowhere"})


@pytest.mark.parametrize("index", [-1, 65536])
def test_bad_ignored_indices_are_named(root, index):
    with pytest.raises(ValueError, match=rf"config\.data\.ignore_index {index} must be in"):
        load(root, ignore_index=index)


def test_config_name_follows_everything_that_matters(root):
    names = [folder.split_config(config_of(root), "train").name for _ in range(2)]
    names.append(folder.split_config(config_of(root), "val").name)
    names.append(folder.split_config(config_of(root, ignore_index=0), "train").name)
    (root / "classes.txt").write_text("a\nb\nc\n")
    names.append(folder.split_config(config_of(root), "train").name)
    (root / "labels/train/more.png").touch()
    names.append(folder.split_config(config_of(root), "train").name)
    assert names[0] == names[1] and len(set(names)) == 5
