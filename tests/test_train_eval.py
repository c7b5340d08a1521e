"""Training and evaluation from end to end, in this process: a tiny run of every task."""

import itertools
import json
import os
import shutil
import signal
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_coco
from PIL import Image
from tiny_training import config_of, share_programs

from knet_jax import analyse, evaluate, load_config, train
from knet_jax.data import batches
from knet_jax.saved.checkpoints import Checkpoints
from knet_jax.system.errors import UserError
from knet_jax.system.signals import Preempted
from knet_jax.tasks import TASKS
from knet_jax.training import logs, loop, train_step
from knet_jax.training.evaluation import Evaluator
from knet_jax.training.logs import read_log
from knet_jax.training.train_step import Parts

STEPS = 6
SCORED = (3, 6)


@pytest.fixture(scope="module", autouse=True)
def shared():
    with pytest.MonkeyPatch.context() as monkeypatch:
        share_programs(monkeypatch)
        yield


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


class Whole(NamedTuple):
    """A run that nothing interrupted, and what it printed."""

    task: str
    run: loop.Run
    printed: str

    @property
    def workdir(self):
        return self.run.workdir


def train_and_listen(config, workdir):
    """The run, and what it printed to both streams."""
    with redirect_stdout(StringIO()) as out, redirect_stderr(out):
        return train(config, workdir), out.getvalue()


def of(*tasks):
    """Lets a test have a run of each task."""
    return pytest.mark.parametrize("whole", tasks, indirect=True, scope="module")


@pytest.fixture(scope="module")
def whole(request, tmp_path_factory, data_dir):
    config = config_of(request.param, data_dir)
    return Whole(request.param, *train_and_listen(config, tmp_path_factory.mktemp("run") / "run"))


def arrays_of(workdir, step=STEPS):
    """Everything that a checkpoint holds, by digest."""
    with Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
        record = checkpoints._read_record(step)
    return record["arrays"], record["progress"]


def logged(workdir):
    """What must not change: all but speed and the evaluations."""
    speed = ("images_per_second", "data_wait_share")
    records = [record for record in read_log(workdir) if "loss/total" in record]
    return [{k: v for k, v in record.items() if k not in speed} for record in records]


def scored(workdir):
    """The evaluations that a run has logged."""
    records = [r for r in read_log(workdir) if any(k.startswith("val/") for k in r)]
    return {r["step"]: {k: v for k, v in r.items() if k.startswith("val")} for r in records}


# Training.


@of(*TASKS)
def test_a_run_leaves_what_it_promises(whole):
    task, run, printed = whole
    for text in ("FROM SCRATCH", "parameters", "learning rate 0.01", "frozen: frozen", "done: "):
        assert text in printed
    for name in ("config.json", "log.jsonl", "curve.png", "checkpoints", "events"):
        assert (run.workdir / name).exists(), name
    pictures = sorted((run.workdir / "pictures").iterdir())
    assert [picture.name for picture in pictures] == [f"step_{step:07}.png" for step in SCORED]
    assert np.asarray(Image.open(pictures[0])).std() > 10
    steps = [record for record in read_log(run.workdir) if "loss/total" in record]
    assert [record["step"] for record in steps] == list(range(1, 1 + STEPS))
    measure = "accuracy" if task == "semantic" else "matched"
    wanted = {"loss/stage1/mask", "lr/head", "grad_norm", measure, "images_per_second"}
    assert wanted | {"data_wait_share"} <= steps[0].keys()
    assert min(record["loss/total"] for record in steps) < steps[0]["loss/total"]
    assert run.step == STEPS and tuple(scored(run.workdir)) == SCORED
    assert run.scores == pytest.approx(scored(run.workdir)[STEPS])
    headline = TASKS[task].metric.HEADLINE[0]
    assert {f"val/{headline}", f"val_ema/{headline}"} <= run.scores.keys()


def stop_before(monkeypatch, owner, name, turn=1):
    """Sends SIGTERM when a method is called for the nth time."""
    method, turns = getattr(owner, name), itertools.count(1)

    def stop(*args, **kwargs):
        if next(turns) == turn:
            os.kill(os.getpid(), signal.SIGTERM)
        return method(*args, **kwargs)

    monkeypatch.setattr(owner, name, stop)


