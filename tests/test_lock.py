import subprocess
import sys
from pathlib import Path

from knet_jax.system.locks import lock

ROOT = Path(__file__).parents[1]


def test_a_second_run_is_kept_out_of_a_folder(tmp_path):
    claim = lock(tmp_path, "")
    code = "import sys; from knet_jax.lock import lock; lock(sys.argv[1], 'it is taken')"
    second = [sys.executable, "-c", code, str(tmp_path)]
    said = subprocess.run(second, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "ValueError: it is taken" in said.stderr
    assert said.returncode != 0
    claim.close()
    assert subprocess.run(second, cwd=ROOT, check=False).returncode == 0
