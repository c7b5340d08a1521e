"""Compares the network with numbers of the PyTorch reference: python tests/parity.py PATH…

A fixture is a manifest NAME.json, arrays NAME.npz, and no weights: those follow from the names of
the parameters by a rule. Every line of the report is one array: its largest error relative to the
array's largest value, and the tolerance. The exit status is 1 if anything fails. What is compared is
the package beside this folder, whatever else is installed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from devices import COMPILE_FAST
from ml_collections import ConfigDict

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from coco_readers import score_files, score_instance_files

from knet_jax.config.files import load_config
from knet_jax.data.transforms import resized_size
from knet_jax.inference.fusion import Fused, predict_panoptic
from knet_jax.inference.postprocess import predict_instances, predict_labels
from knet_jax.inference.resampling import ResultCanvas
from knet_jax.knet import KNet
from knet_jax.matching import LossWeights
from knet_jax.metrics import instance, semantic
from knet_jax.metrics.panoptic import summarize
from knet_jax.model import make_model, variable_shapes
from knet_jax.nn.deformable import deform_conv
from knet_jax.nn.layers import AXIS
from knet_jax.objectives import Judgement, KernelTargets, kernel_loss, match_stages
from knet_jax.saved.parameter_names import from_reference, to_reference
from knet_jax.segmentation.segments import Categories
from knet_jax.structs import EMPTY, Output, Pass, Segments, Stage
from knet_jax.tasks import TASKS
from knet_jax.training.optim import gradient_norm, make_optimizer, trainable
from knet_jax.training.train_step import compute_loss

GROUPS = (
    ("frozen", r"backbone/(stem|layer1)_.*", 0.0, 0.0),
    ("backbone", r"backbone/.*", 0.25, 1.0),
    ("head", r".*", 1.0, 1.0),
)

TERMS = {"mask": "mask", "dice": "dice", "rank": "rank", "label": "cls", "dense": "seg"}


class Row(NamedTuple):
    """One line of the report."""

    name: str
    error: float
    tolerance: float
    note: str = ""

    @property
    def passed(self) -> bool:
        return bool(self.error <= self.tolerance)


class Fixture(NamedTuple):
    """A manifest, its arrays, and the precision to compare in."""

    path: Path
    manifest: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray]
    dtype: str

    @property
    def exact(self) -> bool:
        """Whether we compute in double precision."""
        return self.dtype == "float64"

    def stored(self, key: str) -> Any:
        """The entry of the manifest that has our precision."""
        return self.manifest[f"{key}_{'f64' if self.exact else 'f32'}"]


def load(path: Path, dtype: str) -> Fixture:
    arrays = path.with_suffix(".npz")
    stored = dict(np.load(arrays)) if arrays.exists() else {}
    return Fixture(path, json.loads(path.read_text()), stored, dtype)


# Weights and networks.


def rule_weight(name: str, shape: list[int], seed: int) -> np.ndarray:
    """The tensor that the rule gives to a name, float32."""
    rng = np.random.Generator(np.random.PCG64(zlib.crc32(f"{seed}:{name}".encode())))
    z = rng.standard_normal(shape, dtype=np.float32)
    tenth = np.float32(0.1)
    if name.endswith("running_mean"):
        return tenth * z
    if name.endswith("running_var"):
        return 1 + tenth * abs(z)
    if name.endswith("relative_position_bias_table"):
        return np.float32(0.02) * z
    if len(shape) >= 2:
        mean = z.mean(axis=tuple(range(1, len(shape))), dtype=np.float64, keepdims=True)
        return (z - mean.astype(np.float32)) / np.float32(np.sqrt(np.prod(shape[1:])))
    if name.endswith("weight"):
        return 1 + tenth * z
    return tenth * z - (2 if name.endswith("fc_cls.bias") else 0)


def rule_weights(manifest: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The state dict of a fixture, without counters of batches and what the model derives."""
    return {
        name: rule_weight(name, shape, manifest["seed"])
        for name, shape, derived in manifest["params"]
        if not derived and not name.endswith("num_batches_tracked")
    }


def backbone(shapes: Mapping[str, list[int]]) -> dict[str, Any]:
    """`config.model.backbone` of a network with the given tensors."""

    def blocks(prefix: str) -> int:
        pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
        return 1 + max(int(m[1]) for m in map(pattern.match, shapes) if m)

    if "backbone.patch_embed.projection.weight" in shapes:
        table = "backbone.stages.{}.blocks.0.attn.w_msa.relative_position_bias_table"
        tables = [shapes[table.format(i)] for i in range(4)]
        return {
            "name": "swin",
            "channels": shapes["backbone.norm0.weight"][0],
            "depths": tuple(blocks(f"backbone.stages.{i}.blocks.") for i in range(4)),
            "num_heads": tuple(heads for _, heads in tables),
            "window": (math.isqrt(tables[0][0]) + 1) // 2,
        }
    offset = "backbone.layer{}.0.conv2.conv_offset.weight"
    return {
        "depths": tuple(blocks(f"backbone.layer{layer}.") for layer in (1, 2, 3, 4)),
        "deep_stem": "backbone.stem.0.weight" in shapes,
        "num_deformable": sum(offset.format(layer) in shapes for layer in (1, 2, 3, 4)),
    }


