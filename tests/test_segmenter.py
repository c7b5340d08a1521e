"""Pictures in, segments out."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import tiny_runs
from PIL import Image
from safetensors.numpy import save_file
from tiny_runs import picture

import knet_jax
from knet_jax.app import segmenter
from knet_jax.app.segmenter import Segmenter, as_image
from knet_jax.data import pipeline
from knet_jax.inference.resampling import Canvas
from knet_jax.saved.convert import export_weights
from knet_jax.saved.models import open_model
from knet_jax.segmentation import rle
from knet_jax.structs import Batch
from knet_jax.system.backend import start_backend
from knet_jax.system.errors import UserError
from knet_jax.training.evaluation import Evaluator

CONFIGS = Path(__file__).parents[1] / "configs"
SEVERAL_PASSES = (
    "--config.eval.scales=(0.5, 1.0)",
    "--config.eval.flip=True",
    "--config.eval.window=(64, 64)",
    "--config.eval.window_step=(32, 32)",
)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


# What it sees.


@pytest.mark.parametrize(
    "task, overrides",
    [
        ("semantic", ("--config.data.image_side=(64, 64)",)),
        slow("panoptic", ("--config.data.eval_multiple=32",)),
        slow("instance", ()),
        slow("semantic", SEVERAL_PASSES),
    ],
)
def test_it_sees_what_an_evaluation_sees(tiny_models, tmp_path, task, overrides):
    overrides = [f"--config.data.data_dir={tmp_path}", "--config.data.num_val=3", *overrides]
    run = open_model(tiny_models[task], overrides=overrides)
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


def test_pictures_share_programs_and_batches(tiny_models, monkeypatch):
    """With a network that sees the class 1 + row of the batch: which pictures come together."""
    traced = []

    def predict(variables, batches, mirrored, original_size, thresholds, *, canvas, **_):
        traced.append((batches[0].image.shape[0], canvas))
        rows = jnp.arange(len(original_size), dtype=jnp.uint8) + 1
        return jnp.broadcast_to(rows[:, None, None], (len(rows), canvas.height, canvas.width))

    monkeypatch.setattr(segmenter, "predict", predict)
    run = open_model(tiny_models["semantic"])
    sees = Segmenter(run)
    for size in ((63, 94), (50, 75), (40, 60), (60, 90)):
        assert sees(picture(*size)).size == size
    assert len(traced) == 1
    sees(picture(94, 63))
    assert len(traced) == 2

    traced.clear()
    sizes = [(60, 90), (90, 60), (50, 75), (33, 44), (60, 90)]
    pictures = [picture(*size, seed) for seed, size in enumerate(sizes)]
    results = Segmenter(run, batch_size=3)(pictures)
    assert [result.size for result in results] == sizes
    assert [result.prediction.max() for result in results] == [1, 1, 2, 1, 2]
    for image, result in zip(pictures, results):
        np.testing.assert_array_equal(result.image, image)
    assert {count for count, _ in traced} == {1, 3}  # one that is alone is not padded
    assert Segmenter(run)([]) == []


@pytest.mark.parametrize("task", ["semantic", slow("panoptic")])
def test_pictures_that_come_together_are_seen_as_alone(tiny_models, segmenters, task):
    pictures = [picture(seed=seed) for seed in range(2)]
    together = Segmenter(open_model(tiny_models[task]), batch_size=3)(pictures, threshold=0.2)
    for image, result in zip(pictures, together, strict=True):
        alone = segmenters[task](image, threshold=0.2)
        assert [s.label for s in result.segments] == [s.label for s in alone.segments] != []
        for a, b in zip(result.segments, alone.segments):
            assert abs(a.score - b.score) < 1e-4 and (a.mask != b.mask).mean() < 1e-3


@pytest.mark.parametrize(
    "task, sizes",
    [
        ("semantic", [(1, 700)]),
        slow("panoptic", [(1, 1), (900, 2)]),
        slow("instance", [(400, 500)]),
    ],
)
def test_pictures_of_any_size(segmenters, task, sizes):
    for size in sizes:
        result = segmenters[task](picture(*size))
        assert result.size == size and result.draw().shape == (*size, 3)
        for segment in result.segments:
            assert segment.mask.shape == size and segment.area == segment.mask.sum()


def test_a_stream_reads_only_a_little_ahead(segmenters):
    drawn = []

    def pictures():
        for seed in range(6):
            drawn.append(seed)
            yield picture(seed=seed)

    ahead = []
    for i, result in enumerate(segmenters["panoptic"].stream(pictures())):
        ahead.append(len(drawn) - i)
        assert result.size == (64, 96)
    assert max(ahead) == 2 and len(ahead) == 6


def middle(segments):
    """A score that some are above and some below."""
    return float(np.median([segment.score for segment in segments if segment.is_thing]))


def test_thresholds_change_the_result_and_not_the_program(segmenters):
    sees, image = segmenters["panoptic"], picture()
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
    sees, image = segmenters["instance"], picture()
    every = sees(image, threshold=0.0)
    threshold = middle(every.segments)
    some = sees(image, threshold=threshold)
    assert len(every.instances) > len(some.instances) > 0
    assert [s.score for s in some.instances] == [s.score for s in every.above(threshold).instances]
    assert min(s.score for s in some.instances) >= threshold


def test_thresholds_that_make_no_sense(segmenters):
    for value in (1.5, -0.1, np.nan, "0.5", True, [0.5]):
        for name in ("threshold", "overlap"):
            with pytest.raises(UserError, match=f"^{name} is .*; accepted: a number from 0 to 1"):
                segmenters["panoptic"](picture(8, 8), **{name: value})


# What it takes.


def test_files_of_all_kinds(tmp_path):
    image = picture(40, 60)
    exif = Image.Exif()
    exif[0x0112] = 6
    files = {
        "plain.png": Image.fromarray(image).save,
        "grey.png": Image.fromarray(image).convert("L").save,
        "cmyk.jpg": Image.fromarray(image).convert("CMYK").save,
        "palette.png": Image.fromarray(image).quantize().save,
        "alpha.webp": Image.fromarray(image).convert("RGBA").save,
        "deep.tif": lambda path: cv2.imwrite(str(path), image.astype(np.uint16) * 257),
        "turned.jpg": lambda path: Image.fromarray(image).save(path, exif=exif),
    }
    for name, write in files.items():
        write(tmp_path / name)
        size = (60, 40) if name == "turned.jpg" else (40, 60)
        assert as_image(tmp_path / name).shape == (*size, 3), name
    np.testing.assert_array_equal(as_image(str(tmp_path / "plain.png")), image)
    np.testing.assert_array_equal(as_image(Image.open(tmp_path / "plain.png")), image)
    assert not np.shares_memory(as_image(image), image)  # it may change once it was segmented


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
        with pytest.raises(UserError, match=f"{tmp_path / name}: .*{words}"):
            segmenters["panoptic"]([tmp_path / name])
    for shape, dtype in (
        ((4, 5), np.uint8),
        ((4, 5, 4), np.uint8),
        ((4, 5, 3), float),
        ((0, 5, 3), np.uint8),
        ((2, 4, 5, 3), np.uint8),
        ((), object),
    ):
        with pytest.raises(UserError, match=r"accepted: uint8 \[H, W, 3\] in RGB"):
            as_image(np.zeros(shape, dtype))


# Opening a model.


def test_load_opens_a_model(tiny_models):
    sees = knet_jax.load(tiny_models["semantic"], checkpoint="latest")
    assert isinstance(sees, knet_jax.Segmenter) and sees.task == "semantic" and sees.step == 1
    assert sees.categories == tiny_runs.categories("semantic") and sees.batch_size == 1
    assert sees.config.model.dtype == "float32"
    half = knet_jax.load(tiny_models["semantic"], dtype="bfloat16", batch_size=2)
    assert half.config.model.dtype == "bfloat16" and half.batch_size == 2
    for size in (0, 2.5, "3", True):
        with pytest.raises(UserError, match=f"batch_size is {size!r}; accepted: a whole number"):
            knet_jax.load(tiny_models["semantic"], batch_size=size)
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        _ = knet_jax.lod


def test_a_file_sees_what_the_folder_sees(tiny_models, segmenters, tmp_path):
    path = tmp_path / "a.safetensors"
    export_weights(tiny_models["semantic"], path)
    theirs, ours = segmenters["semantic"](picture()), knet_jax.load(path)(picture())
    assert ours.to_coco() == theirs.to_coco() != []
    assert ours.categories == theirs.categories


def test_importing_the_package_costs_nothing():
    code = "import sys, knet_jax; assert knet_jax.__version__; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_programs_are_kept_where_the_user_keeps_such_things(monkeypatch, tmp_path):
    before = jax.config.jax_compilation_cache_dir
    assert before  # the tests have a folder of their own
    start_backend()
    assert jax.config.jax_compilation_cache_dir == before
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        start_backend()
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "knet_jax" / "programs")
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.slow
def test_the_second_start_compiles_nothing(tiny_models, tmp_path):
    code = (
        "import sys, numpy, jax, knet_jax\n"
        "jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.2)\n"
        "knet_jax.load(sys.argv[1])(numpy.zeros((64, 96, 3), 'uint8'))\n"
    )
    cache = tmp_path / "knet_jax" / "programs"
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    environment |= {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[1])}
    kept = []
    for _ in range(2):
        arguments = [sys.executable, "-c", code, str(tiny_models["semantic"])]
        subprocess.run(arguments, env=environment, check=True)
        kept.append({path.name for path in cache.glob("jit_predict*-cache")})
    assert len(kept[0]) == 1 and kept[0] == kept[1]


# What the reference sees.


@pytest.mark.slow
def test_a_checkpoint_of_the_reference_sees_what_the_reference_sees(
    fixtures, tmp_path, monkeypatch
):
    """From the file to results at the pictures' size; pictures come normalized with the numbers."""
    manifest = json.loads((fixtures / "det_panoptic_r50_fwd.json").read_text())
    theirs = np.load(fixtures / "det_panoptic_r50_fwd.npz")
    save_file(parity.rule_weights(manifest), tmp_path / "a.safetensors")
    monkeypatch.setattr("knet_jax.inference.forward.normalize", lambda image, size, dtype: image)
    sees = knet_jax.load(tmp_path / "a.safetensors", config=str(CONFIGS / "coco_panoptic.py"))
    image = theirs["image"].transpose(0, 2, 3, 1)
    size, original = (np.int32(manifest[f"{kind}_shapes"]) for kind in ("img", "ori"))
    batch = Batch(image, None, size, original, np.arange(len(image), dtype=np.int32))
    for variant, values in manifest["panoptic_variants"].items():
        output = sees._predict(
            sees._variables,
            [batch],
            [np.zeros(len(image), bool)],
            original,
            {
                "instance_threshold": values["instance_score_thr"],
                "overlap_threshold": values["overlap_thr"],
            },
            canvas=Canvas.of(size, original),
        )
        for i in range(len(image)):
            one = jax.tree.map(lambda x, i=i: np.asarray(x)[i], output)
            seen = sees._task.read(one, original[i])
            fused = SimpleNamespace(labels={i: [segment.label for segment in seen.segments]})
            assert parity.disagreement(seen.ids, fused, i, theirs[f"pan_{variant}_{i}"]) < 1e-3
