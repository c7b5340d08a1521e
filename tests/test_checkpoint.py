import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from knet_jax.saved.checkpoint_record import CheckpointError, DamagedError
from knet_jax.saved.checkpoints import Checkpoints, check_writable

ROOT = Path(__file__).parents[1]
MODEL = {"num_things": 5, "backbone": {"depths": (1, 1)}}


def make_state(seed=0, num_classes=5):
    """Every kind of leaf that a training state holds: bf16, integers, scalars, empty, odd bits."""
    draw = np.random.default_rng(seed)
    params = {
        "stage1": {"class_head": {"kernel": jnp.asarray(draw.standard_normal((16, num_classes)))}},
        "proposals": jnp.asarray(draw.standard_normal((20, 300)), jnp.bfloat16),
        "empty": jnp.zeros((0, 3)),
        "odd": jnp.asarray(np.array([0x80000000, 0x7FC00001, 1], np.uint32).view(np.float32)),
    }
    return {
        "params": params,
        "batch_stats": {},
        "opt_state": optax.adamw(1e-3).init(params),
        "step": jnp.int32(seed),
        "flags": jnp.array([True, False]),
    }


def bits(state):
    return [(a.dtype, a.shape, a.tobytes()) for a in map(np.asarray, jax.tree.leaves(state))]


@pytest.fixture
def checkpoints(tmp_path):
    opened = Checkpoints(tmp_path / "checkpoints", keep=2, model=MODEL)
    yield opened
    opened.close()


def save_all(checkpoints, steps, scores=None):
    for step in steps:
        checkpoints.save(step, make_state(step), {"examples": 8 * step})
        if scores and step in scores:
            checkpoints.add_scores(step, {"val/PQ": scores[step], "val/SQ": 1.0})
    checkpoints.wait()


