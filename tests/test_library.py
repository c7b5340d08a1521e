"""`import knet_jax`: its names, and what opening a model leaves alone."""

import subprocess
import sys
from pathlib import Path

import tiny_runs
from devices import environment

import knet_jax

ROOT = Path(__file__).parents[1]

UNUSED = ("tensorflow_datasets", "grain", "knet_jax.data.sources", "knet_jax.training")

OPEN = """
import sys
import knet_jax
assert "jax" not in sys.modules
segmenter = knet_jax.load(sys.argv[1])
print(segmenter.task, *(name for name in sys.argv[2:] if name in sys.modules))
"""


def test_every_name_is_there():
    for name in knet_jax.__all__:
        assert callable(getattr(knet_jax, name))
    assert knet_jax.load_config("coco_panoptic:r101", {"optim.lr": 2e-4}).optim.lr == 2e-4


def test_opening_a_model_imports_nothing_of_training(tmp_path):
    model = tiny_runs.write(tmp_path / "run", "panoptic")
    command = [sys.executable, "-c", OPEN, model, *UNUSED]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(1), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "panoptic"
