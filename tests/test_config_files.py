import json
import re
from pathlib import Path

import pytest

import knet_jax
from knet_jax.config import files
from knet_jax.config.files import load_config
from knet_jax.config.schema import flatten
from knet_jax.config.validation import validate
from knet_jax.system.errors import UserError

FILE = """
from knet_jax.config.files import base

def get_config():
    config = base("coco_panoptic").get_config()
    config.data.root = "data/cells"
    config.update({"model": {"num_things": 2, "num_stuff": 1}, "train": {"log_every": 10}})
    return config

VARIANTS = {
    "long": {"train.epochs": 36.0, "optim.decay_at": (27, 33), "optim.lr": 0.3},
    "fast": {"optim.warmup_steps": 10, "optim.lr": 0.2},
    "small": {"model.backbone": {"name": "swin", "channels": 48}},
    "wrong": {"model.chanels": 3},
}
"""


@pytest.fixture
def spec(tmp_path):
    """A user's own file, which builds on one of the package."""
    path = tmp_path / "recipe.py"
    path.write_text(FILE)
    return str(path)


def get(config, key):
    for part in filter(None, key.split(".")):
        config = config[part]
    return config


def refuse(message, call, *arguments):
    """Checks that a call is refused in one line."""
    with pytest.raises(UserError, match=message) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)


