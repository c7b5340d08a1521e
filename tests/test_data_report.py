"""What is said and drawn of a prepared dataset."""

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
    assert line_of(report, "overlaps:").startswith("overlaps: 0.00 %")
    assert f"floor  {100 * counts[2] / total:7.3f} %" in report
    assert "1 problems:" in report and "1.png is missing, left out" in report
    assert "2 pictures decoded" in report and "0 broken pictures" in report


def test_panoptic_report_counts_crowds_as_ignored(tmp_path):
    root = tiny_coco.write(tmp_path / "coco", splits=("train",))
    config = tiny_coco.data_config(tmp_path / "prepared", root)
    split = pipeline.load_split(config, "train", "panoptic")
    truths = [split.truth(i) for i in range(5)]
    ignored = sum(
        int(np.isin(t.ids, [0, *(s.id for s in t.segments if s.iscrowd)]).sum()) for t in truths
    )
    total = sum(truth.ids.size for truth in truths)
    report = dataset_report.report(split)
    assert line_of(report, "ignored:").startswith(f"ignored: {100 * ignored / total:.2f} %")


def test_instance_report_and_sheet(tmp_path):
    """Overlaps and hidden masks are counted; a broken picture is named, and not drawn."""
    root = tiny_coco.write_instances(tmp_path / "coco", splits=("train",))

    def change(content):
        # A thing as large as the cat of the picture, exactly on it.
        content["annotations"].append(content["annotations"][1] | {"id": 99, "category_id": 3})

    tiny_coco.edit(root, change, prefix="instances_")
    path = root / "train2017" / "train_1.jpg"
    path.write_bytes(path.read_bytes()[:-300])  # only its decoding shows the damage
    config = tiny_coco.data_config(tmp_path / "prepared", root)
    split = pipeline.load_split(config, "train", "instance")
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

    for count, shown in ((12, 4), (2, 2), (1, 1)):
        sheet = dataset_report.sheet(split, count)
        assert sheet.dtype == np.uint8
        assert sheet.shape[1] // dataset_report.CELL == min(3, shown)
        rows = np.array_split(sheet, -(-shown // 3))
        cells = [cell for row in rows for cell in np.array_split(row, min(3, shown), axis=1)]
        assert [bool((cell != 255).any()) for cell in cells] == [
            i < shown for i in range(len(cells))
        ]


def test_every_task_can_be_drawn(tmp_path):
    for task in ("panoptic", "instance", "semantic"):
        split = pipeline.load_split(tiny_coco.data_config(tmp_path), "val", task)
        assert dataset_report.sheet(split, 3).shape[1] // dataset_report.CELL == 3
        assert "10 pictures decoded" in dataset_report.report(split)
