import json
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import parity
import pytest

from knet_jax.structs import Output, Stage


def run(monkeypatch, capsys, *arguments):
    """Exit status and the lines that are printed."""
    monkeypatch.setattr(sys, "argv", ["parity.py", *map(str, arguments)])
    status = parity.main()
    return status, capsys.readouterr().out.splitlines()


@pytest.fixture
def post(fixtures, tmp_path):
    """A copy of the fixture of post-processing alone, to be changed at will."""
    for suffix in (".json", ".npz"):
        name = f"det_panoptic_post{suffix}"
        (tmp_path / name).write_bytes((fixtures / name).read_bytes())
    return tmp_path / "det_panoptic_post.npz"


def test_one_changed_array_fails(post, monkeypatch, capsys):
    arrays = dict(np.load(post))
    height, width = arrays["pan_cfg_0"].shape
    arrays["pan_cfg_0"][: height // 4, : width // 4] += 1
    np.savez(post, **arrays)
    status, lines = run(monkeypatch, capsys, post)
    assert status == 1
    failed = [line.split()[0] for line in lines if line.endswith("FAIL")]
    assert failed == ["pan_cfg_0"]
    assert " 1 failed" in lines[-1]


def test_an_array_of_another_shape_fails():
    assert parity.relative(np.zeros(3), np.zeros(4)) == np.inf
    assert parity.relative(np.ones(3), np.ones(3) * 1.5) == pytest.approx(1 / 3)
    assert not parity.Row("name", float("nan"), 1.0).passed


def test_unknown_kinds_are_skipped_by_name(tmp_path, monkeypatch, capsys):
    new = {"kind": "something new", "model": "knet_panoptic", "params": []}
    (tmp_path / "new.json").write_text(json.dumps(new))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "expected.json").write_text("{}")
    status, lines = run(monkeypatch, capsys, tmp_path)
    skipped = {line.partition(":")[0] for line in lines if "skipped, its kind is unknown" in line}
    assert skipped == {"new", "folder"}
    assert status == 0 and lines[-1] == f"0 passed, 0 failed, {len(skipped)} skipped"


@pytest.mark.parametrize(
    "name, keys, failed",
    [
        ("pq", ("Things", "pq"), "Things/pq"),
        ("ap", ("stats", 3), "APs"),
        ("miou", ("expected", "plain", "IoU", 2), "plain/3/IoU"),
    ],
)
def test_wrong_quality_fails(fixtures, tmp_path, monkeypatch, capsys, name, keys, failed):
    folder = tmp_path / name
    shutil.copytree(fixtures / name, folder)
    path = folder / "expected.json"
    path.chmod(0o644)
    expected = entry = json.loads(path.read_text())
    for key in keys[:-1]:
        entry = entry[key]
    entry[keys[-1]] += 1e-6
    path.write_text(json.dumps(expected))
    status, lines = run(monkeypatch, capsys, folder, "--quiet")
    assert status == 1 and [line.split()[0] for line in lines[1:-1]] == [failed]


def test_segments_are_compared_as_a_partition():
    """Other numbers for the same segments agree; a label or a border that differs does not."""
    fused = parity.Fused(None, np.array([[7, 7, 90]]), None, None)
    ids = np.array([[1, 1, 2, 2], [3, 3, 0, 0]])
    theirs = np.array([[2007, 2007, 1007, 1007], [90, 90, 133, 133]])
    assert parity.disagreement(ids, fused, 0, theirs) == 0
    assert parity.disagreement(ids, fused, 0, np.where(theirs == 90, 91, theirs)) == 0.25
    merged = np.where(theirs == 1007, 2007, theirs)
    assert parity.disagreement(ids, fused, 0, merged) == 0.25
    theirs[0, 1] = 1007
    assert parity.disagreement(ids, fused, 0, theirs) == 0.125


def test_tolerances_follow_where_the_precisions_of_the_reference_part():
    manifest = {
        "losses_f32": {"near": 1.0, "apart": 1.01, "single": 3.0},
        "losses_f64": {"near": 1.0 + 1e-7, "apart": 1.0},
        "total_loss_f32": 2.0,
    }
    single = parity.Fixture(None, manifest, {}, "float32")
    for name, wanted in (("near", 1e-4), ("apart", 0.02), ("single", 1e-4), ("absent", 1e-4)):
        assert parity.loosened(1e-4, single, "losses", name) == pytest.approx(wanted)
    assert parity.loosened(1e-4, single, "total_loss") == 1e-4
    double = single._replace(dtype="float64")
    assert parity.loosened(1e-6, double, "losses", "apart") == 1e-6


@pytest.mark.parametrize("flips, passed", [(0, False), (3, True), (40, False)])
def test_only_a_flipped_pixel_widens_tolerances(monkeypatch, flips, passed):
    signs = np.zeros((2, 8, 8), bool)
    exact = signs.copy()
    exact.ravel()[:flips] = True

    class Network:
        def apply(self, variables, image):
            assert image.dtype == "float64"
            masks = jax.numpy.where(exact, 1.0, -1.0)
            return Output((Stage(None, masks, None), Stage(None, masks, None)), None)

    monkeypatch.setattr(parity, "network", lambda fixture: (Network(), {}))
    rows = [parity.Row("a", 3e-4, 1e-4), parity.Row("b", 1e-5, 1e-4), parity.Row("c", 1.0, 1e-4)]
    fixture = parity.Fixture(Path("x"), {}, {"image": np.zeros((2, 3, 8, 8))}, "float32")
    found = list(parity.forgive_flips(rows, [signs], fixture))
    assert [row.passed for row in found] == [passed, True, False]
    assert found[0].note.strip() == ("3 flips" if passed else "")
