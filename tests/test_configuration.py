import json
from pathlib import Path

import pytest

from knet_jax.config import files
from knet_jax.config.files import load_config
from knet_jax.system.errors import UserError

ROOT = Path(__file__).parents[1]

FILE = """
from ml_collections import ConfigDict

def get_config():
    return ConfigDict({
        "seed": 0,
        "init_weights": "",
        "model": {"depths": (3, 4), "dtype": "float32"},
        "data": {"root": "", "canvas": (64, 96)},
        "optim": {"lr": 0.1, "scale_lr": False, "decay_at": (8, 11), "groups": (("a", ".*", 1.0),)},
        "train": {"batch_size": 16, "epochs": 12.0},
    })

VARIANTS = {
    "long": {"train.epochs": 36.0, "optim.decay_at": (27, 33), "optim.lr": 0.3},
    "deep": {"model.depths": (3, 4, 23), "optim.lr": 0.2},
    "wrong": {"model.depth": (3,)},
}
"""


@pytest.fixture
def spec(tmp_path):
    path = tmp_path / "recipe.py"
    path.write_text(FILE)
    return str(path)


def test_variants_apply_from_left_to_right_and_overrides_last(spec):
    config = load_config(f"{spec}:long,deep")
    assert (config.train.epochs, config.optim.decay_at) == (36.0, (27, 33))
    assert (config.model.depths, config.optim.lr) == ((3, 4, 23), 0.2)
    assert load_config(f"{spec}:deep,long").optim.lr == 0.3
    assert load_config(f"{spec}:long", ["--config.optim.lr=7"]).optim.lr == 7.0


@pytest.mark.parametrize(
    ("arguments", "key", "value"),
    [
        (["--config.train.batch_size=3"], "train.batch_size", 3),
        (["--config.train.batch_size", "3"], "train.batch_size", 3),
        (["--config.data.root=a=b c"], "data.root", "a=b c"),
        (["--config.data.canvas=(32, 64)"], "data.canvas", (32, 64)),
        (["--config.optim.decay_at=()"], "optim.decay_at", ()),
        (["--config.optim.decay_at=9,10"], "optim.decay_at", (9, 10)),
        (["--config.optim.scale_lr"], "optim.scale_lr", True),
        (["--noconfig.optim.scale_lr"], "optim.scale_lr", False),
        (["--config.seed=1", "--config.seed=2"], "seed", 2),
        (['--config.optim.groups=(("b", "x", 0.0),)'], "optim.groups", (("b", "x", 0.0),)),
    ],
)
def test_overrides(spec, arguments, key, value):
    config = load_config(spec, arguments)
    for part in key.split("."):
        config = config[part]
    assert config == value
    assert type(config) is type(value)


@pytest.mark.parametrize(
    ("variant", "arguments", "message"),
    [
        (":lnog", [], "there is no variant 'lnog'; did you mean long?"),
        (":zzz", [], "there is no variant 'zzz'; accepted: deep, long, wrong"),
        (":wrong", [], "variant 'wrong' .*no key config.model.depth; did you mean model.depths"),
        ("", ["--config.train.batchsize=3"], "no key config.train.batchsize; did you mean train.b"),
        ("", ["--config.lr=3"], "no key config.lr; did you mean optim.lr"),
        ("", ["--config.optim=3"], "there is no key config.optim;"),
        ("", ["--config.train.batch_size=1.5"], "batch_size=1.5: .*; accepted: a value like 16"),
        ("", ["--config.optim.lr=fast"], "lr=fast: .*; accepted: a value like 0.1"),
        ("", ["--config.optim.scale_lr=maybe"], "maybe.*; accepted: a value like False"),
        ("", ["--config.train.batch_size"], "Missing value for flag"),
        ("", ["--config.optim.scale_lr", "x"], "'x' belongs to no flag"),
    ],
)
def test_what_does_not_exist_is_one_line_with_what_does(spec, variant, arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        load_config(spec + variant, arguments)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named_with_those_there_are(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match="no file coco.py; accepted: .*configs/coco_panoptic.py"):
        load_config("coco.py:r101")
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(UserError, match=r"has no function get_config"):
        load_config(str(tmp_path / "empty.py"))
    (tmp_path / "text.py").write_text("no Python at all")
    with pytest.raises(UserError, match=r"text.py is no Python: invalid syntax"):
        load_config(str(tmp_path / "text.py"))


@pytest.mark.parametrize(
    ("spec", "workdir"),
    [
        ("configs/coco_panoptic.py", "runs/coco_panoptic"),
        ("configs/coco_panoptic.py:r101", "runs/coco_panoptic_r101"),
        ("/a/b/x.py:r101,ms3x", "runs/x_r101_ms3x"),
    ],
)
def test_default_workdir(spec, workdir):
    assert files.default_workdir(spec) == Path(workdir)


def test_a_saved_config_is_the_same_config(spec, tmp_path):
    config = load_config(f"{spec}:long")
    files.save_config(config, tmp_path)
    loaded = files.load_saved_config(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert loaded.optim.groups == (("a", ".*", 1.0),)
    moved = files.load_saved_config(tmp_path, ["--config.data.root=/new"])
    assert moved.data.root == "/new"
    with pytest.raises(UserError, match=r"did you mean data.root"):
        files.load_saved_config(tmp_path, ["--config.data.roots=/new"])


def test_a_workdir_without_a_readable_config_is_named(tmp_path):
    with pytest.raises(UserError, match="no run has been started here"):
        files.load_saved_config(tmp_path)
    (tmp_path / "config.json").write_text('{"seed": ')
    with pytest.raises(UserError, match=r"config.json is broken: "):
        files.load_saved_config(tmp_path)


def test_resuming_says_what_differs_and_refuses_another_run(spec, tmp_path):
    files.save_config(load_config(spec), tmp_path)
    assert files.check_resume(load_config(spec), tmp_path) == []
    harmless = ["--config.train.epochs=24", "--config.optim.lr=0.2", "--config.data.root=/new"]
    assert files.check_resume(load_config(spec, harmless), tmp_path) == [
        "config.data.root was '', now '/new'",
        "config.optim.lr was 0.1, now 0.2",
        "config.train.epochs was 12.0, now 24.0",
    ]
    for argument in (
        "--config.seed=1",
        "--config.model.depths=(3, 4, 23)",
        "--config.train.batch_size=8",
        "--config.data.canvas=(32, 32)",
        '--config.optim.groups=(("b", ".*", 1.0),)',
    ):
        with pytest.raises(UserError, match=r"cannot be resumed .*\bwas .*, now ") as caught:
            files.check_resume(load_config(spec, [argument]), tmp_path)
        assert argument.removeprefix("--").partition("=")[0] in str(caught.value)

    # A key that one of the two does not have is a difference too.
    saved = json.loads((tmp_path / "config.json").read_text())
    del saved["model"]["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(saved))
    with pytest.raises(UserError, match=r"config.model.dtype was 'absent', now 'float32'"):
        files.check_resume(load_config(spec), tmp_path)


def test_a_converted_model_is_no_run(spec, tmp_path):
    files.save_config(load_config(spec), tmp_path)
    (tmp_path / files.CONVERSION_NAME).write_text("{}")
    with pytest.raises(UserError, match=r"no run; start from it by --config\.init_weights="):
        files.check_resume(load_config(spec), tmp_path)