def test_a_file_of_ones_own_builds_on_a_shipped_one(spec, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = load_config(spec)
    assert (config.model.num_things, config.data.root, config.train.log_every) == (
        2,
        "data/cells",
        10,
    )
    assert config.data.long_side == 1333  # of the file that it builds on
    assert config.model.backbone.num_deformable == 0  # of the schema
    refuse("there is no config 'coco'; accepted: ade20k_", files.base, "coco")


def test_variants_apply_from_left_to_right_and_overrides_last(spec):
    config = load_config(f"{spec}:long,fast")
    assert (config.train.epochs, config.optim.decay_at) == (36.0, (27, 33))
    assert (config.optim.warmup_steps, config.optim.lr) == (10, 0.2)
    assert load_config(f"{spec}:fast,long").optim.lr == 0.3
    assert load_config(f"{spec}:long", ["--config.optim.lr=7"]).optim.lr == 7.0
    backbone = load_config(f"{spec}:small").model.backbone  # a dict takes the place of a section
    assert backbone.channels == 48 and "frozen_stages" not in backbone


def test_configs_are_found_by_name_from_anywhere(monkeypatch, tmp_path, spec):
    monkeypatch.chdir(tmp_path)
    config = knet_jax.load_config("coco_panoptic:r101", {"optim.lr": 2e-4})
    assert (config.model.backbone.depths, config.optim.lr) == ((3, 4, 23, 3), 2e-4)
    refuse("no file coco_panoptik; did you mean coco_panoptic", load_config, "coco_panoptik")
    refuse(
        "no file configs/coco_panoptic.py; did you mean", load_config, "configs/coco_panoptic.py"
    )
    # Those of ./configs come first, and may have the name of the one that they build on.
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/coco_panoptic.py").write_text(FILE)
    assert load_config("coco_panoptic").data.root == "data/cells"
    assert load_config("coco_instance").data.root == "data/coco"
    for name, text, message in (
        ("empty.py", "", "empty.py: there is no function get_config"),
        ("text.py", "no Python at all", "text.py, cannot be read: SyntaxError: invalid syntax"),
        ("zero.py", "a = 1\n1/0", "zero.py, line 2, cannot be read: ZeroDivisionError: "),
        ("import.py", "import nothing", "import.py, line 1, cannot be read: ModuleNotFoundError"),
        ("exit.py", "import sys; sys.exit(5)", "exit.py, line 1, cannot be read: SystemExit: 5"),
        ("none.py", "get_config = lambda: None", "none.py, cannot be read: AssertionError"),
        ("deep.py", "def get_config(): return get_config()", "line 1, .* RecursionError: "),
        (
            "more.py",
            "get_config = lambda: {'task': 'panoptic', 'data': 'x'}",
            "config.data.dataset is missing",
        ),
        (
            "task.py",
            "get_config = lambda: {'task': [1]}",
            r"task.py: config.task is \(1,\); accepted",
        ),
        ("new.py", FILE.replace('"log_every"', '"log_evry"'), "no key config.train.log_evry; did"),
    ):
        (tmp_path / name).write_text(text)
        refuse(message, load_config, str(tmp_path / name))
    for variants in ("[1]", "{'a': 5}", "{5: {}}", "5"):
        (tmp_path / "variants.py").write_text(f"{FILE}\nVARIANTS = {variants}")
        refuse("variants.py", load_config, f"{tmp_path}/variants.py:a")


def test_overrides(spec):
    for arguments, key, value in (
        (["--config.train.batch_size=3"], "train.batch_size", 3),
        (["--config.train.batch_size", "3"], "train.batch_size", 3),
        (["--config.train.epochs=3"], "train.epochs", 3.0),
        (["--config.data.root=a=b c"], "data.root", "a=b c"),
        (["--config.data.train_split", "7"], "data.train_split", "7"),
        (["--config.data.canvas=(32, 64)"], "data.canvas", (32, 64)),
        (["--config.optim.decay_at=()"], "optim.decay_at", ()),
        (["--config.optim.decay_at=9,10"], "optim.decay_at", (9, 10)),
        (["--config.optim.decay_at=9"], "optim.decay_at", (9,)),
        (["--config.optim.scale_lr"], "optim.scale_lr", True),
        (["--noconfig.model.neck.sine"], "model.neck.sine", False),
        (["--config.optim.decay_at=1,2", "--config.optim.decay_at=3"], "optim.decay_at", (3,)),
        (["--config.model.backbone.window=5", "--config.model.backbone.name=swin"], "seed", None),
        ({"optim.lr": 1}, "optim.lr", 1.0),
        ({"data.root": Path("a")}, "data.root", "a"),
        ({"data.canvas": [32, 64]}, "data.canvas", (32, 64)),
    ):
        if value is None:  # keys that are not of the chosen backbone are still stated by the file
            refuse("no key config.model.backbone.frozen_stages", load_config, spec, arguments)
            continue
        found = get(load_config(spec, arguments), key)
        assert found == value and type(found) is type(value), arguments
    config = load_config("ade20k_semantic", {"model.neck.scales": (1, 2), "model.neck.name": "psp"})
    assert config.model.neck.to_dict() == {"name": "psp", "norm": "batch", "scales": (1, 2)}


def test_what_does_not_exist_is_one_line_with_what_does(spec):
    for variant, arguments, message in (
        (":lnog", [], "there is no variant 'lnog'; did you mean long?"),
        (":zzz", [], "there is no variant 'zzz'; accepted: fast, long, small, wrong"),
        (
            ":wrong",
            [],
            "variant 'wrong': .*no key config.model.chanels; did you mean model.channels",
        ),
        ("", ["--config.train.batchsize=3"], "no key config.train.batchsize; did you mean train.b"),
        ("", ["--config.lr=3"], "no key config.lr; did you mean optim.lr"),
        ("", ["--config.optim.learning_rate=3"], "no key config.optim.learning_rate; .*optim.lr.$"),
        ("", {"optim.lr": 10**400}, "accepted: a value like 0.0001"),
        ("", ["--config.optim=3"], "there is no key config.optim;"),
        ("", ["--config.train.batch_size"], "batch_size=True: accepted: a value like 16"),
        ("", ["--config.optim.lr=nan"], "lr=nan: accepted: a value like 0.0001"),
        ("", ["--config.seed=1", "x"], "'x' belongs to no flag"),
        ("", ["--config.task=instances"], "config.task is 'instances'; accepted: panoptic, inst"),
    ):
        refuse(message, load_config, spec + variant, arguments)


def test_default_workdir():
    for spec, workdir in (
        ("coco_panoptic", "runs/coco_panoptic"),
        ("configs/coco_panoptic.py:r101", "runs/coco_panoptic_r101"),
        ("/a/b/x.py:r101,ms3x", "runs/x_r101_ms3x"),
    ):
        assert files.default_workdir(spec) == Path(workdir)


def test_a_saved_config_is_the_same_config(spec, tmp_path):
    config = load_config(f"{spec}:long")
    files.save_config(config, tmp_path)
    loaded = files.load_saved_config(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert loaded.optim.groups[0] == ("frozen", "backbone/(stem|layer1)_.*", 0.0, 0.0)
    moved = files.load_saved_config(tmp_path, ["--config.data.root=/new"])
    assert moved.data.root == "/new"
    refuse(
        "did you mean data.root", files.load_saved_config, tmp_path, ["--config.data.roots=/new"]
    )


def change_saved(workdir, change):
    saved = json.loads((workdir / "config.json").read_text())
    change(saved)
    (workdir / "config.json").write_text(json.dumps(saved))


def test_a_config_of_an_older_version_has_todays_keys(spec, tmp_path):
    """Keys that have come since get their defaults; that is no difference to a resumed run."""
    config = load_config(spec)
    files.save_config(config, tmp_path)

    def as_before(saved):
        del saved["model"]["neck"], saved["model"]["backbone"]["num_deformable"]
        del saved["data"]["min_things"], saved["loss"]["rank"], saved["model"]["dropout"]

    change_saved(tmp_path, as_before)
    assert files.load_saved_config(tmp_path).to_dict() == config.to_dict()
    assert files.check_resume(config, tmp_path) == []
    change_saved(tmp_path, lambda saved: saved["model"].update(kernels=3))
    refuse("no key config.model.kernels; did you mean ", files.load_saved_config, tmp_path)


def test_an_empty_value_is_no_default(spec, tmp_path):
    """Else a network would be another one than the saved one, in silence."""
    files.save_config(load_config(spec), tmp_path)
    change_saved(tmp_path, lambda saved: saved["model"]["neck"].update(sine={}))
    refuse(
        "config.model.neck.sine is {}; accepted",
        lambda: validate(files.load_saved_config(tmp_path)),
    )
    change_saved(tmp_path, lambda saved: saved.update(eval={}))
    refuse("no key config.eval", files.load_saved_config, tmp_path)


ODD = (None, "x", "", [], {}, {"a": 1}, [[1]], ["a", "b"], -1, 0, 1.5, True, 1e999, 10**30, "1")


@pytest.mark.parametrize("of", ("shapes_panoptic:tiny", "ade20k_semantic:uper"))
def test_odd_values_of_a_saved_config_are_sound_or_end_in_one_line(of, tmp_path):
    """Nothing but a UserError, whatever stands where."""
    config = load_config(of)
    files.save_config(config, tmp_path)
    refused = 0
    for key in flatten(config):
        *sections, last = key.split(".")
        for value in ODD:
            saved = config.to_dict()
            get(saved, ".".join(sections))[last] = value
            (tmp_path / "config.json").write_text(json.dumps(saved))
            try:
                validate(files.load_saved_config(tmp_path))
            except UserError as error:
                assert "\n" not in str(error), error
                refused += 1
    assert refused > 8 * len(flatten(config))


def test_a_workdir_without_a_readable_config_is_named(tmp_path):
    refuse("no run has been started here", files.load_saved_config, tmp_path)
    for text in (
        '{"seed": ', "[1]", "null", "[" * 10**5, b"\xff", '{"data": 5}', '{"a.b": 1}', '{"task": null}',
        '{"task": "panoptic", "__class__": 1, "items": 2, "_locked": 3}', '{"a": {"' * 10**4,
        '{"model": null}', '{"task": {"items": {"a": 1}}}',
    ):  # fmt: skip
        content = text if isinstance(text, bytes) else text.encode()
        (tmp_path / "config.json").write_bytes(content)
        refuse("config.json", files.load_saved_config, tmp_path)


def test_resuming_says_what_differs_and_refuses_another_run(spec, tmp_path):
    files.save_config(load_config(spec), tmp_path)
    assert files.check_resume(load_config(spec), tmp_path) == []
    harmless = {"train.epochs": 24, "optim.lr": 0.2, "data.root": "/new"}
    assert files.check_resume(load_config(spec, harmless), tmp_path) == [
        "config.data.root was 'data/cells', now '/new'",
        "config.optim.lr was 0.0001, now 0.2",
        "config.train.epochs was 12.0, now 24.0",
    ]
    for key, value in {
        "seed": 1,
        "model.backbone.depths": (3, 4, 23, 3),
        "train.batch_size": 8,
        "data.canvas": (32, 32),
        "optim.groups": (("b", ".*", 1.0, 1.0),),
    }.items():
        message = (
            rf"cannot be resumed .*config\.{re.escape(key)} was .*, now .*init_weights={tmp_path}"
        )
        refuse(message, files.check_resume, load_config(spec, {key: value}), tmp_path)


def test_a_converted_model_is_no_run(spec, tmp_path):
    files.save_config(load_config(spec), tmp_path)
    (tmp_path / files.CONVERSION_NAME).write_text("{}")
    refuse(
        r"no run; start from it by --config\.init_weights=",
        files.check_resume,
        load_config(spec),
        tmp_path,
    )
