"""The two programs from end to end, each in a process of its own, as a user runs them."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_coco
import tiny_runs
from coco_readers import InstanceFile, PanopticFile
from devices import environment
from PIL import Image
from programs import INTERRUPTIBLE, program

from knet_jax.cli import commandline
from knet_jax.config.files import load_config, load_saved_config, save_config
from knet_jax.data import batches, pipeline
from knet_jax.model import init_variables, make_model
from knet_jax.saved.checkpoints import Checkpoints
from knet_jax.segmentation import rle
from knet_jax.tasks import TASKS
from knet_jax.training.logs import read_log
from knet_jax.training.train_step import TrainState

ROOT = Path(__file__).parents[1]
CONFIG = "configs/shapes_panoptic.py:tiny"
SMALL = (
    "--config.data.canvas=(64, 64)",  # square: one program for both orientations
    "--config.data.image_side=(64, 96)",
    "--config.data.short_side=(40, 64)",
    "--config.data.long_side=64",
    "--config.model.channels=16",
    "--config.model.ffn_channels=32",
    "--config.model.num_heads=2",
    "--config.model.num_stages=1",
    "--config.model.num_proposals=12",
    "--config.model.backbone.width=8",
    # Enough for scores that are not 0.
    "--config.optim.lr=0.005",
    "--config.optim.warmup_steps=0",
    "--config.train.ema_decay=0.5",
    "--config.eval.num_pictures=2",
    "--config.train.log_every=1",
    "--config.train.checkpoint_every=2",
)


def start(script, *arguments, num_devices=1):
    return subprocess.Popen(
        [sys.executable, script, *map(str, arguments)],
        cwd=ROOT,
        env=environment(num_devices),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    """Status, standard output, standard error."""
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def run(script, *arguments, **keywords):
    return finish(start(script, *arguments, **keywords))


def train_arguments(workdir, data_dir, *more, config=CONFIG):
    where = ("--workdir", workdir, f"--config.data.data_dir={data_dir}")
    if config == CONFIG:
        more = ("--config.eval.instance_threshold=0", "--config.eval.overlap_threshold=0", *more)
    return ("train.py", "--config", config, *where, *SMALL, *more)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data_dir):
    """A run of twelve steps that nothing interrupts, and what it printed."""
    workdir = tmp_path_factory.mktemp("run") / "whole"
    status, out, err = run(*train_arguments(workdir, data_dir, "--config.train.steps=12"))
    assert status == 0, err
    return workdir, out + err


def arrays_of(workdir, step):
    """Everything that a checkpoint holds, by digest."""
    checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
    record = checkpoints._read_record(step)
    checkpoints.close()
    return record["arrays"], record["progress"]


def logged(workdir):
    """What must not change: all but speed, and the evaluations, which depend on where runs end."""
    records = [record for record in read_log(workdir) if "loss/total" in record]
    speed = ("images_per_second", "data_wait_share")
    return [{k: v for k, v in record.items() if k not in speed} for record in records]


# Training.


def test_a_run_leaves_what_it_promises(whole):
    workdir, printed = whole
    assert "FROM SCRATCH" in printed and "parameters" in printed and "learning rate" in printed
    for name in ("config.json", "log.jsonl", "curve.png", "checkpoints", "events"):
        assert (workdir / name).exists(), name
    pictures = sorted((workdir / "pictures").glob("*.png"))
    assert [picture.name for picture in pictures] == [f"step_{s:07}.png" for s in (4, 8, 12)]
    picture = np.asarray(Image.open(pictures[0]))
    assert picture.ndim == 3 and picture.std() > 10
    records = read_log(workdir)
    steps = [record for record in records if "loss/total" in record]
    assert [record["step"] for record in steps] == list(range(1, 13))
    wanted = {"loss/stage1/mask", "loss/initial/dense", "lr/all", "grad_norm", "matched"}
    assert wanted | {"images_per_second", "data_wait_share"} <= steps[0].keys()
    scores = [record for record in records if "val/PQ" in record]
    assert [record["step"] for record in scores] == [4, 8, 12]
    assert steps[-1]["loss/total"] < steps[0]["loss/total"]


@pytest.mark.slow
def test_stopped_and_resumed_equals_never_stopped(whole, data_dir, tmp_path):
    """2 steps and an end, then Ctrl-C after some more, then the rest: the same in every bit."""
    workdir = tmp_path / "parts"
    status, _, err = run(*train_arguments(workdir, data_dir, "--config.train.steps=2"))
    assert status == 0, err

    arguments = train_arguments(workdir, data_dir, "--config.train.steps=12")
    process = start("-c", INTERRUPTIBLE, *arguments)
    deadline = time.monotonic() + 200
    while read_log(workdir)[-1]["step"] < 3 and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    status, out, err = finish(process)
    assert status == 130, err
    assert "resuming from step 2" in out
    assert err.splitlines()[-1].startswith("train.py: stopped at step ")
    stopped = int(err.splitlines()[-1].split("step ")[1].split(",")[0])
    assert 3 <= stopped < 12

    status, out, err = run(*train_arguments(workdir, data_dir, "--config.train.steps=12"))
    assert status == 0, err
    assert f"resuming from step {stopped}" in out
    assert arrays_of(workdir, 12) == arrays_of(whole[0], 12)
    assert logged(workdir) == logged(whole[0])


STOPPED_IN_EVALUATION = """
import os, runpy, signal, sys
from knet_jax.evaluation import Evaluator

