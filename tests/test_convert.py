"""The command: as functions for what is right, in a process of its own for what a user sees."""

import json
import re
import subprocess
import sys
import zipfile
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import tiny_coco
import torch_format
from devices import environment
from flax import traverse_util
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from test_configs import ROWS
from tiny_weights import assert_equal, fill
from torch_format import Call, tensor

from knet_jax.config.files import load_config
from knet_jax.model import init_variables, make_model
from knet_jax.saved.checkpoints import Checkpoints
from knet_jax.saved.convert import export_weights, import_weights, table
from knet_jax.saved.models import load_start, open_model
from knet_jax.saved.parameter_names import CLASSES, from_reference, to_reference
from knet_jax.saved.weight_files import read_weights
from knet_jax.segmentation import published_classes
from knet_jax.system.errors import UserError

ROOT = Path(__file__).parents[1]
HAS_TORCH = find_spec("torch") is not None
TINY = "configs/coco_panoptic.py:tiny"
SPECS = (
    TINY,
    "configs/coco_panoptic.py:tiny,tiny_dcn",
    "configs/coco_panoptic.py:tiny,tiny_swin",
    "configs/coco_instance.py:tiny",
    "configs/ade20k_semantic.py:tiny",
    "configs/ade20k_semantic.py:tiny,psp",
    "configs/ade20k_semantic.py:tiny,deeplabv3",
    "configs/ade20k_semantic.py:tiny,uper",
    "configs/ade20k_semantic.py:tiny,tiny_swin",
    "configs/ade20k_semantic.py:tiny,baseline",
)
"""A small network of every family."""
QUICK = (TINY, "configs/ade20k_semantic.py:tiny,uper")


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(ROOT)


def shapes(spec, *overrides):
    config = load_config(spec, overrides)
    model = make_model(**config.model)
    return jax.eval_shape(partial(init_variables, model, 0))


@pytest.fixture
def save(tmp_path, torch_names):
    """Writes tensors as torch does: save(tensors, meta=…)."""

    def write(tensors, name="a.pth", **beside):
        state = {k: tensor(torch_names, x, str(i)) for i, (k, x) in enumerate(tensors.items())}
        return torch_format.write(tmp_path / name, {"state_dict": state, **beside})

    return write


@pytest.fixture(scope="module")
def variables():
    return fill(shapes(TINY))


@pytest.fixture
def tensors(variables):
    return {name: x.copy() for name, x in to_reference(variables).items()}


@pytest.mark.parametrize(
    "spec", [pytest.param(s, marks=[pytest.mark.slow] * (s not in QUICK)) for s in SPECS]
)
def test_there_and_back_is_equal_in_every_bit(tmp_path, save, spec):
    """From torch to a model, to safetensors, to a model."""
    variables = fill(shapes(spec))
    tensors = to_reference(variables)
    counter = {"backbone.bn1.num_batches_tracked": np.array(7)}
    report = import_weights(save(tensors | counter), spec, tmp_path / "model")
    assert report["used"] == sorted(tensors) and report["surplus"] == list(counter)
    assert report["anew"] == report["left_over"] == [] == report["interpolated"]
    opened = open_model(tmp_path / "model")
    assert_equal(jax.tree.map(np.asarray, opened.variables), variables)
    export_weights(tmp_path / "model", tmp_path / "b.safetensors")
    back = load_file(tmp_path / "b.safetensors")
    assert back.keys() == tensors.keys()
    for name, x in tensors.items():
        assert back[name].dtype == x.dtype
        np.testing.assert_array_equal(back[name], x)
    import_weights(tmp_path / "b.safetensors", spec, tmp_path / "again")
    again = open_model(tmp_path / "again")
    itself = open_model(tmp_path / "b.safetensors")
    assert_equal(jax.tree.map(np.asarray, itself.variables), variables)
    assert itself.config == opened.config and itself.categories == opened.categories
    assert itself.step == opened.step
    assert_equal(jax.tree.map(np.asarray, again.variables), variables)
    assert again.categories == opened.categories and again.config == opened.config


