"""From files of weights to models, and from models to files."""

import json
import re
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_format
from flax.traverse_util import flatten_dict
from programs import status_of
from safetensors import SafetensorError
from safetensors.numpy import load_file
from tiny_weights import assert_equal, fill, shapes_of
from torch_format import Call, tensor

from knet_jax.config.files import load_config
from knet_jax.saved.convert import export_weights, import_weights, report_table
from knet_jax.saved.fitting import fit_network
from knet_jax.saved.models import open_model
from knet_jax.saved.parameter_names import CLASSES, to_reference
from knet_jax.saved.weight_files import read_weights
from knet_jax.system.errors import UserError

CONFIGS = Path(__file__).parents[1] / "configs"
PANOPTIC = f"{CONFIGS / 'coco_panoptic.py'}:tiny"
SEMANTIC = f"{CONFIGS / 'ade20k_semantic.py'}:tiny"
SMALL = (
    "--config.model.channels=16",
    "--config.model.ffn_channels=32",
    "--config.model.num_heads=2",
    "--config.model.num_stages=1",
    "--config.model.backbone.width=8",
    "--config.model.backbone.depths=(1, 1, 1, 1)",
)
COUNTS = ("--config.model.num_things=3", "--config.model.num_stuff=2")


@cache
def make_variables(spec):
    return fill(shapes_of(load_config(spec, SMALL).model.to_dict()))


def make_tensors(spec=PANOPTIC):
    return {name: x.copy() for name, x in to_reference(make_variables(spec)).items()}


@pytest.fixture
def save(tmp_path, torch_names):
    """Writes tensors as torch does: save(tensors, meta=…)."""

    def write(tensors, **beside):
        state = {k: tensor(torch_names, x, str(i)) for i, (k, x) in enumerate(tensors.items())}
        return torch_format.write(tmp_path / "a.pth", {"state_dict": state, **beside})

    return write


def convert(path, output, *overrides, spec=PANOPTIC, **options):
    return import_weights(path, spec, output, [*SMALL, *overrides], **options)


@pytest.mark.parametrize("spec", [PANOPTIC, SEMANTIC])
def test_there_and_back_is_equal_in_every_bit(tmp_path, save, spec):
    """From torch to a model, and on to safetensors."""
    variables, tensors = make_variables(spec), make_tensors(spec)
    counter = {"backbone.bn1.num_batches_tracked": np.array(7)}
    report = convert(save(tensors | counter), tmp_path / "model", spec=spec)
    assert report["used"] == sorted(tensors) and report["surplus"] == list(counter)
    assert report["anew"] == report["left_over"] == [] == report["interpolated"]
    assert json.loads((tmp_path / "model" / "conversion.json").read_text()) == json.loads(
        json.dumps(report)
    )
    opened = open_model(tmp_path / "model")
    assert_equal(opened.variables, variables)
    file = tmp_path / "b.safetensors"
    export_weights(tmp_path / "model", file)
    assert_equal(load_file(file), tensors)
    assert read_weights(file).classes == opened.categories.names


# What does not fit.