evaluate = Evaluator.predictions

def predictions(self, variables):
    for prediction in evaluate(self, variables):
        os.kill(os.getpid(), signal.SIGTERM)
        yield prediction

Evaluator.predictions = predictions
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def scored(workdir):
    """The evaluations that a run has logged."""
    return {r["step"]: r["val/PQ"] for r in read_log(workdir) if "val/PQ" in r}


@pytest.mark.slow
def test_a_run_stopped_in_an_evaluation_makes_it_up(whole, data_dir, tmp_path):
    workdir = tmp_path / "parts"
    arguments = train_arguments(workdir, data_dir, "--config.train.steps=12")
    says(run("-c", STOPPED_IN_EVALUATION, *arguments), "stopped at step 4", status=143)
    assert scored(workdir) == {}
    status, out, err = run(*arguments)
    assert status == 0, err
    assert "resuming from step 4" in out
    assert scored(workdir) == scored(whole[0])
    assert arrays_of(workdir, 12) == arrays_of(whole[0], 12)
    assert logged(workdir) == logged(whole[0])


@pytest.mark.slow
def test_a_run_is_done_when_its_last_step_is_evaluated(whole, data_dir, tmp_path):
    workdir = shutil.copytree(whole[0], tmp_path / "run")
    scores, log = workdir / "checkpoints" / "12" / "scores.json", workdir / "log.jsonl"
    scores.unlink()
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:-1]))
    arguments = train_arguments(workdir, data_dir, "--config.train.steps=12")
    says(run("-c", STOPPED_IN_EVALUATION, *arguments), "stopped at step 12", status=143)
    assert 12 not in scored(workdir) and not scores.exists()
    done = f"done: PQ {scored(whole[0])[12]:.1f}"
    for makes_up in (True, False):
        status, out, err = run(*arguments)
        assert status == 0, err
        assert out.splitlines()[-1].startswith(done)
        assert ("step 12: PQ" in err) == makes_up and "compiling" not in err
        assert scored(workdir) == scored(whole[0]) and scores.exists()


