"""Pictures in, segments out."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import jax
import numpy as np
import parity
import pytest
import tiny_runs
from PIL import Image
from safetensors.numpy import save_file

import knet_jax
from knet_jax.app import segmenter
from knet_jax.app.segmenter import Segmenter, as_image
from knet_jax.data import pipeline
from knet_jax.inference import forward
from knet_jax.inference.resampling import Canvas
from knet_jax.saved.convert import export_weights
from knet_jax.saved.models import open_model
from knet_jax.segmentation import rle
from knet_jax.structs import Batch
from knet_jax.system.compilation_cache import keep_programs
from knet_jax.training.evaluation import Evaluator

CONFIGS = Path(__file__).parents[1] / "configs"
TASKS = ("panoptic", "instance", "semantic")
SEVERAL_PASSES = (
    "--config.eval.scales=(0.5, 1.0)",
    "--config.eval.flip=True",
    "--config.eval.window=(64, 64)",
    "--config.eval.window_step=(32, 32)",
)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of models by task."""
    folder = tmp_path_factory.mktemp("models")
    return {task: tiny_runs.write(folder / task, task) for task in TASKS}


@pytest.fixture(scope="module")
def segmenters(models):
    """Opened, by task."""
    return {task: Segmenter(open_model(path)) for task, path in models.items()}