def network(fixture: Fixture) -> tuple[KNet, dict[str, Any]]:
    """Our network of a fixture's size, and its variables."""
    shapes = {name: shape for name, shape, _ in fixture.manifest["params"]}
    sizes = (
        segmentation if "decode_head.kernel_generate_head.conv_seg.weight" in shapes else detection
    )
    arguments = sizes(fixture.manifest, shapes)
    model = make_model(
        num_stages=sum(name.endswith("fc_mask.bias") for name in shapes),
        dropout=0.0,
        dtype=fixture.dtype,
        **arguments,
    )
    template = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    variables = {"batch_stats": {}} | from_reference(rule_weights(fixture.manifest), template)
    return model, jax.tree.map(lambda x: jnp.asarray(x, fixture.dtype), variables)


def detection(manifest: Mapping[str, Any], shapes: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of an instance or panoptic network."""
    num_classes = shapes["rpn_head.conv_seg.weight"][0]
    num_stuff = 53 if "panoptic" in manifest["model"] else 0
    return {
        "num_proposals": shapes["rpn_head.init_kernels.weight"][0],
        "num_things": num_classes - num_stuff,
        "num_stuff": num_stuff,
        "backbone": backbone(shapes),
    }


def segmentation(manifest: Mapping[str, Any], shapes: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a semantic network."""
    head = "decode_head.kernel_generate_head."
    marks = {
        "conv_cat": "fcn",
        "aspp_modules": "aspp",
        "fpn_bottleneck": "uper",
        "psp_modules": "psp",
    }
    neck = next(n for mark, n in marks.items() if any(head + mark in name for name in shapes))
    norm = "frozen_batch" if "BN frozen" in manifest["kind"] else "batch"
    changes = {}
    if "backbone.conv1.weight" in shapes or "backbone.stem.0.weight" in shapes:
        changes = {"norm": norm, "frozen_stages": 0, "output_stride": 32 if neck == "uper" else 8}
    num_classes, channels = shapes[head + "conv_seg.weight"][:2]
    return {
        "num_proposals": 0,
        "num_things": 0,
        "num_stuff": num_classes,
        "channels": channels,
        "auxiliary_channels": shapes["auxiliary_head.conv_seg.weight"][1],
        "neck": {"name": neck, "norm": norm},
        "backbone": backbone(shapes) | changes,
    }


def images(fixture: Fixture) -> jax.Array:
    return jnp.asarray(fixture.arrays["image"].transpose(0, 2, 3, 1), fixture.dtype)


# Comparisons.


def relative(ours: Any, theirs: Any) -> float:
    """Largest difference over the largest value of theirs."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if ours.shape != theirs.shape:
        return np.inf
    scale = abs(theirs).max(initial=0)
    return float(abs(ours - theirs).max(initial=0) / (scale if scale else 1))


def forward(fixture: Fixture) -> Iterator[Row]:
    model, variables = network(fixture)
    output, state = jax.jit(partial(model.apply, capture_intermediates=is_neck_or_feats))(
        variables, images(fixture)
    )
    captured = state["intermediates"]
    pyramid = captured["neck"]["fpn"]["__call__"][0]
    feats = captured["initial"]["__call__"][0][0]
    last = output.stages[-1].kernels
    ours = {
        "x_feats_every8": feats[..., ::8].transpose(0, 3, 1, 2),
        "mask_init": output.stages[0].masks,
        "prop_init_every8": output.stages[0].kernels[..., ::8],
        f"s{len(output.stages) - 2}_obj": last,
    }
    for i, level in enumerate(pyramid):
        ours[f"fpn{i}_mean"] = level.mean((1, 2, 3))
        ours[f"fpn{i}_std"] = level.std((1, 2, 3))
        some = fixture.arrays[f"fpn{i}_ch0_7"].shape[1]
        ours[f"fpn{i}_ch0_7"] = level[..., :some].transpose(0, 3, 1, 2)
    for s, stage in enumerate(output.stages[1:]):
        ours[f"s{s}_cls"] = stage.logits
        ours[f"s{s}_mask"] = stage.masks
        ours[f"s{s}_obj_every8"] = stage.kernels[..., ::8]
    if "seg_preds" in fixture.arrays:
        ours["seg_preds"] = output.dense

    flips = num_flips(output, fixture)
    tolerance = 1e-5 if fixture.exact else 1e-4
    for name, theirs in fixture.arrays.items():
        if name in ours:
            yield compare(name, ours[name], theirs, tolerance, flips)
    yield from maps(fixture, output, fixture.manifest.get("panoptic_variants", {}), 1e-3)
    if "inst_scores_0" in fixture.arrays:
        yield from instances(fixture, output, tolerance)


def instances(fixture: Fixture, output: Output, tolerance: float) -> Iterator[Row]:
    """The hundred best instances: scores, whose they are, and some masks at original size."""
    size = np.array(fixture.manifest["img_shapes"], np.int32)
    original_size = np.array(fixture.manifest["ori_shapes"], np.int32)
    last, canvas = output.stages[-1], ResultCanvas.of(size, original_size)
    predict = partial(predict_instances, canvas=canvas, num_results=100)
    best = jax.jit(predict)([pass_of(last, size)], original_size)
    for i, (height, width) in enumerate(original_size):
        theirs = {k: fixture.arrays[f"inst_{k}_{i}"] for k in ("scores", "labels", "mask_idx")}
        yield Row(f"inst_scores_{i}", relative(best.scores[i], theirs["scores"]), tolerance)
        # Equal scores but for rounding may swap places.
        ours = set(zip(best.kernels[i].tolist(), best.labels[i].tolist()))
        pairs = list(zip(theirs["mask_idx"].tolist(), theirs["labels"].tolist()))
        yield Row(f"inst_pairs_{i}", 1 - len(ours & set(pairs)) / len(pairs), 0.02)
        packed = fixture.arrays[f"inst_masks_top10_{i}"]
        rows = {
            pair: r for r, pair in enumerate(zip(best.kernels[i].tolist(), best.labels[i].tolist()))
        }
        for r, mask in enumerate(packed):
            mask = np.unpackbits(mask)[: height * width].reshape(height, width)
            bits = np.unpackbits(np.asarray(best.bits[i, rows[pairs[r]]]), axis=1)
            wrong = bits[:width, :height].T != mask
            yield Row(f"inst_mask_{i}_{r}", float(wrong.mean()), 1e-3)


def pass_of(stage: Stage, size: np.ndarray) -> Pass:
    """A pass that saw whole pictures at stride 8, not mirrored."""
    canvas = np.tile(8 * np.int32(stage.masks.shape[2:]), (len(size), 1))
    return Pass(stage, size, canvas, np.zeros(len(size), bool))


def is_neck_or_feats(module: Any, method: str) -> bool:
    return method == "__call__" and module.name in ("fpn", "initial")


def num_flips(output: Output, fixture: Fixture) -> int:
    """Mask pixels that lie on the other side of the hard threshold of the gathering."""
    names = ["mask_init"] + [f"s{s}_mask" for s in range(len(output.stages) - 2)]
    return sum(
        int(((np.asarray(stage.masks) > 0) != (fixture.arrays[name] > 0)).sum())
        for name, stage in zip(names, output.stages)
    )


def compare(name: str, ours: Any, theirs: np.ndarray, tolerance: float, flips: int) -> Row:
    """One array. A pixel that flips at the hard threshold changes a few rows of what follows by a
    hundredth and nothing else: then the median over rows is compared."""
    error = relative(ours, theirs)
    if error <= tolerance or not flips or name.startswith(("fpn", "x_feats", "mask_init")):
        return Row(name, error, tolerance)
    ours = np.asarray(ours, np.float64)
    rows = abs(ours - theirs).reshape(*theirs.shape[:2], -1).max(-1)
    return Row(
        name, float(np.median(rows) / abs(theirs).max()), tolerance, f"median, {flips} flips"
    )


def maps(
    fixture: Fixture, output: Output, variants: Mapping[str, Any], tolerance: float
) -> Iterator[Row]:
    """Panoptic maps: the share of pixels that disagree in class or in the partition."""
    size = np.array(fixture.manifest["img_shapes"], np.int32)
    original_size = np.array(fixture.manifest["ori_shapes"], np.int32)
    last = output.stages[-1]
    for variant, thresholds in variants.items():
        fused = jax.jit(predict_panoptic, static_argnames=("num_things", "canvas"))(
            [pass_of(last, size)],
            original_size,
            num_things=80,
            canvas=ResultCanvas.of(size, original_size),
            instance_threshold=thresholds["instance_score_thr"],
            overlap_threshold=thresholds["overlap_thr"],
        )
        for i, (height, width) in enumerate(original_size):
            theirs = fixture.arrays[f"pan_{variant}_{i}"]
            ids = np.asarray(fused.ids[i])[:height, :width]
            yield Row(f"pan_{variant}_{i}", disagreement(ids, fused, i, theirs), tolerance)


def disagreement(ids: np.ndarray, fused: Fused, i: int, theirs: np.ndarray) -> float:
    """Share of pixels outside the best pairing of our segments with theirs, class by class.

    Numbers of segments are not compared: scores that are equal but for rounding may swap.
    """
    labels = np.concatenate([[133], np.asarray(fused.labels[i])])
    pairs, counts = np.unique(np.stack([ids.ravel(), theirs.ravel()]), axis=1, return_counts=True)
    taken: set[tuple[str, int]] = set()
    agree = 0
    for (our, their), pixels in sorted(zip(pairs.T.tolist(), counts), key=lambda x: -x[1]):
        if labels[our] == their % 1000 and not taken & {("our", our), ("their", their)}:
            taken |= {("our", our), ("their", their)}
            agree += int(pixels)
    return 1 - agree / ids.size


def postprocessing(fixture: Fixture) -> Iterator[Row]:
    masks = jnp.asarray(fixture.arrays["mask_logits"], fixture.dtype)
    logits = jnp.asarray(fixture.arrays["cls_logits"], fixture.dtype)
    output = Output((Stage(None, masks, logits),), None)
    yield from maps(fixture, output, fixture.manifest["variants"], 1e-4)


def segmentation_forward(fixture: Fixture) -> Iterator[Row]:
    model, variables = network(fixture)

    def is_inner(module: Any, method: str) -> bool:
        return method == "__call__" and module.name in ("backbone", "neck")

    output, state = jax.jit(partial(model.apply, capture_intermediates=is_inner))(
        variables, images(fixture)
    )
    captured = state["intermediates"]
    levels = captured["backbone"]["__call__"][0]
    ours = {
        "dec_feats_every32": captured["neck"]["__call__"][0][..., ::32].transpose(0, 3, 1, 2),
        f"kernels_s{len(output.stages) - 1}_every8": output.stages[-1].kernels[..., ::8],
        "aux_logits_every8": output.dense[:, ::8],
    }
    for i, level in enumerate(levels):
        ours[f"feat{i}_mean"] = level.mean((1, 2, 3))
        ours[f"feat{i}_std"] = level.std((1, 2, 3))
        ours[f"feat{i}_ch0_3"] = level[..., :4].transpose(0, 3, 1, 2)
    for s, stage in enumerate(output.stages):
        ours[f"logits_s{s}"] = stage.masks
        some = fixture.arrays.get(f"logits_s{s}_every4", stage.masks).shape[1]
        ours[f"logits_s{s}_every4"] = stage.masks[:, :: -(-stage.masks.shape[1] // some)]
    tolerance = 1e-5 if fixture.exact else 1e-4
    for name, theirs in fixture.arrays.items():
        if name in ours:
            yield Row(name, relative(ours[name], theirs), tolerance)
    size = np.array(
        [fixture.arrays["pred_labels"].shape[1:]] * len(fixture.arrays["image"]), np.int32
    )
    once = [Pass(output.stages[-1], size, size, np.zeros(len(size), bool))]
    maps = predict_labels(once, size, canvas=ResultCanvas.of(size, size))
    maps = maps[:, : size[0, 0], : size[0, 1]]
    wrong = np.asarray(maps) != fixture.arrays["pred_labels"] + 1
    yield Row("pred_labels", float(wrong.mean()), 1e-3)


def deformable_convolution(fixture: Fixture) -> Iterator[Row]:
    arguments = {"op0": (1, 1, 1), "op1": (2, 1, 1), "op2": (1, 2, 2)}
    for case in fixture.manifest["cases"]:
        x, offset, weight, out = (
            jnp.asarray(fixture.arrays[f"{case}_{name}"], fixture.dtype)
            for name in ("x", "offset", "weight", "out")
        )
        x, offset = x.transpose(0, 2, 3, 1), offset.transpose(0, 2, 3, 1)
        y = deform_conv(x, offset, weight.transpose(2, 3, 1, 0), *arguments[case])
        # The reference's numbers are stored in float32.
        tolerance = 1e-6 if fixture.exact else 1e-5
        yield Row(f"{case}_out", relative(y.transpose(0, 3, 1, 2), out), tolerance)


# Training.


def targets(fixture: Fixture, num_stuff: int) -> tuple[Segments, Segments]:
    """Segments at stride 4: the mean of the four pixels that bilinear reduction reads."""

    def reduce(masks: np.ndarray) -> np.ndarray:
        middle = [masks[..., 1 + a :: 4, 1 + e :: 4] for a in (0, 1) for e in (0, 1)]
        return np.mean(middle, axis=0)

    arrays = fixture.arrays
    b, _, height, width = arrays["image"].shape
    slots = max(len(arrays[f"gt_labels_{i}"]) for i in range(b))
    masks = np.zeros((b, slots, height // 4, width // 4))
    labels = np.full((b, slots), EMPTY, np.int32)
    stuff_masks = np.zeros((b, num_stuff, height // 4, width // 4))
    stuff_labels = np.full((b, num_stuff), EMPTY, np.int32)
    for i in range(b):
        here = arrays[f"gt_labels_{i}"]
        masks[i, : len(here)] = reduce(arrays[f"gt_masks_{i}"].astype(float))
        labels[i, : len(here)] = here
        for q in range(num_stuff):
            mask = arrays[f"gt_semantic_seg_{i}"] == 80 + q
            stuff_masks[i, q] = reduce(mask.astype(float))
            stuff_labels[i, q] = 80 + q if mask.any() else EMPTY
    return (
        Segments(jnp.asarray(masks, fixture.dtype), jnp.asarray(labels)),
        Segments(jnp.asarray(stuff_masks, fixture.dtype), jnp.asarray(stuff_labels)),
    )


def reference_terms(terms: Mapping[str, Any], semantic: bool = False) -> dict[str, float]:
    """Our loss terms under the reference's names."""
    renamed = {}
    for name, value in terms.items():
        stage, _, term = name.removeprefix("loss/").rpartition("/")
        number = int(stage.removeprefix("stage")) if stage.startswith("stage") else 0
        if semantic:
            theirs = f"decode.loss_ce.s{number}" if stage else "aux.loss_ce"
        else:
            theirs = (f"s{number - 1}_loss_" if number else "loss_rpn_") + TERMS[term]
        renamed[theirs] = float(value)
    return renamed


def loosened(tolerance: float, fixture: Fixture, key: str, name: str = "") -> float:
    """Twice what the reference's own precisions differ by, where that is more than the tolerance.

    A pixel then crossed the hard threshold of the gathering with the rounding of float32 alone.
    """
    if fixture.exact:
        return tolerance
    single, double = (fixture.manifest.get(f"{key}_{suffix}") for suffix in ("f32", "f64"))
    if name:
        single, double = ((values or {}).get(name) for values in (single, double))
    known = single is not None and double is not None
    return max(tolerance, 2 * relative(single, double)) if known else tolerance


def term_rows(
    ours: Mapping[str, float],
    theirs: Mapping[str, float],
    tolerance: Callable[[str], float],
    prefix: str = "",
) -> Iterator[Row]:
    for stored, value in theirs.items():
        # Without positives the reference files this term, which is then zero, under another name.
        name = "loss_rpn_rank" if stored == "loss_rank" else stored
        if "loss" in name:
            yield Row(prefix + name, relative(ours[name], value), tolerance(stored))


def loss_rows(
    fixture: Fixture, terms: Mapping[str, float], total: Any, tolerance: float
) -> Iterator[Row]:
    """Terms of the loss under the reference's names, and their sum."""
    allowed = partial(loosened, tolerance, fixture, "losses")
    yield from term_rows(terms, fixture.stored("losses"), allowed)
    allowed = loosened(tolerance, fixture, "total_loss")
    yield Row("total_loss", relative(total, fixture.stored("total_loss")), allowed)


ONCE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
OFTEN = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
"""How programs are compiled that run once, for which compiling takes longest, and those that run
often."""


def gathered_pixels(output: Output) -> list[jax.Array]:
    """Which pixels lie above the hard threshold, in the masks that are gathered with."""
    return [stage.masks > 0 for stage in output.stages[:-1]]


def observed_loss(output: Output, targets: KernelTargets, counts: Any, weights: Any) -> Judgement:
    """The loss of things and stuff, and beside its measures what it has been decided by."""
    judgement = kernel_loss(output, targets, counts, weights)
    slots = match_stages(output, targets, weights)
    decided = {"slots": slots, "pixels": gathered_pixels(output)}
    return judgement._replace(measures=judgement.measures | decided)


def loss_and_grads(fixture: Fixture, compiler_options: Mapping[str, Any] = ONCE):
    """(params, batch_stats) -> ((loss, (judgement, batch_stats)), grads) of a fixture's batch,
    compiled; and the network's variables."""
    model, variables = network(fixture)
    if model.sizes.num_proposals:
        task = TASKS["panoptic"]._replace(loss=observed_loss)
        wanted = KernelTargets(*targets(fixture, model.sizes.num_stuff))
        weights = WEIGHTS if model.sizes.num_stuff else WEIGHTS._replace(rank=0)
    else:
        task, weights = TASKS["semantic"], WEIGHTS._replace(dense=0.4)
        labels = fixture.arrays["labels"].astype(np.int32)
        wanted = jnp.asarray(np.where(labels == 255, EMPTY, labels))
    counts = task.count(wanted)
    image = images(fixture)

    def loss(params, batch_stats):
        total, (judgement, stats) = compute_loss(
            params,
            batch_stats,
            image,
            wanted,
            counts,
            jax.random.key(0),
            model=model,
            task=task,
            weights=weights,
        )
        return total, (judgement, stats)

    # The statistics of a batch are those of an axis over devices.
    devices, everywhere = (
        jax.sharding.Mesh(jax.devices()[:1], (AXIS,)),
        jax.sharding.PartitionSpec(),
    )
    run = jax.shard_map(
        jax.value_and_grad(loss, has_aux=True),
        mesh=devices,
        in_specs=everywhere,
        out_specs=everywhere,
        check_vma=False,
    )
    return jax.jit(run, compiler_options=compiler_options), variables


def training(fixture: Fixture) -> Iterator[Row]:
    run, variables = loss_and_grads(fixture)
    (total, (judgement, _)), grads = run(variables["params"], variables["batch_stats"])
    slots, pixels = (judgement.measures[name] for name in ("slots", "pixels"))
    tolerance = 1e-6 if fixture.exact else 1e-4
    rows = [
        *loss_rows(fixture, reference_terms(judgement.terms), total, tolerance),
        *gradients(fixture, grads, *((1e-5, 1e-5) if fixture.exact else (1e-2, 1e-3))),
    ]
    if not fixture.exact and not all(row.passed for row in rows):
        rows = list(forgive_flips(rows, pixels, fixture))
    yield from rows
    for name, theirs in fixture.arrays.items():
        if name.startswith("assign_"):
            _, stage, i = name.split("_")
            number = 0 if stage == "rpn" else int(stage[1:])
            wrong = np.asarray(slots[number, int(i)]) + 1 != theirs
            yield Row(name, float(wrong.mean()), 0.0)


FEW_FLIPS = 10
"""Pixels of all masks together; more have another reason than rounding."""


def forgive_flips(rows: list[Row], pixels: Any, fixture: Fixture) -> Iterator[Row]:
    """Wider tolerances, where float32 took a pixel across the hard threshold of the gathering.

    Which one depends on the processor. The proof is the same network in double precision: without
    a pixel on the other side there, the tolerances stay what they were.
    """
    with jax.enable_x64(True):
        double = fixture._replace(dtype="float64")
        model, variables = network(double)
        output = jax.jit(model.apply, compiler_options=ONCE)(variables, images(double))
        exact = gathered_pixels(output)
    flips = sum(int((ours != theirs).sum()) for ours, theirs in zip(pixels, exact, strict=True))
    for row in rows:
        if row.passed or not 0 < flips <= FEW_FLIPS:
            yield row
        else:
            yield row._replace(tolerance=20 * row.tolerance, note=f"{row.note} {flips} flips")


def segmentation_training(fixture: Fixture) -> Iterator[Row]:
    """With the statistics of the batch, float32 itself is far from exact: see the tolerances."""
    run, variables = loss_and_grads(fixture)
    (total, (judgement, stats)), grads = run(variables["params"], variables["batch_stats"])
    frozen = "BN frozen" in fixture.manifest["kind"]
    tolerance = 1e-6 if fixture.exact else (1e-4 if frozen else 1e-3)
    terms = reference_terms(judgement.terms, semantic=True)
    yield from loss_rows(fixture, terms, total, tolerance)
    if fixture.exact:
        allowed = (1e-5, 1e-5) if frozen else (1e-4, 1e-4)
    else:
        allowed = (1e-2, 1e-3) if frozen else (0.2, 5e-2)
    yield from gradients(fixture, grads, *allowed)
    after = to_reference({"params": variables["params"], "batch_stats": stats})
    for name, theirs in fixture.arrays.items():
        if name.startswith("bn_after/"):
            yield Row(name, relative(after[name.partition("/")[2]], theirs), 1e-3)


def gradients(
    fixture: Fixture, grads: Any, norm_tolerance: float, first_tolerance: float
) -> Iterator[Row]:
    """The norm of every gradient, and the first values of some."""
    manifest, exact = fixture.manifest, fixture.exact
    ours = to_reference({"params": grads})
    norms = manifest["grad_norms_all_f64" if exact else "grad_norms_all"]
    zero = manifest.get("zero_gradient_params", [])
    largest = max(norms.values())
    for name in manifest["no_grad_params"]:
        yield Row(f"grad_norm/{name}", float(abs(ours[name]).max()), 0.0, "frozen")
    for name, norm in norms.items():
        norm_of_ours = np.linalg.norm(ours[name])
        if name in zero:  # but for rounding
            yield Row(f"grad_norm/{name}", float(norm_of_ours / largest), 1e-4, "zero")
        else:
            yield Row(f"grad_norm/{name}", relative(norm_of_ours, norm), norm_tolerance)
    for name, theirs in fixture.arrays.items():
        kind, _, parameter = name.partition("/")
        if kind == ("grad16_f64" if exact else "grad16") and parameter not in zero:
            first = ours[parameter].ravel()[: theirs.size]
            if exact:
                yield Row(name, relative(first, theirs), first_tolerance)
            else:
                # Of 16 values out of thousands, on which one flipped ReLU weighs more.
                yield Row(name, 1 - cosine(first, theirs), first_tolerance, "1 - cosine")


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    norms = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / norms) if norms else float(np.array_equal(a, b))


