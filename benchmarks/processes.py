"""Trains and evaluates tiny networks on processes x devices of this CPU, and compares them.

python benchmarks/processes.py --folder /tmp/processes                     # a table of all tasks
python benchmarks/processes.py --folder /tmp/processes --tasks panoptic --divisions 1x1,2x1
python benchmarks/processes.py --folder /tmp/processes --kills 10          # killed and resumed

The table: largest differences from one process with one device of the losses (relative), parameters,
statistics and average; whether all scores of the training are the same; and of an evaluation of random
weights that see segments, metrics.json and all files (scores of segments are among them). Of a run that
is killed, whether it ends with the same bits as one that is not.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import time
from pathlib import Path

import jax
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import devices
import tiny_runs
import tiny_training

from knet_jax.saved.checkpoints import Checkpoints
from knet_jax.saved.models import open_model
from knet_jax.tasks import TASKS
from knet_jax.training.logs import read_log

CHANGES = {
    "train.ema_decay": 0.9,
    "train.checkpoint_every": 2,
    "data.num_val": 10,
    "optim.lr": 0.003,
}
OF_TASKS = {
    "panoptic": {},
    # Eight pictures a step, one at a time: parts of eight, two, two and two rounds.
    "instance": {"train.batch_size": 8, "train.microbatch": 1},
    # Statistics of the whole batch in the decoder; what is drawn for each device is off.
    "semantic": {"model.neck.norm": "batch", "model.dropout": 0.0},
}


def arguments(task: str, folder: Path, **changes) -> list[str]:
    """Flags of a tiny run of a task."""
    values = tiny_training.overrides_of(task, folder / "data") | CHANGES
    values |= OF_TASKS[task] | changes
    return [f"--config.{key}={value}" for key, value in values.items()]


def run(words: list[str], num_processes: int, num_devices: int, log: Path) -> None:
    """Runs `knet` in so many processes, to the end."""
    log.parent.mkdir(parents=True, exist_ok=True)
    statuses = [p.wait() for p in devices.start(words, num_processes, log, num_devices)]
    if any(statuses):
        raise SystemExit(f"statuses {statuses}; see {log}.*")


def arrays_of(workdir: Path, step: int) -> dict[str, dict]:
    """Parameters, statistics and average of a saved step."""
    variables, average = (open_model(workdir, str(step), ema).variables for ema in (False, True))
    return variables | {"ema": average["params"]}


def digests_of(workdir: Path, step: int) -> dict:
    """The digests of all arrays of a saved step, those of the optimizer too."""
    with Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
        return checkpoints._read_record(step)["arrays"]


def losses_of(workdir: Path) -> np.ndarray:
    """The loss of every step."""
    records = [r for r in read_log(workdir) if "loss/total" in r]
    return np.array([r["loss/total"] for r in records])


def scores_of(workdir: Path) -> list[dict]:
    """All evaluations of a run."""
    records = [r for r in read_log(workdir) if any(k.startswith("val") for k in r)]
    return [{k: v for k, v in r.items() if k.startswith(("val", "step"))} for r in records]


def largest(one: dict, other: dict) -> float:
    """The largest difference of two trees of arrays."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return max(float(np.abs(a - b).max()) for a, b in pairs if a.size)


def compare(task: str, divisions: list[str], folder: Path, steps: int) -> None:
    """Trains a task on every division, evaluates a network that sees segments, and prints a row each."""
    model, first = folder / f"model_{task}", None
    shutil.rmtree(model, ignore_errors=True)
    given = {"eval.batch_size": 4, "data.num_val": 12, "data.data_dir": str(folder / "data")}
    tiny_runs.write(model, task, *(f"--config.{key}={value}" for key, value in given.items()))
    for division in divisions:
        num_processes, num_devices = map(int, division.split("x"))
        workdir, output = folder / f"{task}_{division}", folder / "eval" / f"{task}_{division}"
        shutil.rmtree(workdir, ignore_errors=True)
        words = ["eval", "--workdir", str(model), "--output", str(output), "--results"]
        run(words, num_processes, num_devices, folder / "logs" / f"eval_{workdir.name}")
        words = ["train", "--config", f"shapes_{task}:tiny", "--workdir", str(workdir)]
        changes = {"train.steps": steps, "train.eval_every": steps}
        words += arguments(task, folder, **changes)
        run(words, num_processes, num_devices, folder / "logs" / workdir.name)
        files = (path for path in output.rglob("*") if path.is_file())
        found = (
            losses_of(workdir),
            arrays_of(workdir, steps),
            scores_of(workdir),
            (output / "metrics.json").read_bytes(),
            {path.relative_to(output): path.read_bytes() for path in files},
        )
        first = first or found
        loss = float(np.abs(found[0] / first[0] - 1).max())
        parts = ("params", "batch_stats", "ema")
        cells = [task, division, f"{loss:.1e}"]
        cells += [f"{largest(found[1][part], first[1][part]):.1e}" for part in parts]
        cells += ["yes" if found[i] == first[i] else "no" for i in (2, 3, 4)]
        metrics = json.loads((output / "metrics.json").read_text())
        name = next(iter(TASKS[task].metric.HEADLINE))
        print("| " + " | ".join([*cells, f"{name} {metrics[name]:.4f}"]) + " |", flush=True)


