"""Batch prediction: one row a picture, whatever is broken, dies or is killed."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from programs import status_of
from tiny_runs import picture

pa = pytest.importorskip("pyarrow")
ray = pytest.importorskip("ray")

from pyarrow import parquet

from knet_jax.app import batch
from knet_jax.app.batch import Predictor, predict_batch
from knet_jax.app.batch_pictures import find_pictures, read_picture
from knet_jax.app.batch_rows import Rows, bad_row
from knet_jax.system.errors import UserError

ROOT = Path(__file__).parents[1]


def write_pictures(folder, num_good, num_broken=0):
    folder.mkdir()
    for i in range(num_good):
        Image.fromarray(picture(seed=i)).save(folder / f"good{i}.png")
    for i in range(num_broken):
        (folder / f"broken{i}.jpg").write_bytes(b"no picture")
    return folder


def rows_of(output):
    files = sorted((output / "rows").glob("*.parquet"))
    return [row for file in files for row in parquet.read_table(file).to_pylist()]


def segments(result):
    coco = result.to_coco()
    return coco["segments_info"] if isinstance(coco, dict) else coco


def essence(records):
    keys = ("category_id", "score", "area", "bbox", "segmentation")
    return [[record[key] for key in keys] for record in records]


# Pictures and rows, without Ray.


def test_pictures_in_a_folder_a_list_and_parquet_are_the_same(tmp_path):
    folder = write_pictures(tmp_path / "in", 3, 1)
    files = sorted(folder.iterdir())
    listed = tmp_path / "list.txt"
    listed.write_text("\n".join([*map(str, files), "", str(files[0])]))
    ids, data = [file.name for file in files], [file.read_bytes() for file in files]
    parquet.write_table(pa.table({"path": [*map(str, files)]}), tmp_path / "paths.parquet")
    shards = tmp_path / "shards"
    shards.mkdir()
    for i in (0, 2):
        table = pa.table({"id": ids[i : i + 2], "bytes": data[i : i + 2]})
        parquet.write_table(table, shards / f"{i}.parquet", row_group_size=1)
    for source in (folder, listed, tmp_path / "paths.parquet", shards):
        found = find_pictures(source, tmp_path / "out")
        assert [Path(one.id).name for one in found] == ids and len({p.stem for p in found}) == 4
        with pytest.raises(UserError, match="^cannot be decoded$"):
            read_picture(found[0], 50)
        for seed, one in enumerate(found[1:]):
            assert (read_picture(one, 50) == picture(seed=seed)).all()
        with pytest.raises(UserError, match="as costly as .* up to 0.01 "):
            read_picture(found[1], 0.01)
    listed.write_text("/nowhere/1.png")
    with pytest.raises(UserError, match="^No such file or directory$"):
        read_picture(find_pictures(listed, tmp_path)[0], 50)


@pytest.mark.parametrize(
    "columns, words",
    [
        ({"file": ["1.png"]}, "it has the columns file; accepted: path, or id and bytes"),
        ({"bytes": [b""]}, "it has the columns bytes; accepted"),
        ({"path": [None, "1.png"]}, "row 0 of row group 0 has no id or no path"),
        ({"id": ["a", "a"], "bytes": [b"", b""]}, "two pictures have the id 'a'"),
        ({"path": pa.array([], pa.string())}, "names no picture"),
    ],
)
def test_parquet_that_makes_no_sense_is_named(tmp_path, columns, words):
    file = tmp_path / "in.parquet"
    parquet.write_table(pa.table(columns), file)
    with pytest.raises(UserError) as raised:
        find_pictures(file, tmp_path / "out")
    assert words in str(raised.value) and str(file) in str(raised.value) or "two" in words


def rows(folder, ids="abcd", least=2, max_bad=1.0):
    return Rows(folder, list(ids), least, max_bad)


def made(ids, reason=None):
    status = "bad" if reason else "good"
    return [{"id": id, "path": id, "status": status, "reason": reason} for id in ids]


def test_rows_are_of_one_model_and_each_once(tmp_path):
    with rows(tmp_path) as first:
        first.check_model("m")
        first.add(made("a"))
        assert not list(tmp_path.iterdir())  # too few for a file
        first.add(made("b", "torn"))
        assert len(list(tmp_path.iterdir())) == 1
        first.add(made("c"))
    second = rows(tmp_path)
    assert second.done == set("abc") and second.reasons == {"torn": 1} and second.model == "m"
    with pytest.raises(UserError, match="rows of the model m, this one is n; accepted"):
        second.check_model("n")
    with pytest.raises(UserError, match="00000000.parquet: it has 'b', which is not among"):
        rows(tmp_path, "acd")
    (tmp_path / "00000002.parquet").write_bytes((tmp_path / "00000000.parquet").read_bytes())
    with pytest.raises(UserError, match="00000002.parquet: it has 'a', twice"):
        rows(tmp_path)
    (tmp_path / "00000002.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="00000002.parquet, cannot be read"):
        rows(tmp_path)


def test_too_large_a_share_of_bad_pictures_ends_it(tmp_path):
    some = rows(tmp_path, map(str, range(5000)), 9999, max_bad=0.1)
    some.add(made(map(str, range(100)), "torn"))
    some.check_share()  # of a thousand, so far
    some.add(made(["100"], "torn"))
    with pytest.raises(UserError, match="101 of 101 .* 101 of them: torn; .* --max_bad=0.1"):
        some.check_share()
    some.add(made(map(str, range(101, 1010))))
    some.check_share()
    some = rows(tmp_path, "ab", 9999, max_bad=0.4)
    some.add(made("a", "torn"))
    with pytest.raises(UserError, match="1 of 1 pictures"):
        some.check_share()


@pytest.mark.parametrize("task", ["panoptic", "instance"])  # two forms of COCO's records
def test_rows_have_what_the_segmenter_sees(tmp_path, tiny_models, segmenters, task):
    found = find_pictures(write_pictures(tmp_path / "in", 2, 1), tmp_path)
    predictor = Predictor(tiny_models[task], {}, 2, tmp_path / "out", 50)
    predictor._segmenter = segmenters[task]  # compiled for all tests
    digest = segmenters[task].digest
    with rows(tmp_path / "rows", [one.id for one in found]) as written:
        written.check_model(digest)
        written.add(predictor.predict(found))
    broken, *good = sorted(rows_of(tmp_path), key=lambda row: row["id"])
    assert broken["status"] == "bad" and broken["reason"] == "cannot be decoded"
    assert broken["size"] is broken["segments"] is None
    for seed, row in enumerate(good):
        result = segmenters[task](picture(seed=seed))
        assert row["status"] == "good" and row["reason"] is None and row["model"] == digest
        assert row["size"] == [64, 96] and row["id"] == f"good{seed}.png"
        assert essence(row["segments"]) == essence(segments(result)) and row["segments"]
        names = [segment["category_name"] for segment in row["segments"]]
        assert names == [segment.name for segment in result.segments]
        assert (tmp_path / "out" / "overlays" / f"good{seed}.jpg").exists()


def test_models_and_configs_have_digests_of_their_own(segmenters, tiny_models):
    from knet_jax.app.segmenter import load

    changed = load(tiny_models["panoptic"], overrides=["--config.eval.instance_threshold=0.5"])
    again = load(tiny_models["panoptic"])
    digests = [one.digest for one in (*segmenters.values(), changed)]
    assert len(set(digests)) == 4 and again.digest == segmenters["panoptic"].digest


@pytest.mark.parametrize(
    "words, said",
    [
        (("{in}",), "--model is missing"),
        (("{in}", "{in}", "--model", "m"), "accepted: one IMAGES"),
        (("/nowhere", "--model", "m"), "there is no /nowhere; accepted: a folder of pictures"),
        (("{in}/a.png", "--model", "m"), "a.png is none of: a folder of pictures"),
        (("gs://b/in", "--model", "m"), "--images=gs://b/in; accepted: a path of this machine"),
        (
            ("{in}", "--model", "m", "--max_bad", "5"),
            "5 is not accepted; accepted: a number from 0",
        ),
        (("{in}", "--model", "m", "--address", "localhost:1"), "--address=localhost:1: "),
    ],
)
def test_mistakes_are_one_line(tmp_path, capfd, words, said):
    (tmp_path / "a.png").touch()
    words = [word.replace("{in}", str(tmp_path)) for word in words]
    assert status_of("batch", *words, "--output", tmp_path / "out") == 2
    line = capfd.readouterr().err.strip()
    assert said in line and line.startswith("knet batch: ") and "\n" not in line


# On Ray.


class Light(Predictor):
    """Sees nothing, fast; and pictures do to it what their names say."""

    def open(self):
        if "dies" in self._model:
            os._exit(1)
        return self._model

    def predict(self, pictures):
        for one in pictures:
            with (Path(one.path).parents[1] / "tries").open("a") as file:
                file.write(f"{one.id}\n")
            if "kills" in one.id:
                os.kill(os.getpid(), signal.SIGKILL)
            assert "raises" not in one.id, "it is\nodd"
        return [bad_row(one, "torn") | {"status": "good", "reason": None} for one in pictures]


@pytest.fixture(scope="module")
def connected():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
        ray.init("local", num_cpus=6, include_dashboard=False, log_to_driver=False)
        yield
        ray.shutdown()


def test_what_kills_its_process_or_fails_is_tried_twice(tmp_path, monkeypatch, connected):
    monkeypatch.setattr(batch, "Predictor", Light)
    folder = tmp_path / "in"
    folder.mkdir()
    for name in [*(f"{i}.png" for i in range(9)), "4_kills.png", "7_raises.png"]:
        (folder / name).touch()
    summary = predict_batch(
        "m", folder, tmp_path / "out", chunk=4, max_bad=0.5, actors=2, cpus_per_actor=1
    )
    reasons = {"its process ended, 2 times": 1, "AssertionError: it is odd, 2 times": 1}
    assert summary[:6] == (11, 9, 2, reasons, "m", 11)
    assert sorted(row["id"] for row in rows_of(tmp_path / "out")) == sorted(os.listdir(folder))
    tries = (tmp_path / "tries").read_text().split()
    assert tries.count("4_kills.png") == tries.count("7_raises.png") == 2
    assert max(tries.count(id) for id in os.listdir(folder)) == 2

    # Started again it does what is missing, and refuses what does not fit.
    (folder / "new.png").touch()
    next((tmp_path / "out" / "rows").iterdir()).unlink()
    summary = predict_batch("m", folder, tmp_path / "out", max_bad=0.5)
    assert summary.pictures == summary.good + summary.bad == 12 and 2 <= summary.new < 11
    with pytest.raises(UserError, match="rows of the model m, this one is n"):
        predict_batch("n", folder, tmp_path / "out", max_bad=0.5)
    assert len(rows_of(tmp_path / "out")) == 12


@pytest.mark.slow
def test_what_never_opens_or_is_mostly_bad_ends_it(tmp_path, monkeypatch, connected):
    monkeypatch.setattr(batch, "Predictor", Light)
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("1.png", "2_raises.png", "3.png"):
        (folder / name).touch()
    with pytest.raises(UserError, match="3 processes ended while they opened the model"):
        predict_batch("dies", folder, tmp_path / "out")
    with pytest.raises(UserError, match="1 of [1-3] pictures are bad, .* --max_bad=0.05"):
        predict_batch("m", folder, tmp_path / "out")
    assert predict_batch("m", folder, tmp_path / "out", max_bad=0.4)[:3] == (3, 2, 1)


def start(*words):
    """Starts `knet batch`, in a group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "knet_jax.cli.main", "batch", *map(str, words)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        start_new_session=True,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_a_batch_that_is_killed_ends_as_one_that_is_not(tmp_path, tiny_models, segmenters):
    folder, output = write_pictures(tmp_path / "in", 40, 3), tmp_path / "out"
    words = (folder, "--model", tiny_models["panoptic"], "--output", output)
    words = (*words, "--chunk", 2, "--max_bad", 0.1, "--actors", 1)
    for _ in range(2):
        process = start(*words)
        before = len(rows_of(output))
        while len(rows_of(output)) == before and process.poll() is None:
            time.sleep(random.uniform(0, 0.5))
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it was done before"
    process = start(*words)
    said, _ = process.communicate()
    assert process.returncode == 3
    assert "audit: 43 pictures = 40 good + 3 bad" in said and " 43 new" not in said
    found = {row["id"]: row for row in rows_of(output)}
    assert len(found) == len(rows_of(output)) == 43
    assert sum(row["reason"] is not None for row in found.values()) == 3
    for seed in range(40):
        wanted = segments(segmenters["panoptic"](picture(seed=seed)))
        assert essence(found[f"good{seed}.png"]["segments"]) == essence(wanted)
