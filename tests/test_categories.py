import json
from pathlib import Path

import pytest

from knet_jax.config.files import load_config
from knet_jax.saved.class_names import find_categories
from knet_jax.segmentation import published_classes
from knet_jax.system.errors import UserError

TINY = "coco_panoptic:tiny"


def test_where_names_of_classes_come_from(tmp_path):
    config = load_config(TINY)
    coco = published_classes.find("coco", "panoptic")
    assert find_categories(config, (), None) == (coco, "the dataset")
    # As OpenMMLab spells them, and those of another dataset with as many classes.
    spelled = ("person ", *coco.names[1:])
    assert find_categories(config, spelled, None) == (coco, "the dataset")
    own = tuple(f"kind {i}" for i in range(133))
    categories, origin = find_categories(config, own, None)
    assert (categories.names, categories.num_things, origin) == (own, 80, "the checkpoint")
    assert find_categories(config, own[:5], None) == (coco, "the dataset")

    listed = [{"id": 9, "name": "sky", "isthing": 0}, {"id": 4, "name": "cat", "isthing": 1}]
    path = tmp_path / "c.json"
    path.write_text(json.dumps({"categories": listed}))
    small = load_config(TINY, ("--config.model.num_things=1", "--config.model.num_stuff=1"))
    categories, origin = find_categories(small, own, path)
    assert categories == (("cat", "sky"), (4, 9), 1) and origin == str(path)
    # As exports write it.
    exported = [None, *({**one, "id": str(one["id"]), "supercategory": None} for one in listed)]
    path.write_text(json.dumps({"categories": exported}), "utf-16")
    assert find_categories(small, own, path)[0] == categories
    unknown, origin = find_categories(small, (), None)
    assert unknown.names == ("class 1", "class 2") and origin == "nowhere"
    with pytest.raises(UserError, match=r"--categories=.*num_things is 80, but the data lists 1;"):
        find_categories(config, (), path)
    huge = json.dumps({"categories": [{**listed[0], "id": 2**63}, listed[1]]})
    for text in ("[1]", "{", '{"categories": [{"id": 1}]}', huge):
        path.write_text(text)
        with pytest.raises(UserError, match="--categories=.*c.json"):
            find_categories(small, (), path)

    path = tmp_path / "c.txt"
    path.write_text("cat\nsky\n")
    assert find_categories(small, (), path)[0] == (("cat", "sky"), (1, 2), 1)
    for text, words in {
        "cat\n": "config.model.num_stuff is 1, but the data lists 0",
        "cat\nsky\nsea": "config.model.num_stuff is 1, but the data lists 2",
        "cat\ncat\n": "it must name a class on every line, each another one",
        "": "it must name a class on every line, each another one",
        "cat\n\nsky\n": "it must name a class on every line, each another one",
    }.items():
        path.write_text(text)
        with pytest.raises(UserError, match=f"--categories=.*c.txt: {words}"):
            find_categories(small, (), path)
    with pytest.raises(UserError, match="--categories=gone.txt: there is no such file"):
        find_categories(small, (), Path("gone.txt"))

    ade = load_config("ade20k_semantic")
    assert find_categories(ade, (), None)[0].names == published_classes.ADE20K
    instance = load_config("coco_instance")
    assert find_categories(instance, (), None)[0] == published_classes.find("coco", "instance")
    semantic = load_config("coco_semantic")
    assert find_categories(semantic, (), None)[0].num_things == 0


def test_names_of_coco_are_those_of_its_files(coco_mini):
    for task, prefix in {"panoptic": "panoptic", "instance": "instances"}.items():
        listed = json.loads((coco_mini / f"annotations/{prefix}_val2017.json").read_text())
        categories = published_classes.find("coco", task)
        wanted = [(category["id"], category["name"]) for category in listed["categories"]]
        assert list(zip(categories.dataset_ids, categories.names)) == wanted