def steps_of(workdir: Path) -> list[int]:
    """The steps on disk."""
    return sorted(
        int(p.name) for p in (workdir / "checkpoints").glob("[0-9]*") if p.name.isdecimal()
    )


def kill(num_kills: int, folder: Path, steps: int, task: str = "panoptic") -> None:
    """Kills one of two processes again and again; the same command goes on in the end."""
    changes = {"train.steps": steps, "train.eval_every": steps // 2}

    def words(workdir):
        return [
            *("train", "--config", f"shapes_{task}:tiny", "--workdir", str(workdir)),
            *("--heartbeat", "100", *arguments(task, folder, **changes)),
        ]

    whole, killed = folder / "whole", folder / "killed"
    for workdir in (whole, killed):
        shutil.rmtree(workdir, ignore_errors=True)
    began = time.monotonic()
    run(words(whole), 2, 1, folder / "logs" / "whole")
    seconds = time.monotonic() - began
    chance = random.Random(0)
    for number in range(num_kills):
        started = devices.start(words(killed), 2, folder / "logs" / f"kill{number}")
        # In turn at any moment and within three seconds of a new checkpoint; not in the first seconds,
        # since others wait for a process that they have not found yet for five minutes.
        victim, before = chance.randrange(2), steps_of(killed)
        after = chance.uniform(0.05, 0.3) * seconds if number % 2 else chance.uniform(0.0, 3.0)
        began = time.monotonic()
        while all(p.poll() is None for p in started) and time.monotonic() - began < after:
            if number % 2 == 0 and steps_of(killed) == before:
                began = time.monotonic()
            time.sleep(0.02)
        ended = [p.poll() for p in started]
        started[victim].kill()
        dead = time.monotonic()
        statuses = [p.wait() for p in started]
        print(
            f"kill {number}: process {victim}, {after:.1f} s after "
            f"{'the start' if number % 2 else 'a checkpoint'}; the other ended "
            f"{time.monotonic() - dead:.1f} s later; statuses {statuses}"
            f"{' (done before)' if None not in ended else ''}; on disk {steps_of(killed)}",
            flush=True,
        )
    run(words(killed), 2, 1, folder / "logs" / "killed")
    same = digests_of(whole, steps) == digests_of(killed, steps)
    print(f"all arrays of step {steps} bit-equal: {'yes' if same else 'no'}")
    print(f"losses equal: {'yes' if (losses_of(whole) == losses_of(killed)).all() else 'no'}")
    print(f"evaluations equal: {'yes' if scores_of(whole) == scores_of(killed) else 'no'}")


def main() -> None:
    """Reads the flags."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--tasks", default="panoptic,instance,semantic")
    parser.add_argument("--divisions", default="1x1,1x4,2x2,4x1")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--kills", type=int, default=0)
    args = parser.parse_args()
    os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ.get(
        "JAX_COMPILATION_CACHE_DIR", str(args.folder / "programs")
    )
    if args.kills:
        kill(args.kills, args.folder.resolve(), args.steps)
        return
    columns = ("task", "processes x devices", "losses", "parameters", "statistics", "average")
    columns += ("scores", "metrics.json", "all files", "headline")
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for task in args.tasks.split(","):
        compare(task, args.divisions.split(","), args.folder.resolve(), args.steps)


if __name__ == "__main__":
    main()