@of("semantic")
def test_stopped_and_resumed_equals_never_stopped(whole, data_dir, tmp_path, monkeypatch):
    """Stopped in step 2 and in the evaluation of step 3: the same in every bit. Of a network with
    running statistics, dropout and an average, each of which must go on where it was."""
    config, steps = config_of(whole.task, data_dir), []
    for where in ((logs.Progress, "update", 2), (Evaluator, "batches")):
        with monkeypatch.context() as patch, pytest.raises(Preempted, match="stopped at") as error:
            stop_before(patch, *where)
            train(config, tmp_path)
        steps.append(int(str(error.value).split("step ")[1].split(",")[0]))
        assert error.value.signum == signal.SIGTERM
    assert steps == [2, 3] and not scored(tmp_path)
    run, printed = train_and_listen(config, tmp_path)
    assert "resuming from step 3" in printed
    assert run.scores == whole.run.scores
    assert scored(tmp_path) == scored(whole.workdir)
    assert arrays_of(tmp_path) == arrays_of(whole.workdir)
    assert logged(tmp_path) == logged(whole.workdir)


@of("panoptic")
def test_programs_that_took_long_to_compile_are_made_anew(whole, data_dir, tmp_path, monkeypatch):
    cleared = []
    monkeypatch.setattr(loop, "LONG_COMPILATION", 0.0)
    monkeypatch.setattr(jax, "clear_caches", lambda: cleared.append(True))
    run, _ = train_and_listen(config_of("panoptic", data_dir), tmp_path / "run")
    assert cleared == [True] and run.scores == whole.run.scores
    assert arrays_of(run.workdir) == arrays_of(whole.workdir)


@of("panoptic")
def test_a_run_that_is_done_says_so_again(whole, data_dir, tmp_path, monkeypatch):
    """When its last evaluation is made up. One that goes on with other parts is told of it."""
    changes = []
    monkeypatch.setattr(train_step, "explain_change", lambda model, *parts: changes.append(parts))
    config = config_of(whole.task, data_dir, **{"train.microbatch": 2})
    workdir = shutil.copytree(whole.workdir, tmp_path / "run")
    (workdir / "checkpoints" / str(STEPS) / "scores.json").unlink()  # killed before they were there
    config.init_weights = "nowhere.pth"
    for makes_up in (True, False):
        run, printed = train_and_listen(config, workdir)
        assert run.scores == whole.run.scores and "compiling" not in printed
        assert (f"step {STEPS}: " in printed) == makes_up
        assert scored(workdir) == scored(whole.workdir)
        assert "config.init_weights=nowhere.pth is not used" in printed
        assert ("config.train.microbatch" in printed) == makes_up  # the config is saved anew
    assert changes == 2 * [(Parts(1, 4), Parts(1, 2))]
    assert arrays_of(workdir) == arrays_of(whole.workdir)


def test_a_run_without_a_better_score_ends(data_dir, tmp_path):
    changes = {"optim.lr": 1e-12, "train.eval_every": 1, "train.patience": 2}
    config = config_of("semantic", data_dir, **changes)
    for _ in range(2):  # the second time it is over
        run, printed = train_and_listen(config, tmp_path / "run")
        assert run.step == 3 and tuple(scored(run.workdir)) == (1, 2, 3) and "done: " in printed