def data_files(folder):
    """The files of a step that hold something, the largest first."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size]
    return sorted(files, key=lambda path: (-path.stat().st_size, path))


def test_round_trip_is_exact_in_every_bit(checkpoints):
    save_all(checkpoints, [3])
    target = jax.eval_shape(lambda: make_state())
    state, record = checkpoints.restore_latest(target)
    assert bits(state) == bits(make_state(3))
    assert jax.tree.structure(state) == jax.tree.structure(make_state(3))
    assert record["step"] == 3
    assert record["progress"] == {"examples": 24}


def test_a_saved_state_may_be_donated_at_once(checkpoints):
    state = make_state(1)
    expected = bits(state)
    checkpoints.save(1, state, {})
    double = jax.jit(lambda s: jax.tree.map(lambda x: x + x, s), donate_argnums=0)
    jax.block_until_ready(double(state))
    assert bits(latest(checkpoints)) == expected


def latest(checkpoints):
    checkpoints.wait()
    return checkpoints.restore_latest(make_state())[0]


def test_the_last_and_the_best_are_kept(checkpoints):
    save_all(checkpoints, [1, 2, 3, 4, 5], {1: 10.0, 2: 30.0, 4: 20.0, 5: float("nan")})
    assert checkpoints.steps() == [2, 4, 5]
    assert checkpoints.best_step() == 2
    checkpoints.save(5, make_state(), {})  # saved already: stays as it is
    assert bits(latest(checkpoints)) == bits(make_state(5))


def test_the_best_is_kept_after_a_restart(tmp_path):
    for steps in ([1, 2], [3, 4, 5]):
        checkpoints = Checkpoints(tmp_path, keep=1)
        save_all(checkpoints, steps, {1: 30.0, 3: 10.0})
        checkpoints.close()
    assert checkpoints.steps() == [1, 5]


def test_the_best_of_every_metric_is_kept(tmp_path):
    names = ("val/PQ", "val_ema/PQ")
    scores = {1: (30.0, 10.0), 2: (10.0, 30.0), 3: (20.0, 20.0), 4: (0.0, float("nan"))}
    with Checkpoints(tmp_path, keep=1, metrics=names) as checkpoints:
        for step, values in scores.items():
            checkpoints.save(step, make_state(step), {})
            checkpoints.add_scores(step, dict(zip(names, values)))
        save_all(checkpoints, [5])
        assert checkpoints.steps() == [1, 2, 5]
        assert checkpoints.best_step() == 1
    average = Checkpoints(tmp_path, metrics=names[1:], read_only=True)
    assert average.best_step() == 2


def test_scores_are_attached_to_a_step_that_is_saved(tmp_path, checkpoints):
    save_all(checkpoints, [1, 2], {1: 41.5})
    for opened in (checkpoints, Checkpoints(tmp_path / "checkpoints", read_only=True)):
        assert opened.scores(1) == {"val/PQ": 41.5, "val/SQ": 1.0}
        assert opened.scores(2) is None
        assert opened.best_step() == 1
        state, record = opened.restore(make_state(), 1)
        assert bits(state) == bits(make_state(1)) and record["step"] == 1


@pytest.mark.parametrize("change", [(b"41.5", b"91.5"), (b"}", b""), (b"{", b"\xff")])
def test_damaged_scores_are_none(tmp_path, checkpoints, change):
    save_all(checkpoints, [1], {1: 41.5})
    path = tmp_path / "checkpoints" / "1" / "scores.json"
    content = path.read_bytes()
    path.write_bytes(content.replace(*change))
    assert path.read_bytes() != content
    opened = Checkpoints(tmp_path / "checkpoints", read_only=True)
    assert opened.scores(1) is None and opened.best_step() is None
    assert bits(opened.restore_latest(make_state())[0]) == bits(make_state(1))


@pytest.mark.parametrize("content", ["", "null", "[1]", "{}", '"scores"'])
def test_scores_that_are_another_json_are_none(tmp_path, checkpoints, content):
    save_all(checkpoints, [1], {1: 41.5})
    (tmp_path / "checkpoints" / "1" / "scores.json").write_text(content)
    opened = Checkpoints(tmp_path / "checkpoints", read_only=True)
    assert opened.scores(1) is None and opened.best_step() is None


def test_a_step_that_is_saved_anew_has_no_scores_of_the_damaged_one(tmp_path, checkpoints, capfd):
    save_all(checkpoints, [1, 2], {1: 10.0, 2: 30.0})
    remove_arrays(tmp_path / "checkpoints" / "2")
    assert checkpoints.restore_latest(make_state())[1]["step"] == 1
    save_all(checkpoints, [2])
    assert checkpoints.scores(2) is None and checkpoints.best_step() == 1


def test_without_any_evaluation_there_is_no_best(checkpoints):
    save_all(checkpoints, [1, 2, 3])
    assert checkpoints.steps() == [2, 3]
    assert checkpoints.best_step() is None


def test_nothing_saved_is_nothing_restored(checkpoints):
    assert checkpoints.restore_latest(make_state()) is None
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 7 .*have: none"):
        checkpoints.restore(make_state(), 7)


def test_evaluation_reads_parameters_without_the_optimizer(tmp_path, checkpoints):
    save_all(checkpoints, [1, 2])
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    reader = Checkpoints(tmp_path / "checkpoints", model=MODEL, read_only=True)
    target = {"params": make_state()["params"], "batch_stats": {}}
    state, _ = reader.restore(target, 1)
    reader.close()
    assert bits(state) == bits({"params": make_state(1)["params"]})
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


def test_another_class_count_is_one_clear_line(tmp_path, checkpoints):
    save_all(checkpoints, [1])
    other = Checkpoints(
        tmp_path / "checkpoints", model={**MODEL, "num_things": 133}, read_only=True
    )
    with pytest.raises(CheckpointError) as caught:
        other.restore_latest(make_state(num_classes=133))
    text = str(caught.value)
    assert "params/stage1/class_head/kernel is (16, 5) in it, (16, 133) here" in text
    assert text.endswith("; config.model.num_things is 5 in it, 133 here")
    assert "\n" not in text


@pytest.mark.parametrize("change", ["missing", "extra", "dtype"])
def test_another_network_is_named(checkpoints, change):
    save_all(checkpoints, [1])
    params = make_state()["params"]
    if change == "missing":
        params["neck"] = jnp.zeros(3)
        match = "params/neck is not in it"
    elif change == "extra":
        del params["odd"]
        match = "params/odd is in it, not here"
    else:
        params["odd"] = jnp.zeros(3, jnp.int32)
        match = "params/odd is float32 in it, int32 here"
    with pytest.raises(CheckpointError, match=match):
        checkpoints.restore({"params": params}, 1)


def test_a_flipped_bit_anywhere_is_seen_or_harmless(tmp_path, checkpoints, capfd):
    save_all(checkpoints, [1, 2])
    folder = tmp_path / "checkpoints" / "2"
    draw = np.random.default_rng(0)
    seen = 0
    for path in data_files(folder):
        original = path.read_bytes()
        for position in draw.integers(len(original), size=3):
            damaged = bytearray(original)
            damaged[position] ^= 1 << draw.integers(8)
            path.write_bytes(damaged)
            try:
                state, _ = checkpoints.restore(make_state(), 2)
                assert bits(state) == bits(make_state(2)), path
            except DamagedError as error:
                assert "checkpoints/2 is damaged" in str(error)
                seen += 1
            finally:
                path.write_bytes(original)
    assert seen > 10


def test_a_damaged_step_gives_way_to_the_one_before(tmp_path, checkpoints, capfd):
    save_all(checkpoints, [1, 2])
    largest = data_files(tmp_path / "checkpoints" / "2" / "state")[0]
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 4
    largest.write_bytes(data)

    state, record = checkpoints.restore_latest(make_state())
    assert bits(state) == bits(make_state(1))
    assert record["step"] == 1
    said = capfd.readouterr().err
    assert "checkpoints/2 is damaged" in said
    assert said.endswith("; going back to step 1\n")
    # The run goes on and saves the same step again.
    assert (tmp_path / "checkpoints" / "damaged" / "2").is_dir()
    save_all(checkpoints, [2, 3])
    assert checkpoints.steps() == [2, 3]
    assert bits(checkpoints.restore(make_state(), 2)[0]) == bits(make_state(2))


def gut(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def remove_arrays(folder):
    shutil.rmtree(folder / "state" / "d")


def remove_record(folder):
    shutil.rmtree(folder / "record")


def remove_marks(folder):
    for path in folder.rglob("commit_success.txt"):
        path.unlink()


def truncate_all(folder):
    for path in data_files(folder):
        path.write_bytes(b"")


@pytest.mark.parametrize("damage", [gut, remove_arrays, remove_record, remove_marks, truncate_all])
@pytest.mark.parametrize("read_only", [False, True])
def test_missing_files_give_way_to_the_step_before(tmp_path, capfd, damage, read_only):
    writer = Checkpoints(tmp_path)
    save_all(writer, [1, 2])
    writer.close()
    damage(tmp_path / "2")
    checkpoints = Checkpoints(tmp_path, read_only=read_only)
    state, record = checkpoints.restore_latest(make_state())
    assert bits(state) == bits(make_state(record["step"]))
    if record["step"] == 1:
        assert "2 is damaged" in capfd.readouterr().err
    if not read_only:
        save_all(checkpoints, [record["step"] + 1])
        assert checkpoints.restore_latest(make_state())[1]["step"] == record["step"] + 1
    checkpoints.close()


def test_no_whole_step_is_one_clear_line(tmp_path, checkpoints):
    save_all(checkpoints, [1, 2])
    for step in "12":
        gut(tmp_path / "checkpoints" / step)
    with pytest.raises(CheckpointError, match="no checkpoint in .* is whole: ") as caught:
        checkpoints.restore_latest(make_state())
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["1", "2"]


KILLED = """
import sys, jax.numpy as jnp
from knet_jax.checkpoint import Checkpoints
checkpoints = Checkpoints(sys.argv[1])
state = {"params": {str(i): jnp.full((512, 512), float(i)) for i in range(24)}}
checkpoints.save(1, state, {"examples": 1})
checkpoints.wait()
print("saved", flush=True)
for step in range(2, 1000):
    checkpoints.save(step, state, {"examples": step})
    print("saving", flush=True)