# Relative tolerances of the loss at each step; the last one holds for the rest. Adam's first step
# is close to the sign of the gradient, so that the rounding of gradients near zero, and ReLUs that
# flip with it, move parameters by whole steps, and a pixel may cross the hard threshold of the
# gathering: float32 runs part ways, the reference's own as well. Single terms are compared at the
# first step only.
TRAJECTORY = {
    "f32": (1e-5, 5e-3, 2e-2, 5e-2, 0.1),
    "f32_lr1e-5": (1e-5, 5e-3, 1e-2, 2e-2, 5e-2),
    "f64": (1e-6, 1e-6, 1e-5, 1e-5, 1e-4),
}


def trajectory(fixture: Fixture) -> Iterator[Row]:
    batch = batch_of(fixture)
    run, variables = loss_and_grads(batch, OFTEN)
    suffix = "f64" if fixture.exact else "f32"
    for key in fixture.manifest:
        if not key.endswith(f"_{suffix}"):
            continue
        kind = key.removesuffix(f"_{suffix}")
        params, stats = variables["params"], variables["batch_stats"]
        optim = ConfigDict(
            {
                "lr": 1e-5 if "lr1e-5" in kind else 1e-4,
                "scale_lr": False,
                "reference_batch": 16,
                "weight_decay": 0.05,
                "clip_norm": 1.0,
                "warmup_steps": 4 if kind.startswith("warmup4") else 0,
                "warmup_factor": 0.001,
                "decay_at": (),
                "decay_factor": 10.0,
                "unit": "step",
                "groups": GROUPS,
            }
        )
        optimizer, _ = make_optimizer(optim, params, steps_per_epoch=1, batch_size=16)
        mask = trainable(GROUPS, params)
        state = optimizer.init(params)

        @jax.jit
        def update(grads, state, params, optimizer=optimizer):
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        theirs = fixture.manifest[key]
        steps = TRAJECTORY[suffix if "lr1e-5" not in kind or fixture.exact else "f32_lr1e-5"]
        for step, loss in enumerate(theirs["total_loss"]):
            tolerance = steps[min(step, len(steps) - 1)]
            (total, (judgement, _)), grads = run(params, stats)
            norm = gradient_norm(grads, mask)
            params, state = update(grads, state, params)
            yield Row(f"{kind}/step{step}/total_loss", relative(total, loss), tolerance)
            if step == 0 or fixture.exact:
                reference = theirs["terms"][step]
                prefix = f"{kind}/step{step}/"
                allowed = 10 * tolerance
                yield from term_rows(
                    reference_terms(judgement.terms), reference, lambda _, x=allowed: x, prefix
                )
                reference = theirs["grad_norm_before_clip"][step]
                yield Row(f"{prefix}grad_norm", relative(norm, reference), 10 * tolerance)
        ours = to_reference({"params": params})
        for name, reference in theirs["final_params"].items():
            norm = np.linalg.norm(ours[name].astype(np.float64))
            tolerance = 1e-5 if fixture.exact else 1e-3
            yield Row(f"{kind}/norm/{name}", relative(norm, reference["norm"]), tolerance)


