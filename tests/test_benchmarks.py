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
    monkeypatch.setattr(efficiency, "MEMORY", 500e9)
    monkeypatch.setattr(efficiency, "TFLOPS", {"float32": 2.0})
    speeds = {"precision": "float32", "nvlink": 10.0, "nic": 1.0, "share": 0.5}
    args = argparse.Namespace(**speeds, launch=2.0, latency=0.0, matching=4.0)
    gradients = efficiency.Needs(flop=3e12, bytes_moved=3e9, kernels=2000)
    update = efficiency.Needs(flop=0.0, bytes_moved=7e9, kernels=1000)
    alone = efficiency.seconds_of_step(gradients, update, 10**9, 1, args)
    # The update moves 7 GB at 250 GB/s.
    assert alone == pytest.approx({"gradients": 3.0, "exchange": 0.0, "rest": 0.028 + 0.004})
    assert efficiency.seconds_of_program(gradients._replace(flop=0), args) == pytest.approx(0.012)
    few = efficiency.Needs(flop=0, bytes_moved=0, kernels=2000)
    assert efficiency.seconds_of_program(few, args) == pytest.approx(0.004)
    # 7/8 of 1 GB there and back within a node, then each GPU's eighth, of which half leaves it twice.
    found = efficiency.seconds_of_step(gradients, update, 10**9, 16, args)["exchange"]
    assert found == pytest.approx(2 * 7 / 8 / 5 + 2 * 1 / 2 / 8 / 0.5)


PROGRAM = """HloModule jit_f, is_scheduled=true

FileNames
1 "f.py"

%fused (p.0: f32[8,4], p.1: bf16[4]) -> f32[2,4] {
  %p.0 = f32[8,4]{1,0} parameter(0)
  %slice.1 = f32[2,4]{1,0} slice(%p.0), slice={[2:4], [0:4]}
  %p.1 = bf16[4]{0} parameter(1)
  ROOT %add.1 = f32[2,4]{1,0} add(%slice.1, %p.1)
}

%in_place (p.2: f32[100,4], p.3: f32[1,4]) -> f32[100,4] {
  %p.2 = f32[100,4]{1,0} parameter(0)
  %p.3 = f32[1,4]{1,0} parameter(1)
  ROOT %put.1 = f32[100,4]{1,0} dynamic-update-slice(%p.2, %p.3, %p.3, %p.3)
}

%body (state: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %state = (s32[], /*index=1*/f32[8,4]{1,0}) parameter(0)
  %map = f32[8,4]{1,0} get-tuple-element(%state), index=1
  %negate.1 = f32[8,4]{1,0} negate(%map)
  ROOT %next = (s32[], f32[8,4]{1,0}) tuple(%i, %negate.1)
}

ENTRY %main (x: f32[8,4], y: bf16[4]) -> f32[2,4] {
  %x = f32[8,4]{1,0} parameter(0)
  %y = bf16[4]{0} parameter(1)
  %z = f32[100,4]{1,0} parameter(2)
  %w = f32[1,4]{1,0} parameter(3)
  %loop = (s32[], f32[8,4]{1,0}) while(%x), condition=%until, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %product = (f32[8,4]{1,0}, u8[16]{0}) custom-call(%x, %y), custom_call_target="__cublas$gemm", metadata={op_name="jit(f)/dot"}
  %fusion.2 = f32[100,4]{1,0} fusion(%z, %w), kind=kLoop, calls=%in_place, metadata={op_name="jit(f)/put"}
  ROOT %fusion.1 = f32[2,4]{1,0} fusion(%x, %y), kind=kLoop, calls=%fused, metadata={op_name="jit(f)/add"}
}
"""


def test_what_kernels_of_a_compiled_program_read_and_write(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    gpu_programs = importlib.import_module("gpu_programs")
    # In the loop a map is read and written five times; of x the fusion reads a quarter, and of z it
    # changes a row.
    assert gpu_programs.kernels(PROGRAM) == [
        ("negate.1", 5 * 2 * 128, 5),
        ("jit(f)/dot", (128 + 16) + (128 + 8), 1),
        ("jit(f)/put", 16 + 16, 1),
        ("jit(f)/add", 32 + (32 + 8), 1),
    ]


@pytest.mark.slow
def test_needs_of_programs_are_those_of_a_step_on_paper(tmp_path):
    output = tmp_path / "programs.json"
    tiny = ["--config=coco_panoptic:tiny", "--size=64x96", "--batch=1", "--here"]
    command = ["benchmarks/gpu_programs.py", *tiny, "--precision=bfloat16", f"--output={output}"]
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
    rows = json.loads(output.read_text())["programs"]
    assert [row["program"] for row in rows] == ["network", "gradients", "update"]
    for row in rows:
        assert row["kernels"] > 100 and row["bytes_moved"] > 1e6 and row["flop"] > 1e6
    command = ["benchmarks/efficiency.py", f"--programs={output}", "--pictures=1", "--gpus=1"]
    table = subprocess.run(
        [sys.executable, *command], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    assert table.startswith("coco_panoptic:tiny, 64x96, here, bfloat16, 1 pictures a GPU")
    assert len(table.splitlines()) == 2 + 3


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
