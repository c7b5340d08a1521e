"""A run from before the library's modules were rearranged still opens, predicts and goes on.

`data/old_run.tar.xz` is the workdir of `python train.py --config configs/shapes_panoptic.py:tiny` with
`OVERRIDES`, stopped after four steps. The numbers are what the code that made it gave.
"""

import json
import tarfile
from pathlib import Path

import jax
import numpy as np
import pytest

from knet_jax import train
from knet_jax.config.files import load_config
from knet_jax.saved.models import open_model

ROOT = Path(__file__).parents[1]
SPEC = str(ROOT / "configs" / "shapes_panoptic.py:tiny")
OVERRIDES = (
    "--config.loss.dense=1.0",
    "--config.model.channels=8",
    "--config.model.ffn_channels=8",
    "--config.model.num_heads=2",
    "--config.model.num_stages=1",
    "--config.model.num_proposals=6",
    "--config.model.backbone.width=2",
    "--config.data.max_things=6",
    "--config.data.num_val=4",
    "--config.train.eval_every=4",
    "--config.train.checkpoint_every=2",
    "--config.train.keep=1",
    "--config.train.log_every=1",
    "--config.train.ema_decay=0.9",
    "--config.eval.num_pictures=0",
    "--config.eval.instance_threshold=0.0",
)

# Of the last stage on `picture()`, for the parameters and for their average: the mean of each mask
# (logits), and the largest class logit of each kernel.
PREDICTIONS = {
    False: (
        [-0.73708, -0.80076, -1.0756, -1.22184, -1.23704, -0.75907, -0.33934, 0.47253, 0.81951, 0.97577],
        [-3.44646, -3.43696, -3.48452, -3.3678, -3.44455, -3.49829, -3.5232, -3.64484, -3.70739, -3.27117],
    ),
    True: (
        [-0.72401, -0.80834, -1.0737, -1.13093, -1.21078, -0.62879, -0.2142, 0.25733, 0.77361, 0.98537],
        [-3.45561, -3.44923, -3.479, -3.37804, -3.49334, -3.4944, -3.50968, -3.58584, -3.70217, -3.28266],
    ),
}  # fmt: skip
LOSSES = {5: 10.808433532714844, 6: 10.305272102355957}
SCORES = {"val/PQ": 2.3984749235027323, "val_ema/PQ": 4.248634760472184}


@pytest.fixture
def workdir(tmp_path):
    with tarfile.open(ROOT / "tests" / "data" / "old_run.tar.xz") as archive:
        archive.extractall(tmp_path / "run", filter="data")
    return tmp_path / "run"


def picture():
    y, x = np.indices((64, 96))
    values = (y + x)[..., None] * np.array([1, 2, 3]) % 256
    return ((values - 127.5) / 60).astype(np.float32)[None]


def test_it_opens_and_predicts_the_same_numbers(workdir):
    run = open_model(workdir)
    assert run.step == 4 and run.categories.names[:2] == ("circle", "square")
    apply = jax.jit(run.network.apply)
    for ema, wanted in PREDICTIONS.items():
        last = apply(open_model(workdir, ema=ema).variables, picture()).stages[-1]
        found = np.asarray(last.masks[0]).mean((1, 2)), np.asarray(last.logits[0]).max(1)
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=2e-5)


@pytest.mark.slow
def test_it_goes_on_to_the_same_losses_and_scores(workdir, tmp_path):
    overrides = [
        *OVERRIDES,
        "--config.train.steps=6",
        f"--config.data.data_dir={tmp_path / 'data'}",
    ]
    train(load_config(SPEC, overrides), workdir)
    records = [json.loads(line) for line in (workdir / "log.jsonl").read_text().splitlines()]
    losses = {record["step"]: record["loss/total"] for record in records if "loss/total" in record}
    assert losses == pytest.approx(LOSSES, rel=1e-4)
    scores = {name: record[name] for record in records for name in SCORES if name in record}
    assert scores == pytest.approx(SCORES, rel=1e-3)
