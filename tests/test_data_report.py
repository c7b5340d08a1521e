"""What is said and drawn of a prepared dataset."""

import re

import numpy as np
import tiny_coco
import tiny_maps

from knet_jax.data import dataset_report, pipeline


def line_of(report, start):
    [line] = [line for line in report.splitlines() if line.strip().startswith(start)]
    return line.strip()


def test_semantic_report(tmp_path):
    root = tiny_maps.write_folder(tmp_path / "maps", splits=("train",))
    (root / "labels/train/1.png").unlink()
    config = tiny_coco.data_config(tmp_path / "prepared", root, **tiny_maps.FOLDER)
    split = pipeline.load_split(config, "train", "semantic")
    report = dataset_report.report(split)
    maps = [split.truth(i) for i in range(2)]
    total = sum(one.size for one in maps)
    counts = sum(np.bincount(one.ravel(), minlength=4) for one in maps)
    assert line_of(report, "ignored:") == (
        f"ignored: {100 * counts[0] / total:.2f} % of the pixels; 0 pictures have no label"
    )
    assert re.search(rf"floor .* {100 * counts[2] / total:.2f} % of the pixels", split.description)
    assert "2 pictures decoded" in report and "0 broken pictures" in report


def test_instance_report_and_sheet(tmp_path, monkeypatch):
    """Overlaps and hidden masks are counted; a broken picture is named, and not drawn."""
    root = tiny_coco.write_instances(tmp_path / "coco", splits=("train",))

    def change(content):
        # A thing as large as the cat of the picture, exactly on it.
        content["annotations"].append(content["annotations"][1] | {"id": 99, "category_id": 3})

    tiny_coco.edit(root, change, prefix="instances_")
    config = tiny_coco.data_config(tmp_path / "prepared", root)
    split = pipeline.load_split(config, "train", "instance")
    record = split.record

    def damaged(index):
        return record(index)._replace(image=record(index).image[: -300 if index == 1 else None])

    monkeypatch.setattr(split, "record", damaged)
    report = dataset_report.report(split)
    both = covered = 0
    for index in (0, 2, 3, 4):
        (_, _, dog), (_, _, cat), _ = tiny_coco.instance_masks(*split.sizes[index])
        both += int((dog & cat).sum()) + (int(cat.sum()) if index == 0 else 0)
        covered += int((dog | cat).sum())
    assert line_of(report, "overlaps:") == (
        f"overlaps: {100 * both / covered:.2f} % of the labelled pixels, in 4 pictures; "
        "1 segments are hidden"
    )
    assert "4 pictures decoded" in report and "1 broken pictures:" in report
    assert "train_1.jpg: the picture is truncated" in report

    sheet = dataset_report.sheet(split)
    assert sheet.dtype == np.uint8 and sheet.shape[1] // dataset_report.CELL == 3
    cells = [cell for row in np.array_split(sheet, 2) for cell in np.array_split(row, 3, axis=1)]
    assert [bool((cell != 255).any()) for cell in cells] == [True] * 4 + [False] * 2


def test_what_is_suspicious_is_said(tmp_path):
    """Of each: a mask of one value a class, the value where nothing is drawn, and what is said."""
    for number, (names, ignore, values, said) in enumerate(
        (
            ("background\nobject", 255, (0, 255), "beside 'background' there are only ignored"),
            ("background\nobject", 255, (0, 1), "ignore_index=0"),
            ("void\nobject\nlamp", 0, (1, 2), ""),
            ("wall\nobject\nlamp", 255, (1, 2), "nothing is annotated as wall"),
            ("wall\nobject", 255, (1,), "'object' has 99 %"),
        )
    ):
        root = tiny_maps.write_folder(tmp_path / str(number), values, splits=("train",))
        (root / "classes.txt").write_text(names)
        changes = tiny_maps.FOLDER | {"ignore_index": ignore}
        config = tiny_coco.data_config(tmp_path / "prepared", root, **changes)
        found = dataset_report.find_suspicious(
            pipeline.load_split(config, "train", "semantic"), config
        )
        assert said in " ".join(found) and bool(found) == bool(said)
    root = tiny_coco.write_instances(tmp_path / "coco", splits=("train",))
    config = tiny_coco.data_config(tmp_path / "prepared", root, max_things=1, long_side=30)
    split = pipeline.load_split(config, "train", "instance")
    overfull, large = dataset_report.find_suspicious(split, config)
    assert overfull.startswith(
        "5 pictures have more than config.data.max_things = 1 things (up to 2)"
    )
    assert "are 64 x 64 (median) and shown at 30 x 30" in large

    def crowds(content):
        for annotation in content["annotations"]:
            annotation["iscrowd"] = 1

    tiny_coco.edit(root, crowds, prefix="instances_")
    split = pipeline.load_split(config, "train", "instance")
    assert "all things are crowds" in " ".join(dataset_report.find_suspicious(split, config))