def networks():
    """A row of the documentation for every network, without those that differ in the recipe."""
    found = {}
    for row in ROWS:
        for spec in (row, f"{row},baseline" if ":" in row else f"{row}:baseline"):
            if "baseline" not in spec or "ade20k" in row:
                found.setdefault(load_config(spec).model.to_json(), spec)
    return list(found.values())


def write_by_torch(tensors, path, torch_names):
    """By torch itself where it is installed, else in its format."""
    if HAS_TORCH:
        import torch

        state = {name: torch.from_numpy(np.asarray(x)) for name, x in tensors.items()}
        torch.save({"state_dict": state, "meta": {"epoch": 12}}, path)
    else:
        state = {k: tensor(torch_names, x, str(i)) for i, (k, x) in enumerate(tensors.items())}
        torch_format.write(path, {"state_dict": state})


@pytest.mark.slow
def test_every_network_of_the_table_comes_from_torch_equal_in_every_bit(tmp_path, torch_names):
    specs = networks()
    assert len(specs) >= 18
    path = tmp_path / "a.pth"
    for spec in specs:
        template = shapes(spec)
        theirs = to_reference(
            jax.tree.map(lambda x: np.broadcast_to(np.float32(0), x.shape), template)
        )
        theirs = {name: parity.rule_weight(name, [*x.shape], 0) for name, x in theirs.items()}
        write_by_torch(theirs, path, torch_names)
        read = read_weights(path).tensors
        assert read.keys() == theirs.keys(), spec
        assert_equal(from_reference(read, template), from_reference(theirs, template))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("det_panoptic_r50_fwd", "configs/coco_panoptic.py"),
        ("det_instance_r50_fwd", "configs/coco_instance.py"),
        ("seg_fcn_fwd", "configs/ade20k_semantic.py"),
        ("seg_uper512_fwd", "configs/ade20k_semantic.py:uper,wide"),
    ],
)
def test_a_converted_checkpoint_computes_the_references_numbers(
    fixtures, tmp_path, torch_names, monkeypatch, capsys, name, spec
):
    """Masks, classes, and what is made of them, of a file that torch wrote."""
    manifest = json.loads((fixtures / f"{name}.json").read_text())
    write_by_torch(parity.rule_weights(manifest), tmp_path / "a.pth", torch_names)
    import_weights(tmp_path / "a.pth", spec, tmp_path / "model")
    opened = open_model(tmp_path / "model")
    monkeypatch.setattr(parity, "network", lambda fixture: (opened.model, opened.variables))
    monkeypatch.setattr(sys, "argv", ["parity.py", str(fixtures / f"{name}.json")])
    assert parity.main() == 0
    lines = capsys.readouterr().out.splitlines()
    last = {"det": "s2_mask", "seg": "logits_s3"}[name[:3]]
    assert any(line.split()[0].startswith(last) for line in lines)
    assert lines[-1].endswith(" 0 failed, 0 skipped")


# What does not fit.


