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
from programs import largest_file

from knet_jax.saved.checkpoint_record import (
    DamagedError,
    check_arrays,
    check_record,
    make_record,
)
from knet_jax.saved.checkpoints import Checkpoints, check_writable
from knet_jax.system.errors import UserError

ROOT = Path(__file__).parents[1]
MODEL = {"num_proposals": 9, "num_things": 5, "num_stuff": 4, "backbone": {"depths": (1, 1)}}


def make_state(seed=0, num_classes=5):
    """Every kind of leaf that a training state holds: bf16, integers, scalars, odd bits."""
    draw = np.random.default_rng(seed)
    params = {
        "stage1": {"class_head": {"kernel": jnp.asarray(draw.standard_normal((16, num_classes)))}},
        "proposals": jnp.asarray(draw.standard_normal((20, 300)), jnp.bfloat16),
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


# The record.


def test_a_record_proves_every_bit_type_and_shape():
    arrays = {
        "params/a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "params/zero": np.array(0.0),
        "step": np.array(7, np.int32),
    }
    record = make_record(arrays, step=7, progress={"examples": 112})
    check_record(record, 7)
    with pytest.raises(DamagedError, match="it is a copy of step 7"):
        check_record(record, 8)
    check_arrays(arrays, record)
    for path, array in arrays.items():
        flipped = array.copy()
        flipped.reshape(-1).view(np.uint8)[0] ^= 1
        for other in (flipped, -array, array.reshape(1, -1), array.reshape(-1).view(np.uint8)):
            with pytest.raises(DamagedError, match=f"{path} is not what was saved"):
                check_arrays({path: other}, record)
    for change in ({"step": 8}, {"progress": {"examples": 113}}, {"digest": ""}, {"more": 1}):
        with pytest.raises(DamagedError, match="its record is not what was saved"):
            check_record(record | change, 7)


# Writing and reading.


def test_a_state_comes_back_in_every_bit_though_it_was_donated(tmp_path, checkpoints):
    state, source = make_state(3), np.zeros(3, np.float32)
    expected = bits((source, state))
    checkpoints.save(3, {"numpy": source, "state": state}, {"examples": 24})
    source += 1
    double = jax.jit(lambda s: jax.tree.map(lambda x: x + x, s), donate_argnums=0)
    jax.block_until_ready(double(state))
    checkpoints.wait()
    target = jax.eval_shape(lambda: {"numpy": source, "state": make_state()})
    # As of another process that reads a part, and changes nothing on disk.
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    with Checkpoints(tmp_path / "checkpoints", model=MODEL, read_only=True) as reader:
        restored, record = reader.restore_latest(target)
        part, _ = reader.restore({"numpy": source}, 3)
    assert bits(restored) == expected and jax.tree.structure(restored) == jax.tree.structure(target)
    assert record["step"] == 3 and record["progress"] == {"examples": 24}
    assert bits(part) == expected[:1]
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


def test_the_last_and_the_best_are_kept(tmp_path, checkpoints):
    assert checkpoints.restore_latest(make_state()) is None
    with pytest.raises(UserError, match=r"no checkpoint of step 7 .*have: none"):
        checkpoints.restore(make_state(), 7)
    save_all(checkpoints, [1, 2, 3, 4])
    assert checkpoints.steps() == [3, 4] and checkpoints.best_step() is None
    save_all(checkpoints, [5, 6, 7, 8], {5: 30.0, 7: 20.0, 8: float("nan")})
    assert checkpoints.steps() == [5, 7, 8] and checkpoints.best_step() == 5
    checkpoints.save(8, make_state(), {})  # saved already: stays as it is
    checkpoints.wait()
    assert bits(checkpoints.restore_latest(make_state())[0]) == bits(make_state(8))
    assert checkpoints.scores(5) == {"val/PQ": 30.0, "val/SQ": 1.0}
    # After a restart, which knows the scores again.
    with Checkpoints(tmp_path / "checkpoints", keep=1) as again:
        assert again.scores(5) == checkpoints.scores(5) and again.scores(6) is None
        save_all(again, [9])
        assert again.steps() == [5, 9]


def test_the_best_of_every_metric_is_kept(tmp_path):
    names = ("val/PQ", "val_ema/PQ")
    scores = {1: (30.0, 10.0), 2: (10.0, 30.0), 3: (20.0, 20.0), 4: (0.0, float("nan"))}
    with Checkpoints(tmp_path, keep=1, metrics=names) as checkpoints:
        for step, values in scores.items():
            checkpoints.save(step, {"a": jnp.ones(3)}, {})
            checkpoints.add_scores(step, dict(zip(names, values)))
        checkpoints.save(5, {"a": jnp.ones(3)}, {})
        checkpoints.wait()
        assert checkpoints.steps() == [1, 2, 5] and checkpoints.best_step() == 1
    with Checkpoints(tmp_path, metrics=names[1:], read_only=True) as average:
        assert average.best_step() == 2


def test_damaged_scores_are_none(tmp_path, checkpoints):
    save_all(checkpoints, [1], {1: 41.5})
    path = tmp_path / "checkpoints" / "1" / "scores.json"
    whole = path.read_bytes()
    damaged = [
        whole.replace(*change) for change in ((b"41.5", b"91.5"), (b"}", b""), (b"{", b"\xff"))
    ]
    for content in (*damaged, b"", b"null", b"[1]", b"{}", b'"scores"'):
        path.write_bytes(content)
        with Checkpoints(tmp_path / "checkpoints", read_only=True) as opened:
            assert opened.scores(1) is None and opened.best_step() is None
    assert bits(checkpoints.restore_latest(make_state())[0]) == bits(make_state(1))


def test_another_network_is_one_clear_line(tmp_path, checkpoints):
    """The parameter is named before its optimizer's state; whole parts may be left out, no halves."""
    save_all(checkpoints, [1])
    state = make_state(num_classes=133)
    with Checkpoints(
        tmp_path / "checkpoints", model={**MODEL, "num_things": 133}, read_only=True
    ) as other:
        with pytest.raises(UserError) as caught:
            other.restore_latest(state)
        assert other.saved_shapes(1) is None
    assert str(caught.value) == (
        f"checkpoint {tmp_path}/checkpoints/1 does not fit this network: "
        "params/stage1/class_head/kernel is (16, 5) in it, (16, 133) here; "
        "config.model.num_things is 5 in it, 133 here"
    )
    params = make_state()["params"]
    for change, message in {
        "neck": "params/neck is not in it",
        "odd": "params/odd is float32 in it, int32 here",
    }.items():
        with pytest.raises(UserError, match=message):
            checkpoints.restore({"params": params | {change: jnp.zeros(3, jnp.int32)}}, 1)
    del params["odd"]
    with pytest.raises(UserError, match="params/odd is in it, not here"):
        checkpoints.restore({"params": params}, 1)
    shapes = checkpoints.saved_shapes(1)
    assert bits(checkpoints.restore(shapes["params"] and {"params": shapes["params"]}, 1)[0]) == (
        bits(make_state(1)["params"])
    )


# Damage.


def test_a_flipped_bit_anywhere_is_seen_or_harmless(tmp_path, checkpoints):
    save_all(checkpoints, [2])
    draw = np.random.default_rng(0)
    seen = 0
    for path in data_files(tmp_path / "checkpoints" / "2"):
        original = path.read_bytes()
        for position in draw.integers(len(original), size=2):
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
    assert seen > 6


def copy_the_step_before(folder):
    shutil.rmtree(folder)
    shutil.copytree(folder.parent / "1", folder)


def remove_marks(folder):
    for path in folder.rglob("commit_success.txt"):
        path.unlink()


def truncate_all(folder):
    for path in data_files(folder):
        path.write_bytes(b"")


DAMAGES = {
    "without arrays": lambda folder: shutil.rmtree(folder / "state" / "d"),
    "without a record": lambda folder: shutil.rmtree(folder / "record"),
    "without marks": remove_marks,
    "truncated": truncate_all,
    "a copy": copy_the_step_before,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_step_gives_way_to_the_one_before(tmp_path, capfd, damage):
    with Checkpoints(tmp_path) as writer:
        save_all(writer, [1, 2], {2: 30.0})
    DAMAGES[damage](tmp_path / "2")
    for read_only in (True, False):
        with Checkpoints(tmp_path, read_only=read_only) as checkpoints:
            state, record = checkpoints.restore_latest(make_state())
            step = record["step"]
            assert bits(state) == bits(make_state(step))
            said = capfd.readouterr().err
            if step == 1:
                assert "2 is damaged" in said and said.endswith("; going back to step 1\n")
                assert (tmp_path / "damaged" / "2").is_dir() != read_only
            if not read_only:  # the run goes on and saves the same step again
                save_all(checkpoints, [step + 1])
                assert checkpoints.scores(step + 1) is None
                assert checkpoints.restore_latest(make_state())[1]["step"] == step + 1
    assert damage == "without marks" or step == 1


def test_an_empty_folder_of_a_step_hides_none(tmp_path, capfd):
    with Checkpoints(tmp_path) as writer:
        save_all(writer, [1])
    (tmp_path / "2").mkdir()
    for read_only in (True, False):
        with Checkpoints(tmp_path, read_only=read_only) as checkpoints:
            assert checkpoints.steps() == [1]
            assert capfd.readouterr().err == f"checkpoint {tmp_path}/2 is empty\n"
            if not read_only:
                save_all(checkpoints, [2])
                assert checkpoints.restore_latest(make_state())[1]["step"] == 2


def test_no_whole_step_is_one_clear_line(tmp_path, checkpoints):
    save_all(checkpoints, [1, 2])
    for step in "12":
        DAMAGES["without a record"](tmp_path / "checkpoints" / step)
    with pytest.raises(UserError, match="no checkpoint in .* is whole: ") as caught:
        checkpoints.restore_latest(make_state())
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["1", "2"]


# Failures while writing.


KILLED = """
import sys, numpy as np
from knet_jax.saved.checkpoints import Checkpoints
checkpoints = Checkpoints(sys.argv[1])
state = {"params": {str(i): np.full((512, 512), float(i)) for i in range(24)}}
checkpoints.save(1, state, {"examples": 1})
checkpoints.wait()
for step in range(2, 1000):
    checkpoints.save(step, state, {"examples": step})
    print("saving", flush=True)
"""


def test_kill_9_during_a_save_keeps_the_step_before(tmp_path):
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, tmp_path],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout.readline() == "saving\n"
    time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    with Checkpoints(tmp_path) as checkpoints:
        state = {"params": {str(i): np.full((512, 512), float(i)) for i in range(24)}}
        restored, record = checkpoints.restore_latest(state)
        assert bits(restored) == bits(state)
        assert record["progress"] == {"examples": record["step"]}
        checkpoints.save(record["step"] + 1, state, {})
    # What the killed save left behind is gone.
    assert {path.name for path in tmp_path.iterdir()} == set(map(str, checkpoints.steps()))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of Orbax's threads
def test_a_disk_that_takes_no_more_is_one_clear_line(tmp_path, capsys):
    """An error of the loop loses no save, and is told beside that of the save."""
    state = {"params": np.random.default_rng(0).standard_normal((1000, 1000))}
    line = (
        f"checkpoint of step 2 (8 MiB) cannot be written to {tmp_path}: file too large; on disk: 1"
    )
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        checkpoints.wait()
        with largest_file(1 << 20), pytest.raises(UserError) as caught:
            checkpoints.save(2, state, {})
            checkpoints.wait()
        assert str(caught.value) == line
    with (
        largest_file(1 << 20),
        pytest.raises(ValueError, match="a broken picture"),
        Checkpoints(tmp_path) as checkpoints,
    ):
        checkpoints.save(2, state, {})
        raise ValueError("a broken picture")
    assert capsys.readouterr().err == f"{line}\n"
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.steps() == [1]
        checkpoints.restore(state, 1)


def test_a_folder_that_is_gone_is_one_clear_line(tmp_path, checkpoints):
    shutil.rmtree(tmp_path / "checkpoints")
    (tmp_path / "checkpoints").write_text("a file where the folder was")
    checkpoints.save(1, make_state(), {})
    with pytest.raises(UserError, match="the folder has been removed"):
        checkpoints.wait()


def test_an_unwritable_folder_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to .*file/run: Not a directory"):
        check_writable(tmp_path / "file" / "run")
    with pytest.raises(UserError, match="cannot write to /proc/knet: "):
        check_writable("/proc/knet")
    with pytest.raises(UserError, match="no checkpoints: .*none does not exist"):
        Checkpoints(tmp_path / "none", read_only=True)
    check_writable(tmp_path / "new" / "run")
    assert list((tmp_path / "new" / "run").iterdir()) == []
