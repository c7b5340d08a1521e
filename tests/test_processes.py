"""Several processes that train and evaluate together, as a user starts them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from devices import FOLDER, environment, free_address, start
from programs import status_of
from tiny_training import overrides_of

from knet_jax import evaluate, load_config
from knet_jax.config.validation import validate
from knet_jax.saved.checkpoints import Checkpoints
from knet_jax.system import processes
from knet_jax.system.errors import UserError
from knet_jax.training.logs import read_log

ADDRESS = "localhost:1234"
STEP = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2", "SLURM_PROCID": "1"}


# Whether there are several.


@pytest.mark.parametrize(
    "environ, given, found",
    [
        ({}, (None, None, None), None),
        # A shell in an allocation, a step with one task, a pod that is not one of several.
        ({"SLURM_NTASKS": "4", "SLURM_JOB_ID": "7"}, (None, None, None), None),
        (STEP | {"SLURM_STEP_NUM_TASKS": "1"}, (None, None, None), None),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, (None, None, None), None),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, (None, None, None), None),
        (STEP, (None, None, None), {"coordinator_address": None}),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, (None, None, None), {"coordinator_address": None}),
        (
            STEP | {"JAX_COORDINATOR_ADDRESS": ADDRESS},
            (None, None, None),
            {"coordinator_address": ADDRESS},
        ),
        (
            {},
            (ADDRESS, 2, 1),
            {"coordinator_address": ADDRESS, "num_processes": 2, "process_id": 1},
        ),
    ],
)
def test_several_processes_are_found_where_there_are_some(environ, given, found):
    assert processes.find_cluster(environ, *given) == found


@pytest.mark.parametrize(
    "environ, given, words",
    [
        ({}, (ADDRESS, None, None), "--num_processes is missing"),
        ({}, (None, 2, None), "--coordinator is missing"),
        ({}, (None, None, 0), "--coordinator is missing"),
        ({"JAX_COORDINATOR_ADDRESS": ADDRESS}, (None, 2, None), "--process_id is missing"),
        ({"JAX_COORDINATOR_ADDRESS": ADDRESS}, (None, None, None), "--num_processes is missing"),
        ({}, ("localhost", 2, 1), "--coordinator=localhost; accepted: HOST:PORT"),
        ({}, (ADDRESS, 2, 2), "--process_id=2; accepted: 0 to 1"),
    ],
)
def test_what_joins_no_processes_is_named(environ, given, words):
    with pytest.raises(UserError, match=words):
        processes.find_cluster(environ, *given)


def test_addresses_are_no_paths(tmp_path):
    for key in ("data.root", "data.data_dir"):
        with pytest.raises(
            UserError, match=rf"config.{key} is 's3://b/d'; accepted: a path of this"
        ):
            validate(load_config("shapes_panoptic:tiny", {key: "s3://b/d"}))
    for path in ("gs://b/run", Path("gs://b/run")):
        with pytest.raises(UserError, match="--workdir=gs:/+b/run; accepted: a path of this"):
            evaluate(path)
    with pytest.raises(UserError, match="--output=gs://b/run; accepted: a path of this machine"):
        evaluate(tmp_path, output="gs://b/run")


# What they tell each other.


def tell(index, address):
    """What each of two processes does; an error ends it with another status."""
    index = int(index)
    with processes.joined(address, 2, index, 30), processes.main_speaks():
        print("heard of the main process only")
        assert processes.exchange({"index": index}) == [{"index": 0}, {"index": 1}]
        long = ["x" * (1000 * (1 + 3 * i)) for i in range(2)]
        assert processes.exchange(long[index]) == long
        assert processes.from_main(lambda: index) == 0 and processes.any_of(index == 1)
        special = np.array([-0.0, np.nan, 1e-45], np.float32)
        tree = {"a": special, "b": np.arange(7, dtype=np.int8), "c": np.float32(2)}
        other = {key: np.zeros_like(x) for key, x in tree.items()}
        found = processes.broadcast(other if index else tree)
        for key, value in tree.items():
            assert found[key].tobytes() == value.tobytes() and found[key].shape == value.shape
        order = []
        with processes.main_first():
            order = processes_done(index)
        assert order == (["0"] if index == 0 else ["0", "1"])
        failures = []
        for tried in (check_facts, fail_alone, fail_in_main):
            with pytest.raises(UserError) as error:
                tried(index)
            assert processes.is_shared(error.value)
            failures.append(str(error.value))
    if index == 1:
        assert failures[0].startswith("b is 3 in process 1 of 2, and 2 in process 0")
        assert failures[1:] == ["no disk", "process 0 of 2: no such run"]
    else:
        assert failures[1:] == ["process 1 of 2: no disk", "no such run"]


def processes_done(index):
    """Which processes have come here, noted in a file."""
    path = Path(os.environ["NOTES"])
    path.write_text((path.read_text() if path.exists() else "") + str(index))
    return list(path.read_text())


def check_facts(index):
    """A fact that differs."""
    processes.check_same({"a": 1, "b": 2 + index})


def fail_alone(index):
    """One of them fails while the other goes on to an exchange."""
    with processes.together():
        if index == 1:
            raise UserError("no disk")
        processes.exchange(None)


def fail_in_main(index):
    """The main process fails in what it does for all."""

    def find():
        raise UserError("no such run")

    processes.from_main(find)


def start_two(function, **variables):
    """Starts two processes that call a function of this file with their index and an address."""
    address = free_address()
    code = f"import sys, test_processes; test_processes.{function}(*sys.argv[1:])"
    return [
        subprocess.Popen(
            [sys.executable, "-c", code, str(index), address],
            env=environment(1) | {"PYTHONPATH": f"{FOLDER}:{FOLDER.parent}"} | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]


def test_two_processes_tell_each_other(tmp_path):
    started = start_two("tell", NOTES=str(tmp_path / "notes"))
    texts = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], texts
    assert "heard of the main" in texts[0] and "heard of the main" not in texts[1]
    assert "process 0: 1 x cpu on " in texts[0] and "process 1: 1 x cpu on " in texts[0]


def die(index, address):
    """The second process dies where the first waits for it."""
    with processes.joined(address, 2, int(index), 10):
        processes.exchange(None)
        if index == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        processes.exchange(None)


def test_a_process_that_dies_ends_the_other():
    first, second = start_two("die")
    said, _ = first.communicate(timeout=120)
    assert second.wait() == -signal.SIGKILL and first.returncode != 0
    assert "the same command goes on" in said, said


# Training and evaluation.


class Runs:
    """Runs of one task and their data, in one folder."""

    def __init__(self, folder):
        self.folder = folder

    def words(self, workdir, task="panoptic", **changes):
        """The words that train."""
        values = overrides_of(task, self.folder / "data") | {"data.num_val": 6, "eval.analysis": 5}
        values |= changes
        flags = [f"--config.{key}={value}" for key, value in values.items()]
        return ["train", "--config", f"shapes_{task}:tiny", "--workdir", str(workdir), *flags]

    def run(self, words, num_processes, num_devices=1, wants=0, **how):
        """Runs to the end; what the processes printed."""
        log = self.folder / "log"
        started = start(words, num_processes, log, num_devices, **how)
        statuses = [process.wait(timeout=900) for process in started]
        texts = [Path(f"{log}.{i}").read_text() for i in range(num_processes)]
        assert statuses == [wants] * num_processes, "\n".join(texts)[-5000:]
        return texts


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def alone(runs):
    """A run of one process, which has as many devices as two: fewer round otherwise, and a match that
    tips over shows in the losses."""
    runs.run(runs.words(runs.folder / "alone"), 1, 2)
    return runs.folder / "alone"


def losses_of(workdir):
    return [r["loss/total"] for r in read_log(workdir) if "loss/total" in r]


def scores_of(workdir):
    records = [r for r in read_log(workdir) if any(k.startswith("val") for k in r)]
    return [{k: v for k, v in r.items() if k.startswith("val")} for r in records]


@pytest.mark.slow
def test_two_processes_train_what_one_does(runs, alone):
    workdir = runs.folder / "by_two"
    texts = runs.run(runs.words(workdir), 2)
    assert "done: " in texts[0] and "step 6" not in texts[1]
    assert losses_of(workdir) == losses_of(alone)
    assert scores_of(workdir) == scores_of(alone)
    written = json.loads((workdir / "analysis" / "analysis.json").read_text())
    assert (written["step"], written["num_images"]) == (6, 5)
    assert "stops" not in read_log(workdir)[0]


@pytest.mark.slow
def test_as_many_devices_train_the_same_bits(runs):
    """However they belong to processes, with statistics over all of them."""
    changes = {"model.neck.norm": "batch", "model.dropout": 0.0, "train.steps": 3}
    written = []
    for num_processes in (1, 2, 4):
        workdir = runs.folder / f"bits_{num_processes}"
        words = runs.words(workdir, "semantic", **changes, **{"train.eval_every": 3})
        runs.run(words, num_processes, 4 // num_processes)
        with Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
            digests = checkpoints._read_record(3)["arrays"]
        written.append((losses_of(workdir), scores_of(workdir), digests))
    assert written[0] == written[1] == written[2] and len(written[0][0]) == 3


@pytest.mark.slow
def test_two_processes_evaluate_what_one_does(runs, alone):
    """In every byte, where as many devices share a batch."""
    written = []
    for num_processes in (1, 2):
        output = runs.folder / f"eval_{num_processes}"
        words = ["eval", "--workdir", str(alone), "--output", str(output), "--results"]
        runs.run(
            [*words, "--rounds", "--analysis", "--limit", "5"], num_processes, 2 // num_processes
        )
        files = (path for path in output.rglob("*") if path.is_file())
        written.append({path.relative_to(output): path.read_bytes() for path in files})
    assert written[0] == written[1] and len(written[0]) == 2 + 2 + 5 + (2 + 4 + 5)
    assert json.loads(written[0][Path("metrics.json")])["num_images"] == 5


@pytest.mark.slow
def test_a_signal_to_one_ends_all_and_another_number_goes_on(runs, alone):
    workdir, log = runs.folder / "stopped", runs.folder / "stopped_log"
    changes = {"train.steps": 400, "train.eval_every": 0}
    words = runs.words(workdir, **changes)
    started = start(words, 2, log)
    deadline = time.monotonic() + 600
    while not (workdir / "log.jsonl").exists() or len(losses_of(workdir)) < 3:
        assert all(process.poll() is None for process in started), Path(f"{log}.0").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    started[1].send_signal(signal.SIGTERM)
    assert [process.wait(timeout=300) for process in started] == [143, 143]
    texts = [Path(f"{log}.{i}").read_text() for i in range(2)]
    [first, second] = ["stopped at step " + t.split("stopped at step ")[1] for t in texts]
    assert first == second
    step = int(first.split("step ")[1].split(",")[0])
    assert (workdir / "checkpoints" / str(step)).is_dir() and step < 400
    [text] = runs.run(runs.words(workdir, **changes | {"train.steps": step + 2}), 1, 2)
    assert f"resuming from step {step}" in text
    assert len(losses_of(workdir)) == step + 2
    assert losses_of(workdir)[:6] == losses_of(alone)
    # And with another number of devices, which rounds otherwise.
    [text] = runs.run(runs.words(workdir, **changes | {"train.steps": step + 3}), 1)
    assert f"resuming from step {step + 2}" in text
    assert len(losses_of(workdir)) == step + 3


@pytest.mark.slow
def test_what_differs_between_processes_is_named(runs):
    """Disks of their own: each prepares its data; what one alone has otherwise ends all."""
    workdir = runs.folder / "differs"

    def words(i, **changes):
        return runs.words(workdir, **{"data.data_dir": runs.folder / f"disk{i}"} | changes)

    texts = runs.run(lambda i: words(i, **({"data.num_val": 3} if i else {})), 2, wants=2)
    line = "knet train: config.data.num_val is 3 in process 1 of 2, and 6 in process 0"
    assert all(text.splitlines()[-1].startswith(line) for text in texts)
    # Another picture under the name of the same split.
    given = words(1, **{"data.num_train": 4})
    flags = [word for word in given if word.startswith("--config.")]
    assert status_of("prepare", "--config", "shapes_panoptic:tiny", *flags) == 0
    other = next((runs.folder / "disk1" / "shapes").glob("panoptic-train-4*"))
    other.rename(other.with_name(other.name.replace("train-4", "train-8")))
    texts = runs.run(words, 2, wants=2)
    assert "split 'train' is '4 pictures, 9 classes" in texts[1].splitlines()[-1]
    assert "accepted: the same in all" in texts[0].splitlines()[-1]
    assert not workdir.exists()


BROKEN = """
import jax, jax.numpy as jnp, sys
from knet_jax.training import train_step
normalize = train_step.normalize
def broken(*given):
    on_second = jax.lax.axis_index(train_step.AXIS) == 1
    return jnp.where(on_second, jnp.nan, normalize(*given))
train_step.normalize = broken
"""


@pytest.mark.slow
def test_a_number_that_is_not_finite_on_one_device_ends_all(runs):
    workdir = runs.folder / "broken"
    texts = runs.run(runs.words(workdir), 2, wants=2, before=BROKEN)
    for text in texts:
        line = text.splitlines()[-1]
        assert line.startswith("knet train: step 1: ") and "is not finite; images: train_" in line
        assert line.count("train_0") == 4 and "last checkpoint: none" in line
    assert not any((workdir / "checkpoints").iterdir())
