import pytest
import tiny_coco

from knet_jax.data import pipeline
from knet_jax.data.sources import by_name


def find(task, **changes):
    return by_name.find(tiny_coco.data_config("", **changes), "train", task)


@pytest.mark.parametrize("task", ["panoptic", "instance", "semantic"])
def test_shapes_serve_all_tasks(task):
    builder, config = find(task)
    assert builder.name == "shapes" and config.task == task and config.name.startswith(task)


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