SCORED_OTHERWISE = """
import runpy, sys
from knet_jax.checkpoint import Checkpoints

add_scores = Checkpoints.add_scores

def add_other_scores(self, step, scores):
    better = {"val/mIoU": 30.0 * (step == 1), "val_ema/mIoU": 30.0 * (step == 2)}
    assert better.keys() <= scores.keys()
    add_scores(self, step, scores | better)

Checkpoints.add_scores = add_other_scores
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_the_best_step_and_that_of_the_average_are_kept(data_dir, tmp_path):
    """Of a semantic run, which is trained and evaluated from end to end."""
    whole = ("--config.train.steps=4", "--config.train.eval_every=1", "--config.train.keep=1")
    # Squares: a program or two less to compile.
    small = ("--config.data.image_side=(64, 64)", "--config.data.crop=(64, 64)")
    small += tuple(flag for flag in tiny_runs.OVERRIDES if "image_side" not in flag)
    small += (*tiny_runs.OF_TASKS["semantic"], "--config.data.num_val=2")
    status, out, err = run(
        *("-c", SCORED_OTHERWISE, "train.py", "--config", "configs/shapes_semantic.py:tiny"),
        *("--workdir", tmp_path, f"--config.data.data_dir={data_dir}", *small, *whole),
        *("--config.train.ema_decay=0.5", "--config.data.num_workers=0"),
    )
    assert status == 0, err
    assert "step 4: mIoU" in err and "done: mIoU 0.0" in out
    checkpoints = Checkpoints(tmp_path / "checkpoints", read_only=True)
    assert checkpoints.steps() == [1, 2, 4]
    checkpoints.close()
    metrics = evaluate(tmp_path, "--ema")
    assert (metrics["step"], metrics["num_images"]) == (2, 2)
    logged = next(r for r in read_log(tmp_path) if r["step"] == 2 and "val/mIoU" in r)
    np.testing.assert_allclose(metrics["mIoU"], logged["val_ema/mIoU"], rtol=1e-6)
    assert evaluate(tmp_path)["step"] == 1


@pytest.mark.slow
def test_a_loss_that_is_no_number_stops_the_run(data_dir, tmp_path):
    arguments = (
        "--config.optim.lr=1e30",
        "--config.train.checkpoint_every=1",
        "--config.train.steps=6",
    )
    status, _, err = run(*train_arguments(tmp_path / "run", data_dir, *arguments))
    line = err.splitlines()[-1]
    assert status == 2, err
    assert "Traceback" not in err
    assert "loss/total" in line and "is not finite" in line and "images: " in line
    step = int(line.split("step ")[1].split(":")[0])
    images = line.split("images: ")[1].split(";")[0].split(", ")
    assert len(images) == 4
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", read_only=True)
    steps = checkpoints.steps()
    checkpoints.close()
    assert all(saved < step for saved in steps)
    assert f"last checkpoint: {steps[-1] if steps else 'none'}" in line


# Evaluation.


def test_evaluation_needs_the_workdir_alone(whole, tmp_path):
    workdir, _ = whole
    status, out, err = run(
        "eval.py", "--workdir", workdir, "--output", tmp_path, "--limit", 5, "--results"
    )
    assert status == 0, err
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    groups = {
        f"{name}{suffix}" for name in ("PQ", "SQ", "RQ") for suffix in ("", "_things", "_stuff")
    }
    assert groups <= metrics.keys()
    assert all(0 <= metrics[name] <= 100 for name in groups)
    assert metrics["num_images"] == 5 and len(metrics["per_class"]) == 9
    assert metrics["step"] in (4, 8, 10, 12)
    assert "Things" in out and "PQ" in out
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 2
    results = json.loads((tmp_path / "panoptic.json").read_text())
    assert len(results["annotations"]) == 5
    assert len(list((tmp_path / "panoptic").glob("*.png"))) == 5


@pytest.mark.parametrize(
    "name, more", [("val", ()), ("val_ema", ("--ema", "--checkpoint", "latest"))]
)
def test_evaluation_gives_the_numbers_of_the_training_run(whole, tmp_path, name, more):
    """Of its best step, which has some score, and of the average at its last."""
    workdir, _ = whole
    status, _, err = run("eval.py", "--workdir", workdir, "--output", tmp_path, *more)
    assert status == 0, err
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    logged = {record["step"]: record for record in read_log(workdir) if "val/PQ" in record}
    best = max(logged, key=lambda step: (logged[step]["val/PQ"], step))
    assert logged[best]["val/PQ"] > 0 and logged[best]["val/SQ"] != logged[best]["val_ema/SQ"]
    assert metrics["step"] == (12 if "latest" in more else best) and metrics["num_images"] == 8
    for key in ("PQ", "SQ_stuff", "RQ_things"):
        np.testing.assert_allclose(
            metrics[key], logged[metrics["step"]][f"{name}/{key}"], rtol=1e-6
        )


class Found(Exception):
    """The variables that are evaluated."""


@pytest.mark.parametrize("flags_, params", [((), 1), (("--ema",), 2)], ids=["run", "average"])
def test_the_average_is_evaluated_with_the_statistics_of_the_run(
    data_dir, tmp_path, monkeypatch, flags_, params
):
    """All parameters are 1 in the checkpoint, their average is 2, and the statistics are 3."""
    overrides = ("--config.train.ema_decay=0.9", "--config.model.backbone.norm=batch")
    config = load_config(f"{ROOT / CONFIG}", [f"--config.data.data_dir={data_dir}", *overrides])
    save_config(config, tmp_path)
    split = pipeline.load_split(config.data, config.data.val_split, config.task)
    shapes = jax.eval_shape(lambda: init_variables(make_model(**config.model), 0))
    filled = lambda part, value: jax.tree.map(lambda x: np.full(x.shape, value, x.dtype), part)
    state = TrainState(
        np.int32(1),
        filled(shapes["params"], 1),
        filled(shapes["batch_stats"], 3),
        (),
        filled(shapes["params"], 2),
    )
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(1, state, {"categories": split.categories._asdict()})

    def evaluate(self, variables, visit=None):
        raise Found(variables)

    with program("eval") as eval_, pytest.raises(Found) as found:
        monkeypatch.setattr(eval_.Evaluator, "evaluate", evaluate)
        commandline.run(eval_.main, ["eval.py", "--workdir", str(tmp_path), *flags_])
    [variables] = found.value.args
    values = {"params": params, "batch_stats": 3}
    jax.tree.map(
        np.testing.assert_array_equal,
        variables,
        {part: filled(shapes[part], value) for part, value in values.items()},
    )


def evaluate(workdir, *arguments):
    """Evaluates a run in this process. Returns its metrics."""
    with program("eval") as eval_:
        commandline.run(eval_.main, ["eval.py", "--workdir", str(workdir), *map(str, arguments)])
    return json.loads((workdir / "metrics.json").read_text())


def read_panoptic_results(path, truth):
    return {id: m.ids.shape for id, m in read_file(PanopticFile, path, truth) if m.segments}


def read_instance_results(path, truth):
    results = read_file(InstanceFile, path, truth)
    assert all(len(instances) == 20 for _, instances in results)
    return {id: rle.decode(instances[0].rle).shape for id, instances in results}


def read_file(kind, path, truth):
    """What the own reader of a kind of COCO's result files finds in one: pictures by their id."""
    place = path.with_name("truth.json")
    place.write_text(json.dumps(truth))
    file = kind(path, kind(place))
    return [(id, file[id]) for id in file]