def test_what_is_wrong_is_one_line_and_nothing_is_written(tmp_path, save):
    tensors = make_tensors()
    config = load_config(PANOPTIC, SMALL)
    template = shapes_of(config.model.to_dict())
    first, second = "backbone.layer2.0.conv1.weight", "backbone.layer9.0.conv1.weight"
    stem, extra = tensors["backbone.conv1.weight"], "roi_head.mask_head.3.fc_cls.bias"
    name = "neck.fpn_convs.1.conv.bias"
    table = [
        ({}, {"meta": Call(eval, "print('owned')")}, r"cannot be read: it names __builtin__\.eval"),
        ({first: None, second: tensors[first]}, {}, r"no tensor backbone\.layer2\.0\.conv1\.weig"),
        (
            {"backbone.conv1.weight": stem[:, :, 1:]},
            {},
            r"backbone\.conv1\.weight has shape \[8, 3, 6, 7\]; the network needs \[8, 3, 7, 7\]",
        ),
        (
            {extra: np.zeros(5, np.float32)},
            {},
            r"no place for 1 tensors .*mask_head\.3\.fc_cls.*--p",
        ),
        (
            {name: np.full(16, np.nan, np.float32)},
            {},
            "numbers for params/neck/fpn/output1/bias ar",
        ),
        ({name: np.arange(16)}, {}, r"convs\.1\.conv\.bias holds int64; accepted are floating"),
        (
            {"rpn_head.conv_seg.weight": np.zeros((5, 16, 1, 1), np.float32)},
            {},
            r"it has 5 classes, but config\.model\.num_things=80 and num_stuff=53; give its own",
        ),
        (
            {key: None for key in tensors} | {"encoder.weight": np.zeros((2, 2), np.float32)},
            {},
            "nothing of it belongs to this network",
        ),
    ]
    for changes, beside, message in table:
        changed = {k: x for k, x in (tensors | changes).items() if x is not None}
        path = save(changed, **beside)
        with pytest.raises(UserError, match=message) as caught:
            fit_network(read_weights(path), template, config)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=rf"^{re.escape(str(path))}: {message}"):
        convert(path, tmp_path / "model")
    assert [file.name for file in tmp_path.iterdir()] == ["a.pth"]
    report = convert(save(tensors | {extra: np.zeros(5)}), tmp_path / "model", partial=True)
    assert report["left_over"] == [extra] and not report["anew"]
    assert re.search(rf"tensors left over +1  {re.escape(extra)}", report_table(report))


def test_outputs_that_cannot_be_are_told_before_anything_is_read(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "a.safetensors").mkdir()
    monkeypatch.chdir(tmp_path)
    absent = Path("absent.pth")
    for output, words in (
        ("file/model", "cannot write to file"),
        ("model", "--output=model is there already"),
        (".", r"--output=\. is there already"),
    ):
        with pytest.raises(UserError, match=words):
            convert(absent, Path(output))
    for output, words in (
        ("file/a.safetensors", "cannot write to file"),
        ("a.safetensors", r"a\.safetensors; accepted: a new folder, or a file"),
        ("a.pth", r"a\.pth; accepted: a new folder, or a file"),
    ):
        with pytest.raises(UserError, match=words):
            export_weights(absent, Path(output))
    assert (tmp_path / "model" / "config.json").read_text() == "{}"


def test_wrong_flags_of_the_command_end_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    for arguments, message in (
        ("a.pth b.pth --output c", "accepted: CHECKPOINT --config"),
        ("a.pth --output c", "a.pth: there is no such file"),
        (f"a.pth --output c --config {PANOPTIC}", "a.pth: there is no such file"),
        ("folder --output c --entry ema", "--entry is for a file"),
        ("a.pth --output c --ema", "--ema is for a model"),
        ("folder --output c.safetensors --config c", "--config is for a folder"),
        ("folder --output c.safetensors", "folder is no model: no run has been started here"),
    ):
        assert status_of("convert", *arguments.split()) == 2
        said = capsys.readouterr()
        assert not said.out and said.err.count("\n") == 1
        assert message in said.err


# What stays as initialized.


