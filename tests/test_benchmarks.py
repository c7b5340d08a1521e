import argparse
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_costs_are_drawn_from_what_was_measured(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    scaling = importlib.import_module("scaling")
    records = json.loads((ROOT / "benchmarks/results/scaling.json").read_text())["results"]
    planned = [f"{p.axis}={p.value}" for p in scaling.points((256, 512, 768), 512)]
    assert [record["config"] for record in records] == planned
    assert {spec.partition("=")[0] for spec in planned} == scaling.AXES.keys()
    scaling.draw(records, tmp_path / "costs.png")
    assert (tmp_path / "costs.png").stat().st_size > 10_000


def test_a_step_on_paper(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    efficiency = importlib.import_module("efficiency")
    speeds = {"tflops": 2.0, "memory": 500.0, "nvlink": 10.0, "nic": 1.0, "share": 0.5}
    args = argparse.Namespace(**speeds, pictures=3, latency=0.0, matching=4.0)
    needs = efficiency.Needs(flop=1e12, bytes_moved=1e9, work_space=0, exchanged=1e9)
    alone = efficiency.seconds_of_step(needs, 1, args)
    # AdamW moves 7 GB at 250 GB/s.
    assert alone == pytest.approx({"gradients": 3.0, "exchange": 0.0, "rest": 0.028 + 0.004})
    # 7/8 of 1 GB there and back within a node, then each GPU's eighth, of which half leaves it twice.
    found = efficiency.seconds_of_step(needs, 16, args)["exchange"]
    assert found == pytest.approx(2 * 7 / 8 / 5 + 2 * 1 / 2 / 8 / 0.5)


@pytest.mark.parametrize(
    "work, model, apart",
    [
        ("network", "panoptic", 1e-3),
        pytest.param("train", "panoptic", 1e-3, marks=pytest.mark.slow),
        # Each has a dropout of its own.
        pytest.param("train", "semantic_uper", 0.02, marks=pytest.mark.slow),
    ],
)
def test_the_networks_in_pytorch_compute_the_same(work, model, apart, tmp_path):
    pytest.importorskip("torch")
    output = tmp_path / "against.json"
    command = ["benchmarks/against_torch.py", f"--work={work}", f"--model={model}", "--size=64x64"]
    options = ["--batch=2", "--rounds=1", f"--json={output}"]
    subprocess.run([sys.executable, *command, *options], cwd=ROOT, check=True)
    report = json.loads(output.read_text())
    ours, theirs = report["results"].values()
    assert theirs["parameters"] == ours["parameters"]
    assert theirs["found"] == pytest.approx(ours["found"], rel=apart)
    assert report["ratio_least"] == pytest.approx(ours["seconds"][0] / theirs["seconds"][0])


@pytest.mark.slow
def test_the_script_for_gpus_runs_as_far_as_its_minutes_reach(tmp_path):
    output = tmp_path / "gpu.json"
    subprocess.run(
        ["benchmarks/gpu.sh", "--tiny", "--minutes=0.02", "--repeat=1", f"--output={output}"],
        cwd=ROOT,
        env=os.environ | {"PYTHON": sys.executable},
        check=True,
    )
    first, *others = json.loads(output.read_text())["results"]
    assert first["case"].startswith("train") and first["median_ms"] > 0
    assert others[-1]["error"] == "no time was left"