def read_semantic_results(path, truth):
    results, shapes = json.loads(path.read_text()), {}
    names = {image["id"]: image["file_name"] for image in truth["images"]}
    for image in results["images"]:
        labels = np.asarray(Image.open(path.with_suffix("") / image["png"]))
        assert image["file_name"] == names[image["id"]]
        assert set(np.unique(labels)) <= {category["id"] for category in truth["categories"]}
        shapes[image["id"]] = labels.shape
    return shapes


READERS = {
    "panoptic": read_panoptic_results,
    "instance": read_instance_results,
    "semantic": read_semantic_results,
}


@pytest.mark.slow
@pytest.mark.parametrize("task", READERS)
def test_results_and_rounds_of_every_task(data_dir, tmp_path, monkeypatch, task):
    """The truth of a picture is what is first seen in it, after the last update."""
    metric, truths = TASKS[task].metric, {}
    count = metric.count

    def count_anew(truth, result, num_classes, image_id):
        return count(truths.setdefault(image_id, result), result, num_classes, image_id)

    monkeypatch.setattr(metric, "count", count_anew)
    workdir = tiny_runs.write(
        tmp_path / "run",
        task,
        f"--config.data.data_dir={data_dir}",
        "--config.data.num_workers=0",
        "--config.eval.batch_size=2",
    )
    metrics = evaluate(workdir, "--results", "--rounds", "--limit", 2)
    assert (metrics["num_images"], metrics["num_broken"]) == (2, 0)
    first, last = metrics["rounds"]
    assert (first.pop("updates"), last.pop("updates")) == (0, 1)
    assert first.keys() == last.keys() == {key for key in metrics if key in last}
    assert last == {key: metrics[key] for key in last}
    headline = metric.HEADLINE[0]
    assert first[headline] < last[headline] > 80  # an empty mask is not even like itself
    config = load_saved_config(workdir)
    split = pipeline.load_split(config.data, config.data.val_split, task)
    sizes = {split.image_id(i): tuple(split.sizes[i].tolist()) for i in range(2)}
    names, ids, num_things = split.categories
    truth = {
        "images": [
            {"id": split.image_id(i), "file_name": split.file_name(i), "height": h, "width": w}
            for i, (h, w) in enumerate(sizes.values())
        ],
        "categories": [
            {"id": id, "name": name, "isthing": int(k < num_things)}
            for k, (id, name) in enumerate(zip(ids, names))
        ],
        "annotations": [],
    }
    assert READERS[task](workdir / f"{task}.json", truth) == sizes


def test_broken_pictures_are_not_counted(data_dir, tmp_path, monkeypatch, capsys):
    load = batches._load

    def load_all_but_one(split, record):
        if record.file_name == "val_000001.png":
            raise ValueError("cannot be decoded")
        return load(split, record)

    monkeypatch.setattr(batches, "_load", load_all_but_one)
    workdir = tiny_runs.write(
        tmp_path / "run",
        "semantic",
        f"--config.data.data_dir={data_dir}",
        "--config.data.num_workers=0",
        "--config.data.max_broken_share=0.01",
        "--config.eval.batch_size=2",
    )
    metrics = evaluate(workdir, "--limit", 3)
    assert (metrics["num_images"], metrics["num_broken"]) == (2, 1)
    assert "WARNING: 1 of 3 images are broken and left out" in capsys.readouterr().out