def test_other_classes_and_a_backbone_keep_what_fits(tmp_path, save, monkeypatch):
    """Of a model, and of a file. The rest is as initialized, and the report says which is which."""
    fresh = fill(shapes_of(load_config(PANOPTIC, (*SMALL, *COUNTS)).model.to_dict()))
    fresh = jax.tree.map(lambda x: -x, fresh)
    monkeypatch.setattr("knet_jax.saved.fitting.init_variables", lambda model, seed: fresh)
    variables, tensors = make_variables(PANOPTIC), make_tensors()
    names = ("cat", "dog", "bird", "road", "sky")
    (tmp_path / "classes.txt").write_text("\n".join(names))
    for name in (".mine.part", ".mine-b.part"):  # what a killed conversion left
        (tmp_path / name / "checkpoints").mkdir(parents=True)
    assert convert(save(tensors), tmp_path / "whole")["categories_from"] == "the dataset"
    options = {"new_classes": True, "categories_file": tmp_path / "classes.txt"}
    with pytest.raises(UserError, match=r"a\.pth: it has no config; give its --config"):
        convert(tmp_path / "a.pth", tmp_path / "mine", spec=None)
    report = import_weights(tmp_path / "whole", None, tmp_path / "mine", COUNTS, **options)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"a.pth", "classes.txt", "whole", "mine", ".mine-b.part"}
    opened = open_model(tmp_path / "mine")
    assert opened.categories == (names, (1, 2, 3, 4, 5), 3)
    ours, theirs = (flatten_dict(tree, sep="/") for tree in (opened.variables, variables))
    assert set(report["anew"]) == {key for key in ours if ours[key].shape != theirs[key].shape}
    assert len(report["anew"]) == 2 + 2 and report["entry"] == "step 0"
    anew = flatten_dict(fresh, sep="/")
    for key, array in ours.items():
        np.testing.assert_array_equal(array, (anew if key in report["anew"] else theirs)[key])
    assert all(CLASSES.fullmatch(name) for name in report["left_over"])
    assert "arrays that start anew        4" in report_table(report)

    prefix = "backbone."
    classifier = {k.removeprefix(prefix): x for k, x in tensors.items() if k.startswith(prefix)}
    classifier |= {"fc.weight": np.zeros((10, 512), np.float32), "fc.bias": np.zeros(10)}
    config = load_config(PANOPTIC, SMALL)
    template = shapes_of(config.model.to_dict())
    weights = read_weights(save(classifier))
    found = fit_network(weights, template, config)
    assert found.arrays.keys() == {key for key in theirs if "/backbone/" in key}
    for key, array in found.arrays.items():
        np.testing.assert_array_equal(array, theirs[key])
    assert sorted(weights.surplus) == ["fc.bias", "fc.weight"]
    assert weights.original["backbone.conv1.weight"] == "conv1.weight"
    del classifier["layer3.0.conv2.weight"]
    with pytest.raises(UserError, match=r"no tensor backbone\.layer3\.0\.conv2\.weight"):
        fit_network(read_weights(save(classifier)), template, config)


def test_an_auxiliary_head_may_be_missing_or_left_over(tmp_path, save):
    tensors = make_tensors(SEMANTIC)
    head = {name for name in tensors if name.startswith("auxiliary_head.")}
    no_head = ("--config.model.auxiliary_channels=0",)
    for overrides in (SMALL, (*SMALL, *no_head)):
        config = load_config(SEMANTIC, overrides)
        template = shapes_of(config.model.to_dict())
        kept = {name: x for name, x in tensors.items() if overrides != SMALL or name not in head}
        found = fit_network(read_weights(save(kept)), template, config)
        assert set(found.missing if overrides == SMALL else found.left) == head


def test_numbers_of_other_types_become_ours(tmp_path, save):
    tensors = make_tensors()
    names = sorted(tensors)
    half = {name: x.astype(np.float16) for name, x in tensors.items()}
    half[names[0]] = tensors[names[0]].astype(np.float64)
    half[names[1]] = tensors[names[1]].astype(jnp.bfloat16)
    report = convert(save(half), tmp_path / "model")
    assert len(report["rounded"]) == 1
    opened = open_model(tmp_path / "model").variables
    for a, b in zip(jax.tree.leaves(opened), jax.tree.leaves(make_variables(PANOPTIC))):
        assert a.dtype == np.float32
        np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-6)


# From a model to a file.


def test_a_file_that_cannot_be_written_leaves_the_one_before(tmp_path, save, monkeypatch, capsys):
    path, run = tmp_path / "b.safetensors", tmp_path / "run"
    flags = ("--config", PANOPTIC, *SMALL)
    assert status_of("convert", save(make_tensors()), "--output", run, *flags) == 0
    said = capsys.readouterr().out
    assert f"\nwrote {run}, which {run}/conversion.json describes\n" in said
    assert status_of("convert", run, "--output", path) == 0
    said = capsys.readouterr().out
    assert re.match(r"wrote \d+ tensors of step 0 \(\d+\.\d MiB\) to .*b\.safetensors", said)

    def fill_disk(tensors, path, metadata):
        path.write_text("half")
        text = "Error while serializing: I/O error: No space left on device (os error 28)"
        raise SafetensorError(text)

    monkeypatch.setattr("knet_jax.saved.convert.save_file", fill_disk)
    before = path.read_bytes()
    with pytest.raises(OSError, match="No space left on device") as raised:
        export_weights(tmp_path / "run", path)
    assert raised.value.filename == str(path) and path.read_bytes() == before
    assert {file.name for file in tmp_path.iterdir()} == {"a.pth", "b.safetensors", "run"}
