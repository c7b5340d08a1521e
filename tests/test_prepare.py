import cv2
import pytest
from programs import status_of


@pytest.mark.parametrize("task", ["panoptic", "instance", "semantic"])
def test_shapes_are_prepared_checked_and_drawn(tmp_path, task, capsys):
    small = ("--config.data.num_train=6", "--config.data.num_val=2")
    keys = ("scale", "crop") if task == "semantic" else ("canvas", "short_side", "long_side")
    small += tuple(f"--config.data.{key}=None" for key in keys)
    arguments = ("--config", f"shapes_{task}:tiny", f"--config.data.data_dir={tmp_path}", *small)
    assert status_of("prepare", *arguments, "--check", "--output", tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert "train: prepared in" in said and "6 pictures decoded" in said and "ignored:" in said
    assert said.count("6 images, ") == said.count("2 images, ") == 1
    command = said.splitlines()[-1]
    assert command.startswith(f"To train on it: knet train --config=shapes_{task}:tiny --workdir=")
    assert command.endswith(" ".join(small))
    for split in ("train", "val"):
        sheet = cv2.imread(str(tmp_path / "out" / f"shapes_{task}_{split}.png"))
        assert sheet is not None and sheet.std() > 10


def test_mistakes_end_in_one_line(capsys):
    for arguments, message in (
        (("--config", "shapes_panoptic", "--workers=0"), "--workers: 0 is not accepted"),
        (
            ("--config", "shapes_panoptic", "--beam_options=-x"),
            "--beam_options needs --beam_runner",
        ),
        (("--config", "shapes_panoptic", "--config.data.flip=2"), "config.data.flip is 2"),
        (("--config", "shapes_panoptic", "--config.task=semantic"), "config.data.canvas"),
    ):
        assert status_of("prepare", *arguments) == 2
        said = capsys.readouterr().err
        assert message in said and len(said.strip().splitlines()) == 1