@pytest.mark.slow
def test_the_best_step_and_that_of_the_average_are_kept(data_dir, tmp_path, monkeypatch):
    add_scores = Checkpoints.add_scores

    def add_other_scores(self, step, scores):
        better = {"val/mIoU": 30.0 * (step == 1), "val_ema/mIoU": 30.0 * (step == 2)}
        assert better.keys() <= scores.keys()
        add_scores(self, step, scores | better)

    monkeypatch.setattr(Checkpoints, "add_scores", add_other_scores)
    changes = {"train.steps": 4, "train.eval_every": 1, "train.keep": 1}
    run = train(config_of("semantic", data_dir, **changes), tmp_path)
    assert run.step == 4 and run.scores["val/mIoU"] == 0
    with Checkpoints(tmp_path / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.steps() == [1, 2, 4]
    metrics = evaluate(tmp_path, ema=True)
    assert (metrics["step"], metrics["num_images"]) == (2, 4)
    np.testing.assert_allclose(metrics["mIoU"], scored(tmp_path)[2]["val_ema/mIoU"], rtol=1e-6)
    assert evaluate(tmp_path)["step"] == 1


def test_what_diverges_goes_back_to_where_a_lower_rate_helps(data_dir, tmp_path, monkeypatch):
    """The loss tells of the step before: a step before that was saved is set aside, and no earlier
    one. Resumed, a run that diverges before its next checkpoint names the one that it started from."""
    make_train_step = train_step.make_train_step
    faults = {"at": 4, "kind": "loss"}

    def make_diverging(*args, **kwargs):
        take_step = make_train_step(*args, **kwargs)

        def step(state, parts):
            state, metrics = take_step(state, parts)
            if state.step == faults["at"] and faults["kind"] == "loss":
                metrics |= {"loss/total": np.float32(np.nan)}
            elif state.step == faults["at"]:
                params = jax.tree.map(lambda x: x * jnp.inf, state.params)
                state = state._replace(params=params)
            return state, metrics

        return step

    monkeypatch.setattr(train_step, "make_train_step", make_diverging)
    config = config_of("panoptic", data_dir, **{"train.steps": 5, "train.eval_every": 0})
    lines = []
    for at, kind in ((3, "loss"), (5, "loss"), (4, "state"), (5, "loss"), (4, "loss"), (9, "loss")):
        faults |= {"at": at, "kind": kind}
        if at == 9:
            assert train(config, tmp_path).step == 5
            break
        with pytest.raises(UserError) as error:
            train(config, tmp_path)
        line = str(error.value)
        lines.append(line.rpartition("last checkpoint: ")[2].partition(";")[0])
        what = "loss/total" if kind == "loss" else "params/"
        assert (f"; else remove {tmp_path}/checkpoints/2 to" in line) == (len(lines) > 2)
        assert line.startswith(f"step {at}: {what}") and "is not finite; images: train_" in line
        assert len(line.split("images: ")[1].split(";")[0].split(", ")) == 4
    # Saved at 2: set aside at 3. Saved at 2 and 4: 4 set aside at 5, 2 stays, whatever follows.
    assert lines == ["none", "2", "2", "2", "2"], lines


def test_a_failed_run_leaves_nothing_and_no_traceback(data_dir, tmp_path, capsys):
    config = config_of("panoptic", data_dir, init_weights=str(tmp_path / "nowhere.pth"))
    with pytest.raises(UserError, match="nowhere.pth"):
        train(config, tmp_path / "runs" / "new")
    (tmp_path / "old").mkdir()
    with pytest.raises(UserError, match="nowhere.pth"):
        train(config, tmp_path / "old")
    assert (tmp_path / "old").is_dir() and not (tmp_path / "runs" / "new").exists()
    assert "Traceback" not in capsys.readouterr().err


# Evaluation.


@of(*TASKS)
def test_evaluation_gives_the_numbers_of_the_training_run(whole, tmp_path):
    for ema, prefix in ((False, "val"), (True, "val_ema")):
        metrics = evaluate(whole.workdir, checkpoint="latest", ema=ema, output=tmp_path)
        assert (metrics["step"], metrics["ema"], metrics["num_images"]) == (STEPS, ema, 4)
        assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
        scores = {k: v for k, v in whole.run.scores.items() if k.startswith(f"{prefix}/")}
        assert {f"{prefix}/{k.partition('/')[2]}" for k in scores} == scores.keys()
        for name, value in scores.items():
            np.testing.assert_allclose(metrics[name.partition("/")[2]], value, rtol=1e-6)
    pictures = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    assert pictures == ["val_000000.png", "val_000003.png"]  # from the first to the last
    assert not (whole.workdir / "metrics.json").exists()


def sizes_of_results(task, output):
    """Height and width of every picture, by its id, as the file of results has them."""
    content = json.loads((output / f"{task}.json").read_text())
    if task == "instance":
        return {one["image_id"]: tuple(one["segmentation"]["size"]) for one in content}
    if task == "panoptic":
        files = {one["image_id"]: one["file_name"] for one in content["annotations"]}
    else:
        files = {one["id"]: one["png"] for one in content["images"]}
    return {id: Image.open(output / task / name).size[::-1] for id, name in files.items()}


@of(*TASKS)
def test_results_rounds_and_boundaries(whole, tmp_path, monkeypatch, capsys):
    """What is first seen of a picture is taken for its truth: the last round is right, others not."""
    task = whole.task
    metric, truths = TASKS[task].metric, {}
    count = metric.count

    def count_anew(truth, result, num_classes, image_id, *overlap):
        truth = truths.setdefault(image_id, result)
        return count(truth, result, num_classes, image_id, *overlap)

    monkeypatch.setattr(metric, "count", count_anew)
    boundary = task == "instance"
    metrics = evaluate(
        whole.workdir,
        output=tmp_path,
        limit=3,
        results=True,
        rounds=True,
        boundary=boundary,
        analysis=True,
    )
    assert metrics["analysis"]["rounds"] == metrics["rounds"]
    assert metrics["analysis"] == json.loads((tmp_path / "analysis/analysis.json").read_text())
    assert (metrics["num_images"], metrics["num_broken"]) == (3, 0)
    first, last = metrics["rounds"]
    assert (first.pop("updates"), last.pop("updates")) == (0, 1)
    assert first.keys() == last.keys() and last == {key: metrics[key] for key in last}
    headline = metric.HEADLINE[0]
    assert first[headline] < last[headline] == pytest.approx(100)
    assert sizes_of_results(task, tmp_path) == dict.fromkeys(truths, (64, 64)) and len(truths) == 3
    said = capsys.readouterr().out
    assert "updates" in said and ("Boundaries" in said) == boundary
    if boundary:
        assert metrics["boundary"].keys() == {name for name in metrics if name.startswith("A")}
        assert metrics["boundary"]["AP"] <= metrics["AP"]


def test_a_run_keeps_its_analysis_up_to_date(data_dir, tmp_path):
    """It is that of the first pictures, as an evaluation of the same step writes it."""
    config = config_of("panoptic", data_dir, **{"train.steps": 3, "eval.analysis": 3})
    run, _ = train_and_listen(config, tmp_path / "run")
    written = json.loads((run.workdir / "analysis" / "analysis.json").read_text())
    assert (run.workdir / "analysis" / "index.html").stat().st_size > 1000
    assert (written["step"], written["num_images"]) == (3, 3)
    assert written == analyse(run.workdir, checkpoint="latest", limit=3, output=tmp_path / "again")


@of("panoptic")
def test_broken_pictures_are_not_counted(whole, tmp_path, monkeypatch, capsys):
    load = batches._load

    def load_all_but_one(split, record):
        if record.file_name == "val_000001.png":
            raise UserError("cannot be decoded")
        return load(split, record)

    monkeypatch.setattr(batches, "_load", load_all_but_one)
    overrides = ["--config.data.max_broken_share=0.01"]
    metrics = evaluate(whole.workdir, limit=3, output=tmp_path, overrides=overrides)
    assert (metrics["num_images"], metrics["num_broken"]) == (2, 1)
    assert "WARNING: 1 of 3 images are broken and left out" in capsys.readouterr().out


# Mistakes of the user: one line that names what is wrong.


def says(words, function, *args, **kwargs):
    with pytest.raises(UserError) as error:
        function(*args, **kwargs)
    line = str(error.value)
    assert "\n" not in line
    for word in words:
        assert word in line, line


def test_what_training_cannot_use_is_named(data_dir, tmp_path):
    coco, damaged = (tiny_coco.write(tmp_path / name) for name in ("coco", "damaged"))
    path = damaged / "annotations" / "panoptic_train2017.json"
    path.write_text(path.read_text()[:-50])
    for root, words in (
        (tmp_path / "nothing", ("config.data.root", str(tmp_path / "nothing"))),
        (damaged, (path.name,)),
        (coco, ("config.model.num_things is 80", "--config.model.num_things=2")),
    ):
        values = {"data.root": str(root), "data.data_dir": str(tmp_path / "prepared")}
        config = load_config("coco_panoptic:tiny", values)
        says(words, train, config, tmp_path / "run")

    (tmp_path / "file").touch()
    says(["file/run"], train, config_of("panoptic", data_dir), tmp_path / "file" / "run")

    np.savez(tmp_path / "weights.npz", **{"bn1.weight": np.ones(8, np.float32)})
    config = config_of("panoptic", data_dir, init_weights=str(tmp_path / "weights.npz"))
    says(["config.init_weights", "no backbone"], train, config, tmp_path / "new")

    config = config_of("panoptic", data_dir, **{"train.microbatch": 3})
    says(["config.train.microbatch"], train, config, tmp_path / "new")


@of("panoptic")
def test_what_does_not_fit_a_run_is_named(whole, data_dir, tmp_path):
    config = config_of("panoptic", data_dir, **{"model.num_things": 7})
    says(["config.model.num_things was 5, now 7"], train, config, whole.workdir)
    for given, words in (
        ({"overrides": ["--config.model.num_things=7"]}, ("num_things is 5 in it, 7 here",)),
        ({"overrides": ["--config.model.channels=32"]}, ("channels is 8 in it, 32 here",)),
        ({"checkpoint": 5}, ("no checkpoint of step 5",)),
        ({"checkpoint": "good"}, ("checkpoint=good", "latest")),
        ({"boundary": True}, ("--boundary: config.task is 'panoptic'", "instance")),
        ({"output": whole.workdir / "config.json"}, ("config.json is a file",)),
    ):
        says(words, evaluate, whole.workdir, **{"output": tmp_path} | given)
    says([str(tmp_path), "no run"], evaluate, tmp_path)