def convert(*arguments):
    """Status and lines of standard error of the command in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "knet_jax.convert", *map(str, arguments)],
        cwd=ROOT,
        env=environment(1),
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout.splitlines(), done.stderr.splitlines()


def hostile(save, tensors):
    return save(tensors, meta=Call(eval, "print('owned')"))


def truncated(save, tensors):
    path = save(tensors)
    path.write_bytes(path.read_bytes()[:-1000])
    return path


def renamed(save, tensors):
    tensors["backbone.layer9.0.conv1.weight"] = tensors.pop("backbone.layer2.0.conv1.weight")
    return save(tensors)


def wrong_shape(save, tensors):
    tensors["backbone.conv1.weight"] = tensors["backbone.conv1.weight"][:, :, 1:]
    return save(tensors)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            hostile,
            r"the file cannot be read: it names __builtin__\.eval; accepted are dense tensors",
        ),
        (truncated, "the file cannot be read: it is a zip file without an end: is it truncated"),
        (
            renamed,
            r"no tensor backbone\.layer2\.0\.conv1\.weight \(for backbone/layer2_block0/conv1",
        ),
        (
            wrong_shape,
            r"backbone\.conv1\.weight has shape \[16, 3, 6, 7\]; the network needs \[16, 3",
        ),
    ],
)
def test_what_is_wrong_ends_in_one_line(tmp_path, save, tensors, make, message):
    path = make(save, tensors)
    out = tmp_path / "model"
    status, printed, errors = convert(path, "--config", TINY, "--output", out)
    assert (status, printed, len(errors)) == (2, [], 1), errors
    assert re.match(rf"convert\.py: {re.escape(str(path))}: .*{message}", errors[0]), errors
    assert not out.exists() and [file.name for file in tmp_path.iterdir()] == ["a.pth"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "accepted: CHECKPOINT --config"),
        (["a.pth", "b.pth", "--output", "c"], "accepted: CHECKPOINT --config"),
        (["a.pth", "--output", "c"], "--config is missing"),
        (["a.pth", "--output", "c", "--config", TINY], "a.pth: there is no such file"),
        (["tests", "--output", "c", "--entry", "ema"], "--entry is for a file"),
        (["a.pth", "--output", "c", "--ema"], "--ema is for a model"),
        (["docs", "--output", "c.safetensors", "--config", TINY], "--config is for a folder"),
        (["docs", "--output", "c.pth"], r"--output=c\.pth; accepted: a new folder, or"),
        (["docs", "--output", "c.safetensors"], "docs is no model: no run has been started here"),
        (["a.pth", "--output", "c.safetensors"], "a.pth: there is no such file"),
    ],
)
def test_wrong_flags_end_in_one_line(arguments, message):
    status, printed, errors = convert(*arguments)
    assert (status, printed, len(errors)) == (2, [], 1), errors
    assert re.search(message, errors[0]), errors


def test_left_over_tensors_end_it_unless_partial(tmp_path, save, tensors):
    path = save(tensors | {"roi_head.mask_head.3.fc_cls.bias": np.zeros(5, np.float32)})
    with pytest.raises(
        UserError, match=r"no place for 1 tensors .*mask_head\.3\.fc_cls\.bias; .*--partial"
    ):
        import_weights(path, TINY, tmp_path / "model")
    report = import_weights(path, TINY, tmp_path / "model", partial=True)
    assert report["left_over"] == ["roi_head.mask_head.3.fc_cls.bias"] and not report["anew"]
    assert "tensors left over" in table(report) and "mask_head.3.fc_cls.bias" in table(report)


def test_numbers_that_are_not_finite_end_it(tmp_path, save, tensors):
    tensors["neck.fpn_convs.1.conv.bias"][3] = np.nan
    with pytest.raises(UserError, match="numbers for params/neck/fpn/output1/bias are not all fi"):
        import_weights(save(tensors), TINY, tmp_path / "model")


def test_tensors_that_are_no_weights_are_named(tmp_path, save, tensors):
    tensors["backbone.bn1.weight"] = np.arange(16)
    with pytest.raises(UserError, match=r"backbone\.bn1\.weight holds int64; accepted are float"):
        import_weights(save(tensors), TINY, tmp_path / "model")


def test_another_network_is_named(tmp_path, save, tensors):
    with pytest.raises(UserError, match="no tensor"):
        import_weights(save(tensors), "configs/ade20k_semantic.py:tiny", tmp_path / "model")
    path = save({"encoder.weight": np.zeros((2, 2), np.float32)})
    with pytest.raises(UserError, match="nothing of it belongs to this network"):
        import_weights(path, TINY, tmp_path / "model")


def test_a_folder_that_holds_something_is_kept(tmp_path, save, tensors):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="--output=.* is there already"):
        import_weights(save(tensors), TINY, tmp_path / "model")
    assert (tmp_path / "model" / "config.json").read_text() == "{}"


def test_the_folder_that_one_is_in_is_not_made(tmp_path, save, tensors, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"--output=\. is there already"):
        import_weights(save(tensors), str(Path(__file__).parents[1] / TINY), Path("."))


def test_what_a_killed_conversion_left_is_removed(tmp_path, save, tensors):
    for name in (".model.part", ".model-b.part"):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
    import_weights(save(tensors), TINY, tmp_path / "model")
    assert {path.name for path in tmp_path.iterdir()} == {"a.pth", "model", ".model-b.part"}


def test_an_output_that_cannot_be_is_told_before_anything_is_read(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cannot write to .*file"):
        import_weights(tmp_path / "absent.pth", TINY, tmp_path / "file" / "model")
    with pytest.raises(ValueError, match=r"cannot write to .*file"):
        export_weights(tmp_path / "absent", tmp_path / "file" / "a.safetensors")
    (tmp_path / "a.safetensors").mkdir()
    with pytest.raises(ValueError, match=r"a\.safetensors; accepted: a new folder, or a file"):
        export_weights(tmp_path / "absent", tmp_path / "a.safetensors")


def test_a_full_disk_is_told_as_such(tmp_path, save, tensors, monkeypatch):
    def fill_disk(tensors, path, metadata):
        path.write_text("half")
        text = "Error while serializing: I/O error: No space left on device (os error 28)"
        raise SafetensorError(text)

    import_weights(save(tensors), TINY, tmp_path / "model")
    monkeypatch.setattr("knet_jax.convert.save_file", fill_disk)
    with pytest.raises(OSError, match="No space left on device") as raised:
        export_weights(tmp_path / "model", tmp_path / "b.safetensors")
    assert raised.value.filename == str(tmp_path / "b.safetensors")
    assert {path.name for path in tmp_path.iterdir()} == {"a.pth", "model"}


# What may start anew.


def parts_of(variables):
    return traverse_util.flatten_dict(jax.tree.map(np.asarray, variables), sep="/")


@pytest.mark.slow
def test_other_classes_keep_all_that_does_not_belong_to_classes(tmp_path, save, variables, tensors):
    counts = ("--config.model.num_things=3", "--config.model.num_stuff=2")
    path = save(tensors, meta={"CLASSES": published_classes.coco("panoptic").names})
    with pytest.raises(UserError, match=r"133 classes, but config\.model\.num_things=3 and num_st"):
        import_weights(path, TINY, tmp_path / "model", counts)
    listed = tmp_path / "classes.txt"
    listed.write_text("cat\ndog\nbird\nroad\nsky\n")
    report = import_weights(
        path, TINY, tmp_path / "model", counts, new_classes=True, categories_file=listed
    )
    opened = open_model(tmp_path / "model")
    assert opened.categories.names == ("cat", "dog", "bird", "road", "sky")
    assert opened.categories.num_things == 3
    ours, theirs = parts_of(opened.variables), parts_of(variables)
    assert set(report["anew"]) == {key for key in ours if ours[key].shape != theirs[key].shape}
    kept = [key for key in ours if key not in report["anew"]]
    assert len(kept) > 200 and len(report["anew"]) == 2 + 2 * 3
    for key in kept:
        np.testing.assert_array_equal(ours[key], theirs[key])
    assert ours["params/initial/class_kernels"].std() > 0
    assert all(CLASSES.fullmatch(name) for name in report["left_over"])
    assert "arrays that start anew        8" in table(report)

    # The same from a model, and as the start of a training.
    again = import_weights(
        tmp_path / "model", TINY, tmp_path / "more", ("--config.model.num_things=4", counts[1]),
        new_classes=True,
    )  # fmt: skip
    assert again["anew"] == report["anew"] and again["categories_from"] == "nowhere"
    fresh = fill(jax.tree.map(lambda x: x, opened.variables))
    loaded, origin = load_start(tmp_path / "model", fresh)
    assert origin == f"network of step 0 from {tmp_path / 'model'}"
    assert_equal(jax.tree.map(np.asarray, loaded), jax.tree.map(np.asarray, opened.variables))
    with pytest.raises(
        ValueError, match=r"init_weights: .*class_bias is \(5,\) in it, \(133,\) here"
    ):
        load_start(tmp_path / "model", variables)


def test_a_backbone_makes_a_model_whose_rest_starts_anew(tmp_path, save, variables, tensors):
    prefix = "backbone."
    classifier = {k.removeprefix(prefix): x for k, x in tensors.items() if k.startswith(prefix)}
    classifier |= {"fc.weight": np.zeros((10, 512), np.float32), "fc.bias": np.zeros(10)}
    report = import_weights(save(classifier), TINY, tmp_path / "model")
    ours, theirs = parts_of(open_model(tmp_path / "model").variables), parts_of(variables)
    assert set(report["anew"]) == {key for key in ours if "/backbone/" not in key}
    for key in ours.keys() - set(report["anew"]):
        np.testing.assert_array_equal(ours[key], theirs[key])
    assert sorted(report["surplus"]) == ["fc.bias", "fc.weight"]
    assert report["renamed"]["conv1.weight"] == "backbone.conv1.weight"
    del classifier["layer3.0.conv2.weight"]
    with pytest.raises(UserError, match=r"no tensor backbone\.layer3\.0\.conv2\.weight"):
        import_weights(save(classifier), TINY, tmp_path / "other")


def test_an_auxiliary_head_may_be_missing_or_left_over(tmp_path, save):
    spec = "configs/ade20k_semantic.py:tiny"
    tensors = to_reference(fill(shapes(spec)))
    head = {name for name in tensors if name.startswith("auxiliary_head.")}
    report = import_weights(
        save(tensors), spec, tmp_path / "a", ("--config.model.auxiliary_channels=0",)
    )
    assert set(report["left_over"]) == head and not report["anew"]
    without = {name: x for name, x in tensors.items() if name not in head}
    report = import_weights(save(without), spec, tmp_path / "b")
    assert report["anew"] and all("/auxiliary/" in key for key in report["anew"])
    assert set(report["missing"]) == head


def test_numbers_of_other_types_become_ours(tmp_path, save, tensors, variables):
    names_ = sorted(tensors)
    half = {name: x.astype(np.float16) for name, x in tensors.items()}
    half[names_[0]] = tensors[names_[0]].astype(np.float64)
    half[names_[1]] = tensors[names_[1]].astype(jnp.bfloat16)
    report = import_weights(save(half), TINY, tmp_path / "model")
    assert len(report["rounded"]) == 1
    opened = open_model(tmp_path / "model").variables
    assert {x.dtype for x in jax.tree.leaves(opened)} == {np.dtype("float32")}
    for a, b in zip(jax.tree.leaves(opened), jax.tree.leaves(variables)):
        np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-6)


# From a model to a file.


def test_a_step_or_the_average_of_a_run_is_written(tmp_path, tensors, variables):
    spec = "configs/coco_panoptic.py:tiny"
    path = tmp_path / "a.safetensors"
    save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, path)
    import_weights(path, spec, tmp_path / "run", ("--config.train.ema_decay=0.9",))
    twice = jax.tree.map(lambda x: 2 * x, variables)
    config = load_config(spec)
    with Checkpoints(tmp_path / "run" / "checkpoints", model=config.model.to_dict()) as checkpoints:
        progress = {"categories": published_classes.coco("panoptic")._asdict()}
        state = {**variables, "ema": twice["params"]}
        checkpoints.save(5, state, progress)
    said = export_weights(tmp_path / "run", path, "latest", ema=True)
    assert re.match(r"wrote \d+ tensors of step 5 \(\d+\.\d MiB\) to .*a\.safetensors", said)
    name = "rpn_head.init_kernels.weight"
    np.testing.assert_array_equal(load_file(path)[name], 2 * tensors[name])
    export_weights(tmp_path / "run", path, "0")
    np.testing.assert_array_equal(load_file(path)[name], tensors[name])
    assert read_weights(path).classes == published_classes.coco("panoptic").names


def test_a_zip_that_is_no_checkpoint(tmp_path):
    path = tmp_path / "a.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(UserError, match="a zip file, but no checkpoint of PyTorch"):
        import_weights(path, TINY, tmp_path / "model")


# The documentation.

SMALL = (
    "--config.model.channels=16",
    "--config.model.ffn_channels=32",
    "--config.model.num_heads=2",
    "--config.model.num_stages=1",
    "--config.model.backbone.width=8",
)
LITTLE = (
    *("--config.data.canvas=(64, 64)", "--config.data.short_side=(40, 64)"),
    *("--config.data.long_side=64", "--config.train.steps=1", "--config.eval.num_pictures=1"),
)


def commands():
    """Lines of the shell in the documentation, in order."""
    text = (ROOT / "docs" / "importing.md").read_text()
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line]


def write_dataset(folder, things, stuff):
    """Pictures whose four segments are of the first two classes of each kind."""
    used = iter((tiny_coco.DOG, tiny_coco.CAT)), iter((tiny_coco.GRASS, tiny_coco.SKY))
    listed = [
        {"id": next(used[not isthing], 1000 + i), "name": name, "isthing": isthing}
        for isthing, kind in ((1, things), (0, stuff))
        for i, name in enumerate(kind, 500 * isthing)
    ]
    return tiny_coco.write(folder, categories=listed)


@pytest.mark.slow
def test_the_commands_of_the_documentation(tmp_path, save):
    """With small networks and little data in the place of the published ones, in order."""
    coco = published_classes.coco("panoptic")
    write_dataset(tmp_path / "coco", coco.names[:80], coco.names[80:])
    data = write_dataset(
        tmp_path / "data", [f"t{i}" for i in range(12)], [f"s{i}" for i in range(5)]
    )
    (tmp_path / "mine.json").write_text(
        (data / "annotations" / "panoptic_val2017.json").read_text()
    )
    template = shapes(TINY, *SMALL)
    tensors = to_reference(
        jax.tree.map(lambda x: np.broadcast_to(np.float32(0), x.shape), template)
    )
    tensors = {name: parity.rule_weight(name, [*x.shape], 0) for name, x in tensors.items()}
    save(tensors, "knet.pth", meta={"CLASSES": coco.names})
    prefix = "backbone."
    save({k.removeprefix(prefix): x for k, x in tensors.items() if k.startswith(prefix)}, "r50.pth")

    places = {
        r"knet_s3\S+\.pth": tmp_path / "knet.pth",
        r"resnet50\S+\.pth": tmp_path / "r50.pth",
        r"\bmine\.json": tmp_path / "mine.json",
        r"\bruns/demo\b": tmp_path / "models/knet_r50",
        r"(?<==)coco$": tmp_path / "coco",
        r"(?<==)DATA": data,
        r"(?<=[ =])(?=(models|runs)/)": f"{tmp_path}/",
        r"(?<= )(?=demo\.safetensors)": f"{tmp_path}/",
        r"(configs/coco_panoptic\.py)(:ms3x)?": lambda m: (
            m[1] + (f"{m[2]},tiny" if m[2] else ":tiny")
        ),
    }
    lines = commands()
    assert len(lines) == 6
    (tmp_path / "models").mkdir()
    for i, line in enumerate(lines):
        for pattern, place in places.items():
            line = re.sub(pattern, place if callable(place) else str(place), line)
        program, *arguments = line.split()
        assert program == "python"
        if "safetensors" not in line:
            arguments += SMALL if "eval.py" not in line else ()
        if ".py" in arguments[0]:
            arguments += (*LITTLE, f"--config.data.data_dir={tmp_path / 'prepared'}")
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=environment(1),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, (line, done.stderr[-2000:])
        if i == 0:
            assert "tensors left over             0" in done.stdout
        if "train.py" in line:
            assert "network of step 0 from" in done.stdout
    assert (tmp_path / "models" / "knet_r50" / "metrics.json").is_file()
    assert open_model(tmp_path / "models" / "start").categories.names[11:13] == ("t11", "s0")
    assert load_file(tmp_path / "demo.safetensors").keys() == tensors.keys()

    if HAS_TORCH:
        text = (ROOT / "docs" / "importing.md").read_text()
        *_, example = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        subprocess.run([sys.executable, "-c", example], cwd=tmp_path, check=True)
        assert read_weights(tmp_path / "demo.pth").tensors.keys() == tensors.keys()