"""


@pytest.mark.parametrize("delay", [0.0, 0.02, 0.05])
def test_kill_9_during_a_save_keeps_the_step_before(tmp_path, delay):
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, tmp_path],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout.readline() == "saved\n"
    assert child.stdout.readline() == "saving\n"
    time.sleep(delay)
    child.send_signal(signal.SIGKILL)
    child.wait()

    checkpoints = Checkpoints(tmp_path)
    state = {"params": {str(i): jnp.full((512, 512), float(i)) for i in range(24)}}
    restored, record = checkpoints.restore_latest(state)
    assert bits(restored) == bits(state)
    assert record["progress"] == {"examples": record["step"]}
    checkpoints.save(record["step"] + 1, state, {})
    checkpoints.close()
    # What the killed save left behind is gone.
    assert {path.name for path in tmp_path.iterdir()} == set(map(str, checkpoints.steps()))


BREAKS = """
import sys, jax.numpy as jnp
from knet_jax.checkpoint import Checkpoints
with Checkpoints(sys.argv[1]) as checkpoints:
    checkpoints.save(1, {"params": jnp.ones((2048, 2048))}, {})
    raise SystemExit("a broken picture")
"""


def test_an_error_of_the_loop_loses_no_save(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", BREAKS, tmp_path],
        check=False,
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert result.stderr == "a broken picture\n"
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [1]
        checkpoints.restore(jax.eval_shape(lambda: {"params": jnp.ones((2048, 2048))}), 1)


def test_the_error_of_the_loop_is_told_beside_that_of_the_save(tmp_path, capsys):
    with pytest.raises(ValueError, match="a broken picture"), Checkpoints(tmp_path) as checkpoints:
        shutil.rmtree(tmp_path)
        tmp_path.write_text("a file where the folder was")
        checkpoints.save(1, make_state(), {})
        raise ValueError("a broken picture")
    assert "checkpoint of step 1" in capsys.readouterr().err


LIMITED = """
import resource, signal, sys, numpy as np
from knet_jax.checkpoint import Checkpoints
checkpoints = Checkpoints(sys.argv[1])
state = {"params": np.random.default_rng(0).standard_normal((1000, 1000))}
checkpoints.save(1, state, {})
checkpoints.wait()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
checkpoints.save(2, state, {})
try:
    checkpoints.close()