def picture(height, width, seed=0):
    """Smooth spots."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (5, 7, 3)).astype(np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


# What it sees.


@pytest.mark.parametrize(
    "task, overrides",
    [
        pytest.param("panoptic", (), marks=pytest.mark.slow),
        pytest.param("panoptic", ("--config.data.eval_multiple=32",), marks=pytest.mark.slow),
        pytest.param("instance", (), marks=pytest.mark.slow),
        ("semantic", ()),
        pytest.param("semantic", ("--config.data.eval_multiple=1",), marks=pytest.mark.slow),
        pytest.param("semantic", SEVERAL_PASSES, marks=pytest.mark.slow),
    ],
)
def test_it_sees_what_an_evaluation_sees(models, tmp_path, task, overrides):
    run = open_model(models[task], overrides=[f"--config.data.data_dir={tmp_path}", *overrides])
    split = pipeline.load_split(run.config.data, "val", task)
    evaluator = Evaluator(run.model, split, run.config, jax.devices()[:1])
    sees = Segmenter(run)
    for prediction in evaluator.predictions(run.variables):
        ours = sees(split.image(prediction.index), threshold=0.2).prediction
        theirs = prediction.prediction
        if task == "panoptic":
            assert len(ours.segments) == len(theirs.segments) > 0
            assert (ours.ids != theirs.ids).mean() < 1e-3
            np.testing.assert_allclose(
                [s.score for s in ours.segments], [s.score for s in theirs.segments], rtol=1e-4
            )
        elif task == "instance":
            theirs = [one for one in theirs if one.score >= 0.2]
            assert [one.label for one in ours] == [one.label for one in theirs] != []
            for one, other in zip(ours, theirs):
                assert (rle.decode(one.rle) != rle.decode(other.rle)).mean() < 1e-3
        else:
            assert len(np.unique(ours)) > 1
            assert (ours != theirs).mean() < 2e-3


@pytest.mark.parametrize("task", TASKS)
def test_pictures_of_one_shape_share_one_program(models, task):
    sees = Segmenter(open_model(models[task]))
    for height, width in ((63, 94), (50, 75), (40, 60), (60, 90)):
        assert sees(picture(height, width)).size == (height, width)
    assert sees._predict._cache_size() == 1
    sees(picture(94, 63))
    assert sees._predict._cache_size() == 2


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("size", [(1, 1), (1, 700), (900, 2), (400, 500), (8, 12)])
def test_pictures_of_any_size(segmenters, task, size):
    result = segmenters[task](picture(*size))
    assert result.size == size and result.draw().shape == (*size, 3)
    for segment in result.segments:
        assert segment.mask.shape == size and segment.area == segment.mask.sum()


@pytest.mark.parametrize("task", TASKS)
def test_a_list_is_its_pictures_in_order(models, task):
    sizes = [(64, 96), (96, 64), (60, 90), (33, 44), (64, 96)]
    pictures = [picture(*size, seed) for seed, size in enumerate(sizes)]
    run = open_model(models[task])
    one, several = Segmenter(run, batch_size=1), Segmenter(run, batch_size=3)
    together = several(pictures, threshold=0.2)
    assert [result.size for result in together] == sizes
    for image, result in zip(pictures, together):
        alone = one(image, threshold=0.2)
        np.testing.assert_array_equal(result.image, image)
        assert not np.shares_memory(result.image, image)
        assert [s.label for s in result.segments] == [s.label for s in alone.segments]
        for a, b in zip(result.segments, alone.segments):
            assert abs(a.score - b.score) < 1e-4 and (a.mask != b.mask).mean() < 1e-3
    assert several([]) == []


def test_a_stream_reads_only_a_little_ahead(segmenters):
    drawn = []

    def pictures():
        for seed in range(6):
            drawn.append(seed)
            yield picture(64, 96, seed)

    ahead = []
    for i, result in enumerate(segmenters["panoptic"].stream(pictures())):
        ahead.append(len(drawn) - i)
        assert result.size == (64, 96)
    assert max(ahead) == 2 and len(ahead) == 6


def middle(segments):
    """A score that some are above and some below."""
    return float(np.median([segment.score for segment in segments if segment.is_thing]))


def test_thresholds_change_the_result_and_not_the_program(segmenters):
    sees, image = segmenters["panoptic"], picture(64, 96)
    by_config = sees(image)
    count = sees._predict._cache_size()
    every = sees(image, threshold=0.0, overlap=0.0)
    strict = sees(image, threshold=1.0, overlap=1.0)
    assert len(every.segments) > len(by_config.segments) > len(strict.segments)
    assert not strict.instances
    threshold = middle(every.segments)
    some = sees(image, threshold=threshold, overlap=0.0)
    assert sees._predict._cache_size() == count
    assert 0 < len(some.instances) < len(every.instances)
    filtered = every.above(threshold)
    np.testing.assert_array_equal(filtered.semantic, some.semantic)
    assert [s.score for s in filtered.segments] == [s.score for s in some.segments]
    assert [s.area for s in filtered.segments] == [s.area for s in some.segments]


def test_thresholds_of_instances(segmenters):
    sees, image = segmenters["instance"], picture(64, 96)
    every = sees(image, threshold=0.0)
    threshold = middle(every.segments)
    some = sees(image, threshold=threshold)
    assert len(every.instances) > len(some.instances) > 0
    assert [s.score for s in some.instances] == [s.score for s in every.above(threshold).instances]
    assert min(s.score for s in some.instances) >= threshold
    labels = segmenters["semantic"](image)
    assert labels.above(0.9) is labels


@pytest.mark.parametrize(
    "options",
    [
        *({"threshold": value} for value in (1.5, -0.1, np.nan, "0.5", True, [0.5])),
        {"overlap": 2},
    ],
)
def test_thresholds_that_make_no_sense(segmenters, options):
    with pytest.raises(ValueError, match="(threshold|overlap) is .*; accepted: a number from"):
        segmenters["panoptic"](picture(8, 8), **options)


# What it takes.


def test_files_of_all_kinds(segmenters, tmp_path):
    image = picture(40, 60)
    grey = Image.fromarray(image).convert("L")
    exif = Image.Exif()
    exif[0x0112] = 6
    files = {
        "plain.png": lambda path: Image.fromarray(image).save(path),
        "grey.png": grey.save,
        "cmyk.jpg": lambda path: Image.fromarray(image).convert("CMYK").save(path),
        "palette.png": lambda path: Image.fromarray(image).quantize().save(path),
        "alpha.webp": lambda path: Image.fromarray(image).convert("RGBA").save(path),
        "deep.tif": lambda path: cv2.imwrite(str(path), image.astype(np.uint16) * 257),
        "turned.jpg": lambda path: Image.fromarray(image).save(path, exif=exif),
    }
    for name, write in files.items():
        write(tmp_path / name)
        result = segmenters["panoptic"](tmp_path / name)
        assert result.size == ((60, 40) if name == "turned.jpg" else (40, 60)), name
    np.testing.assert_array_equal(as_image(str(tmp_path / "plain.png")), image)
    np.testing.assert_array_equal(as_image(Image.open(tmp_path / "plain.png")), image)


def test_what_is_no_picture_is_named(segmenters, tmp_path):
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "empty.png").touch()
    Image.fromarray(picture(64, 64)).save(tmp_path / "whole.jpg")
    data = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "half.jpg").write_bytes(data[:-100])
    for name, words in {
        "text.jpg": "cannot be decoded",
        "empty.png": "cannot be decoded",
        "half.jpg": "the picture is truncated",
        "missing.jpg": "No such file",
        ".": "Is a directory",
    }.items():
        with pytest.raises(ValueError, match=f"{tmp_path / name}: .*{words}"):
            segmenters["panoptic"]([picture(8, 8), tmp_path / name])


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 5), np.uint8),
        np.zeros((4, 5, 4), np.uint8),
        np.zeros((4, 5, 3)),
        np.zeros((0, 5, 3), np.uint8),
        np.zeros((2, 4, 5, 3), np.uint8),
        None,
    ],
)
def test_arrays_that_are_no_picture(segmenters, array):
    with pytest.raises(ValueError, match=r"accepted: uint8 \[H, W, 3\] in RGB"):
        segmenters["panoptic"](array)


# Opening a model.


def test_load_opens_a_model(models):
    sees = knet_jax.load(models["panoptic"], checkpoint="latest")
    assert isinstance(sees, knet_jax.Segmenter) and sees.task == "panoptic" and sees.step == 1
    assert sees.categories == tiny_runs.categories("panoptic") and sees.batch_size == 1
    assert sees.config.model.dtype == "float32"
    half = knet_jax.load(models["panoptic"], dtype="bfloat16", batch_size=2)
    assert half.config.model.dtype == "bfloat16" and half.batch_size == 2
    assert half(picture(64, 96)).size == (64, 96)
    for size in (0, 2.5, "3", True):
        with pytest.raises(ValueError, match=f"batch_size is {size!r}; accepted: a whole number"):
            knet_jax.load(models["panoptic"], batch_size=size)
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        _ = knet_jax.lod


@pytest.mark.parametrize("task", TASKS)
def test_a_file_sees_what_the_folder_sees(models, segmenters, tmp_path, task):
    path = tmp_path / "a.safetensors"
    export_weights(models[task], path)
    image = picture(64, 96)
    theirs, ours = segmenters[task](image), knet_jax.load(path)(image)
    assert ours.to_coco() == theirs.to_coco() and ours.segments
    assert ours.categories == theirs.categories


def test_a_picture_may_change_once_it_was_segmented(segmenters):
    image = picture(64, 96)
    result = segmenters["panoptic"](image)
    image[:] = 0
    np.testing.assert_array_equal(result.image, picture(64, 96))


@pytest.mark.parametrize("batch_size", [1, 2])
def test_the_program_of_the_first_pictures_is_made_before_they_come(
    models, monkeypatch, batch_size
):
    traced = []

    def trace(*args, **kwargs):
        traced.append(kwargs["canvas"])
        return forward.predict(*args, **kwargs)

    monkeypatch.setattr(segmenter, "predict", trace)
    images = [picture(48, 64, seed) for seed in range(2)]
    drawn = []
    sees = knet_jax.load(
        models["panoptic"],
        batch_size=batch_size,
        first=(drawn.append(i) or image for i, image in enumerate(images)),
    )
    assert len(traced) == 1 and len(drawn) == len(images)
    results = sees(images)
    assert len(traced) == 1
    for result, wanted in zip(results, Segmenter(open_model(models["panoptic"]))(images)):
        np.testing.assert_array_equal(result.panoptic.ids, wanted.panoptic.ids)


def test_importing_the_package_costs_nothing():
    code = "import sys, knet_jax; assert knet_jax.__version__; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_programs_are_kept_where_the_user_keeps_such_things(monkeypatch, tmp_path):
    before = jax.config.jax_compilation_cache_dir
    assert before  # the tests have a folder of their own
    keep_programs()
    assert jax.config.jax_compilation_cache_dir == before
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        keep_programs()
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "knet_jax" / "programs")
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.slow
def test_the_second_start_compiles_nothing(models, tmp_path):
    code = (
        "import sys, numpy, jax, knet_jax\n"
        "jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.2)\n"
        "jax.config.update('jax_explain_cache_misses', True)\n"
        "knet_jax.load(sys.argv[1])(numpy.zeros((64, 96, 3), 'uint8'))\n"
    )
    cache = tmp_path / "knet_jax" / "programs"
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    environment |= {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[1])}
    kept = []
    for _ in range(2):
        arguments = [sys.executable, "-c", code, str(models["panoptic"])]
        subprocess.run(arguments, env=environment, check=True)
        kept.append({path.name for path in cache.glob("jit_predict*-cache")})
    assert len(kept[0]) == 1 and kept[0] == kept[1]


# What the reference sees.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("det_panoptic_r50_fwd", "coco_panoptic.py"),
        ("det_instance_r50_fwd", "coco_instance.py"),
        ("seg_fcn_fwd", "ade20k_semantic.py"),
    ],
)
def test_a_checkpoint_of_the_reference_sees_what_the_reference_sees(
    fixtures, tmp_path, monkeypatch, name, spec
):
    """From the file to results at the pictures' size; pictures come normalized with the numbers."""
    manifest = json.loads((fixtures / f"{name}.json").read_text())
    theirs = np.load(fixtures / f"{name}.npz")
    save_file(parity.rule_weights(manifest), tmp_path / "a.safetensors")
    monkeypatch.setattr("knet_jax.inference.normalize", lambda image, size, dtype: image)
    sees = knet_jax.load(tmp_path / "a.safetensors", config=str(CONFIGS / spec))
    image = theirs["image"].transpose(0, 2, 3, 1)
    square = [image.shape[1:3]] * len(image)
    size, original = (np.int32(manifest.get(f"{kind}_shapes", square)) for kind in ("img", "ori"))
    batch = Batch(image, None, size, original, np.arange(len(image), dtype=np.int32))
    flags = np.zeros(len(image), bool)

    def results(**thresholds):
        output = sees._predict(
            sees._variables,
            [batch],
            [flags],
            original,
            sees.thresholds | thresholds,
            canvas=Canvas.of(size, original),
        )
        for i in range(len(image)):
            one = jax.tree.map(lambda x, i=i: np.asarray(x)[i], output)
            yield sees._task.read(one, original[i], thresholds.get("instance_threshold", 0.0))

    for variant, values in manifest.get("panoptic_variants", {}).items():
        found = results(
            instance_threshold=values["instance_score_thr"], overlap_threshold=values["overlap_thr"]
        )
        for i, seen in enumerate(found):
            fused = SimpleNamespace(labels={i: [segment.label for segment in seen.segments]})
            assert parity.disagreement(seen.ids, fused, i, theirs[f"pan_{variant}_{i}"]) < 1e-3
    if sees.task == "instance":
        for i, seen in enumerate(results()):
            scores = [instance.score for instance in seen]
            np.testing.assert_allclose(scores, theirs[f"inst_scores_{i}"], rtol=1e-3)
            # Equal scores but for rounding may swap places.
            labels = sorted(instance.label for instance in seen)
            assert labels == sorted(theirs[f"inst_labels_{i}"].tolist())
    if sees.task == "semantic":
        for i, seen in enumerate(results()):
            assert (seen != theirs["pred_labels"][i] + 1).mean() < 1e-3