def batch_of(fixture: Fixture) -> Fixture:
    """The training fixture beside a trajectory whose batch it runs on."""
    wanted = [fixture.manifest[key] for key in ("model", "seed")]
    for path in sorted(fixture.path.parent.glob("*.json")):
        manifest = json.loads(path.read_text())
        same = [manifest.get("model"), manifest.get("seed")] == wanted
        if same and manifest["kind"] == "det train" and not manifest.get("image_seed_tag"):
            return load(path, fixture.dtype)
    raise SystemExit(f"{fixture.path}: there is no training fixture with its batch beside it")


# Metrics.


def panoptic_quality(folder: Path) -> Iterator[Row]:
    expected = json.loads((folder / "expected.json").read_text())
    counts, categories = score_files(folder / "gt.json", folder / "pred.json")
    summary = summarize(counts, categories)
    for group, suffix in {"All": "", "Things": "_things", "Stuff": "_stuff"}.items():
        for key in ("pq", "sq", "rq"):
            ours = summary[key.upper() + suffix] / 100
            yield Row(f"{group}/{key}", relative(ours, expected[group][key]), 1e-9)
    for i, dataset_id in enumerate(categories.dataset_ids):
        theirs = expected["per_class"][str(dataset_id)]
        for key in ("iou_sum", "tp", "fp", "fn"):
            yield Row(f"{dataset_id}/{key}", relative(getattr(counts, key)[i], theirs[key]), 1e-9)


