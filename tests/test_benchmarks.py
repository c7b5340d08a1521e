import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


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