@pytest.mark.slow
def test_instances_are_also_judged_by_their_boundaries(data_dir, tmp_path):
    """And a run whose statistics depend on the parts of a batch says so when these change."""
    arguments = train_arguments(
        *(tmp_path, data_dir, "--config.train.steps=1", "--config.model.backbone.norm=batch"),
        config="configs/shapes_instance.py:tiny",
    )
    status, out, err = run(*arguments)
    assert status == 0 and "WARNING" not in out, err
    status, out, err = run(*arguments, "--config.train.microbatch=2")
    assert status == 0, err
    assert "WARNING: 1 devices of 4 images at a time have become 1 of 2: batch statistics" in out

    status, out, err = run("eval.py", "--workdir", tmp_path, "--boundary", "--limit", 3)
    assert status == 0, err
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["boundary"].keys() == {name for name in metrics if name.startswith("A")}
    assert metrics["boundary"]["AP"] <= metrics["AP"]
    assert "Boundaries" in out


# Mistakes of the user: one line, and a status that is not 0.


def says(outcome, *words, status=2):
    actual, _, err = outcome
    assert "Traceback" not in err, err
    line = err.splitlines()[-1]
    assert actual == status, err
    for word in words:
        assert word in line, line


def coco(root, tmp_path, *more):
    where = ("--workdir", tmp_path / "run", f"--config.data.data_dir={tmp_path / 'prepared'}")
    arguments = ("--config", "configs/coco_panoptic.py:tiny", f"--config.data.root={root}")
    return run("train.py", *arguments, *where, *more)


def test_no_dataset_at_the_root(tmp_path):
    says(coco(tmp_path / "nothing", tmp_path), "config.data.root", str(tmp_path / "nothing"))


def test_a_broken_annotation_file(tmp_path):
    root = tiny_coco.write(tmp_path / "coco")
    path = root / "annotations" / "panoptic_train2017.json"
    path.write_text(path.read_text()[:-50])
    says(coco(root, tmp_path), path.name)


def test_data_of_other_classes(tmp_path):
    root = tiny_coco.write(tmp_path / "coco")
    says(coco(root, tmp_path), "config.model.num_things is 80", "--config.model.num_things=2")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--config", f"{CONFIG},huge"], ["huge", "tiny"]),
        (["--config", CONFIG, "--config.optim.learning_rate=1"], ["config.optim.learning_rate"]),
        ([], ["--config is missing"]),
    ],
)
def test_what_does_not_exist_is_named(arguments, words, tmp_path):
    says(run("train.py", *arguments, "--workdir", tmp_path), *words)


def test_a_batch_that_the_devices_do_not_divide(tmp_path, data_dir):
    arguments = train_arguments(tmp_path, data_dir, "--config.train.batch_size=5")
    says(run(*arguments, num_devices=2), "config.train.batch_size is 5", "2 devices")


def test_a_workdir_that_cannot_be_written(tmp_path, data_dir):
    (tmp_path / "file").touch()
    says(run(*train_arguments(tmp_path / "file" / "run", data_dir)), str(tmp_path / "file" / "run"))


def test_weights_that_lack_a_tensor(tmp_path, data_dir):
    path = tmp_path / "weights.npz"
    np.savez(path, **{"bn1.weight": np.ones(8, np.float32)})
    arguments = train_arguments(tmp_path / "run", data_dir, f"--config.init_weights={path}")
    says(run(*arguments), "config.init_weights", str(path), "no tensor")


def test_a_run_of_another_class_count_is_not_resumed(whole, data_dir):
    arguments = train_arguments(whole[0], data_dir, "--config.model.num_things=7")
    says(run(*arguments), "config.model.num_things was 5, now 7")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--config.model.num_things=7"], ["config.model.num_things is 5 in it, 7 here"]),
        (["--config.model.channels=32"], ["config.model.channels is 16 in it, 32 here"]),
        (["--checkpoint", "3"], ["no checkpoint of step 3"]),
        (["--boundary"], ["--boundary: config.task is 'panoptic'", "instance"]),
        (["--checkpoint", "good"], ["checkpoint=good", "latest"]),
    ],
)
def test_an_evaluation_that_does_not_fit_the_run(whole, arguments, words, tmp_path):
    says(run("eval.py", "--workdir", whole[0], "--output", tmp_path, *arguments), *words)


def test_an_evaluation_of_nothing(tmp_path):
    says(run("eval.py", "--workdir", tmp_path), str(tmp_path), "no run")
    says(run("eval.py"), "--workdir is missing")