def average_precision(folder: Path) -> Iterator[Row]:
    expected = json.loads((folder / "expected.json").read_text())
    counts, categories = score_instance_files(folder / "gt.json", folder / "dets.json")
    ours = instance.summarize(counts, categories)
    for name, theirs in zip(expected["names"].split(", "), expected["stats"], strict=True):
        yield Row(name, relative(ours[name] / 100, theirs), 1e-9)
    for row in instance.per_class(counts, categories):
        ap = -1 if row["AP"] is None else row["AP"] / 100
        yield Row(f"{row['id']}/AP", relative(ap, expected["per_class_AP"][str(row["id"])]), 1e-9)


def mean_iou(folder: Path) -> Iterator[Row]:
    manifest = json.loads((folder / "expected.json").read_text())
    maps, k = np.load(folder / "maps.npz"), manifest["num_classes"]
    ids = tuple(manifest["class_order"])
    categories = Categories(tuple(map(str, ids)), ids, 0)
    counts = semantic.no_counts(k)
    for i in range(len(maps.files) // 2):
        truth, prediction = (maps[f"{name}_{i}"].astype(np.int32) for name in ("gt", "pred"))
        # One more than the class, which is how ADE20K's files are written.
        truth = np.where(truth == manifest["ignore_index"], 0, truth + 1)
        counts = semantic.merge(counts, semantic.count(truth, prediction + 1, k))
    summary = semantic.summarize(counts, categories)
    for variant, expected in manifest["expected"].items():
        for name, ours in summary.items():
            yield Row(f"{variant}/{name}", relative(ours / 100, expected[name]), 1e-9)
        for i, row in enumerate(semantic.per_class(counts, categories)):
            for name in ("IoU", "Acc"):
                # -1 stands for what is not defined.
                values = [-1 if v is None else v for v in (row[name], expected[name][i])]
                ours = values[0] if row[name] is None else values[0] / 100
                yield Row(f"{variant}/{row['id']}/{name}", relative(ours, values[1]), 1e-9)


FOLDERS = {
    "pred.json": panoptic_quality,
    "dets.json": average_precision,
    "maps.npz": mean_iou,
}
"""The measure of a folder, by a file that it holds."""


# The report.


WEIGHTS = LossWeights(mask=1.0, dice=4.0, label=2.0, rank=0.1, dense=1.0)

RECIPES = {
    "knet_s3_r50_fpn_1x_coco": "coco_instance.py",
    "knet_s3_r50_fpn_1x_coco_N256": "coco_instance.py:n256",
    "knet_s3_r50_fpn_ms-3x_coco": "coco_instance.py:ms3x",
    "knet_s3_r101_fpn_ms-3x_coco": "coco_instance.py:r101,ms3x",
    "knet_s3_r101_dcn-c3-c5_fpn_ms-3x_coco": "coco_instance.py:r101_dcn,ms3x",
    "knet_s3_r50_fpn_1x_coco-panoptic": "coco_panoptic.py",
    "knet_s3_r50_fpn_ms-3x_coco-panoptic": "coco_panoptic.py:ms3x",
    "knet_s3_r101_fpn_ms-3x_coco-panoptic": "coco_panoptic.py:r101,ms3x",
    "knet_s3_r101_dcn-c3-c5_fpn_ms-3x_coco-panoptic": "coco_panoptic.py:r101_dcn,ms3x",
    "knet_s3_swin-l_fpn_ms-3x_16x2_coco-panoptic": "coco_panoptic.py:swin_l,ms3x",
    "knet_s3_swin-l_fpn_ms-3x_16x2_coco-panoptic_swinT-variant": "coco_panoptic.py:swin_t,ms3x",
    "knet_s3_fcn_r50-d8_80k_adamw_ade20k": "ade20k_semantic.py",
    "knet_s3_pspnet_r50-d8_80k_adamw_ade20k": "ade20k_semantic.py:psp",
    "knet_s3_deeplabv3_r50-d8_80k_adamw_ade20k": "ade20k_semantic.py:deeplabv3",
    "knet_s3_upernet_r50-d8_80k_adamw_ade20k": "ade20k_semantic.py:uper",
    "knet_s3_upernet_swin-t_80k_adamw_ade20k": "ade20k_semantic.py:swin_t",
    "knet_s3_upernet_swin-l_80k_adamw_ade20k": "ade20k_semantic.py:swin_l",
    "knet_s3_upernet_swin-l_80k_adamw_640x640_ade20k": "ade20k_semantic.py:swin_l_640",
    "knet-s3_r50-d8_upernet, 512 channels (mmsegmentation 1.2.2)": "ade20k_semantic.py:uper,wide",
    "knet-s3_swin-t_upernet, 512 channels (mmsegmentation 1.2.2)": "ade20k_semantic.py:swin_t,wide",
}
"""The reference's name of a network, and our config of it."""


def model_sizes(fixture: Fixture) -> Iterator[Row]:
    """Numbers of parameters at full size: all, those that are trained, and without the auxiliary
    head. Each row has the difference in parameters."""
    configs = Path(__file__).parents[1] / "configs"
    for name, theirs in fixture.manifest["models"].items():
        if name not in RECIPES:
            yield Row(name, np.inf, 0.0, "no config of ours")
            continue
        config = load_config(f"{configs / RECIPES[name]}")
        model = make_model(**config.model)
        params = variable_shapes(model)["params"]
        sizes = [leaf.size for leaf in jax.tree.leaves(params)]
        kept = jax.tree.leaves(trainable(config.optim.groups, params))
        auxiliary = sum(leaf.size for leaf in jax.tree.leaves(params.get("auxiliary", {})))
        wanted = {"trainable": theirs["params"]} | theirs
        ours = {
            "params": sum(sizes),
            "trainable": sum(size for size, keep in zip(sizes, kept) if keep),
            "params_without_aux": sum(sizes) - auxiliary,
        }
        for key, count in ours.items():
            if key in wanted:
                yield Row(f"{name}/{key}", float(abs(count - wanted[key])), 0.0, RECIPES[name])


def resize_sizes(fixture: Fixture) -> Iterator[Row]:
    """Sizes of resized pictures, of the recipes of COCO and of ADE20K."""
    for name, cases in fixture.manifest.items():
        if isinstance(cases, list):
            wrong = 0
            for case in cases:
                long_side, short_side = case.get("scale", (1333, 800))
                size = resized_size((case["h"], case["w"]), short_side, long_side)
                wrong += size != (case["out_h"], case["out_w"])
            yield Row(name, wrong / len(cases), 0.0)


# By the beginning of their kind, or of their name where they do not say one.
KINDS = {
    "det forward": forward,
    "panoptic post-processing only": postprocessing,
    "det train": training,
    "training trajectory": trajectory,
    "seg forward": segmentation_forward,
    "seg train": segmentation_training,
    "deformable convolution v1 operator": deformable_convolution,
    "resize target sizes": resize_sizes,
    "model_sizes": model_sizes,
}
TIMES = "perf_reference"
"""How the files begin that say how fast the reference is."""


def find(path: Path) -> list[Path]:
    """Manifests, and folders of metrics, below a path given by the user."""
    if not path.exists():
        raise SystemExit(f"{path} does not exist")
    if path.is_file():
        if not path.with_suffix(".json").is_file():
            raise SystemExit(f"{path} is no fixture: there is no {path.with_suffix('.json').name}")
        return [path.with_suffix(".json")]
    if (path / "expected.json").exists():
        return [path]
    found = sorted(path.glob("*.json"))
    found += [folder for folder in sorted(path.iterdir()) if (folder / "expected.json").exists()]
    if not found:
        raise SystemExit(f"{path} holds no fixture")
    return found


def rows_of(path: Path, dtype: str) -> Iterator[Row] | None:
    """The rows of one fixture; None if its kind is unknown."""
    if path.is_dir():
        found = [rows(path) for file, rows in FOLDERS.items() if (path / file).exists()]
        return found[0] if found else None
    fixture = load(path, dtype)
    kind = fixture.manifest.get("kind", path.stem)
    function = next((f for start, f in KINDS.items() if kind.startswith(start)), None)
    return function and function(fixture)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="+", type=Path, help="fixture files, or folders of them")
    parser.add_argument("--x64", action="store_true", help="compute in double precision")
    parser.add_argument("--quiet", action="store_true", help="print failures and totals only")
    arguments = parser.parse_args()
    jax.config.update("jax_enable_x64", arguments.x64)
    if arguments.x64:
        # Results in single precision are compared as users compute them. Here no way of compiling
        # makes a difference that a tolerance would see, and most of the time goes into it.
        os.environ.setdefault("XLA_FLAGS", COMPILE_FAST)
    dtype = "float64" if arguments.x64 else "float32"

    passed = failed = skipped = others = 0
    for path in itertools.chain.from_iterable(map(find, arguments.paths)):
        if path.stem.startswith(TIMES):
            others += 1
            print(f"{path.stem}: times of one machine, nothing to compare")
            continue
        rows = rows_of(path, dtype)
        if rows is None:
            skipped += 1
            print(f"{path.stem}: skipped, its kind is unknown here")
            continue
        print(f"{path.stem} in {dtype}")
        for row in rows:
            passed, failed = passed + row.passed, failed + (not row.passed)
            if not (arguments.quiet and row.passed):
                verdict = "pass" if row.passed else "FAIL"
                line = f"  {row.name:64} {row.error:9.2e} / {row.tolerance:7.0e}  {verdict}"
                print(f"{line}  {row.note}".rstrip(), flush=True)
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return 1 if failed or not passed + skipped + others else 0


if __name__ == "__main__":
    sys.exit(main())