except ValueError as error:
    print(error)
"""


def test_a_disk_that_takes_no_more_is_one_clear_line(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", LIMITED, tmp_path],
        check=False,
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert result.stdout == (
        f"checkpoint of step 2 (8 MiB) cannot be written to {tmp_path}: file too large; "
        "on disk: 1\n"
    )
    assert "Traceback" not in result.stderr
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.steps() == [1]
    checkpoints.close()


def test_a_failed_save_is_seen_without_waiting(tmp_path, checkpoints):
    shutil.rmtree(tmp_path / "checkpoints")
    (tmp_path / "checkpoints").write_text("a file where the folder was")
    checkpoints.save(1, make_state(), {})
    with pytest.raises(CheckpointError, match="the folder has been removed"):
        for _ in range(200):
            checkpoints.raise_if_failed()
            time.sleep(0.05)
    checkpoints.raise_if_failed()  # said once


def test_an_unwritable_workdir_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write to .*file/run: Not a directory"):
        check_writable(tmp_path / "file" / "run")
    with pytest.raises(CheckpointError, match="cannot write to /proc/knet: "):
        check_writable("/proc/knet")
    with pytest.raises(CheckpointError, match="no checkpoints: .*none does not exist"):
        Checkpoints(tmp_path / "none", read_only=True)
    check_writable(tmp_path / "new" / "run")
    assert list((tmp_path / "new" / "run").iterdir()) == []
