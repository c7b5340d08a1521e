import pytest
import tiny_coco
import tiny_maps

from knet_jax.data import pipeline
from knet_jax.data.sources import by_name


def find(task, **changes):
    return by_name.find(tiny_coco.data_config("", **changes), "train", task)


@pytest.mark.parametrize("task", ["panoptic", "instance", "semantic"])
def test_shapes_serve_all_tasks(task):
    builder, config = find(task)
    assert builder.name == "shapes" and config.task == task and config.name.startswith(task)


@pytest.mark.parametrize("dataset", ["ade20k", "cityscapes", "folder", "scene_parse150"])
@pytest.mark.parametrize("task", ["panoptic", "instance"])
def test_tasks_without_annotations_are_named(dataset, task):
    with pytest.raises(ValueError, match=rf"config\.task '{task}': .*'{dataset}' .* for semantic"):
        find(task, dataset=dataset)


def test_unknown_tasks_and_datasets_are_named():
    with pytest.raises(ValueError, match=r"config\.task is 'depth'; accepted: panoptic, instance"):
        find("depth")
    with pytest.raises(ValueError, match=r"config\.data\.dataset is 'voc'; accepted: ade20k"):
        find("semantic", dataset="voc")


@pytest.mark.parametrize("key", ["images", "labels", "classes", "ignore_index"])
def test_missing_keys_are_named(tmp_path, key):
    config = tiny_coco.data_config("", tmp_path, **tiny_maps.FOLDER)
    del config[key]
    with pytest.raises(ValueError, match=rf"config\.data\.{key} is missing: .*'folder' needs it"):
        by_name.find(config, "train", "semantic")


def test_tasks_are_prepared_side_by_side(tmp_path):
    config = tiny_coco.data_config(tmp_path)
    found = {
        task: pipeline.load_split(config, "val", task)
        for task in ("panoptic", "instance", "semantic")
    }
    names = [split.file_name(3) for split in found.values()]
    assert len(set(names)) == 1
    counts = {task: split.categories[2] for task, split in found.items()}
    assert counts == {"panoptic": 5, "instance": 5, "semantic": 0}
    classes = {task: len(split.categories.names) for task, split in found.items()}
    assert classes == {"panoptic": 9, "instance": 5, "semantic": 9}
