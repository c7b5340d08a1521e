"""Times the parts of K-Net on this machine: network, results, train step and loader.

python benchmarks/run.py --output benchmarks/results/cpu.json
python benchmarks/run.py --parts network --precision float32,tensorfloat32,bfloat16 --batch 1,8
python benchmarks/run.py --config configs/ade20k_semantic.py:uper configs/coco_instance.py:r101 \
    --parts network --size 512x512
python benchmarks/run.py --parts loader --data-root /data/coco --workers 2,4

Times are wall-clock milliseconds from the call until the result is there. Every case runs in a
process of its own, so that its peak memory is its own, and running out of it ends no other case.
The weights are random, which matters to panoptic maps alone: benchmarks/README.md says how.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from parts import Case, Size, run_case
from scenes import SCENES

from knet_jax.config.files import load_config
from knet_jax.system.errors import UserError

PARTS = ("network", "fuse", "segmenter", "train", "loader")
PRECISIONS = ("float32", "tensorfloat32", "bfloat16")

COLUMNS = {
    "median_ms": ("median ms", "{:.1f}"),
    "min_ms": ("min ms", "{:.1f}"),
    "images_per_second": ("img/s", "{:.1f}"),
    "compile_s": ("compile s", "{:.0f}"),
    "host_peak_mib": ("host MiB", "{:.0f}"),
    "device_peak_mib": ("device MiB", "{:.0f}"),
    "tflops": ("TFLOP/s", "{:.3g}"),
    "peak_tflops": ("peak TFLOP/s", "{:.3g}"),
    "utilization": ("of peak", "{:.0%}"),
    "reference_ms": ("reference ms", "{:.1f}"),
    "ratio": ("ratio", "{:.2f}"),
    "network_ms": ("network ms", "{:.1f}"),
    "overhead": ("overhead", "{:.1%}"),
}
"""Keys of a record that are printed: title and format."""


def main() -> int:
    args = parse_arguments()
    planned = [
        (spec, case) for spec, config in args.configs.items() for case in cases(config, args)
    ]
    reference = json.loads(args.reference.read_text()) if args.reference else None
    report = measure_cases(
        planned, args.configs, args.repeat, args.output, reference, args.peak_tflops
    )
    if reference:
        print(f"reference: {report['reference_machine']}; ratio = ours / reference")
    print_report(report, args.output)
    return int(any("error" in record for record in report["results"]))


def print_report(report: dict[str, Any], output: Path | None) -> None:
    """Prints the machine, the table, and where the report lies."""
    print(", ".join(f"{key} {value}" for key, value in (report["machine"] or {}).items()))
    print(table(report["results"]))
    if output:
        print(f"wrote {output}")


def measure_cases(
    planned: Sequence[tuple[str, Case]],
    configs: Mapping[str, ConfigDict],
    repeat: int,
    output: Path | None,
    reference: Mapping[str, Any] | None = None,
    peak_tflops: float | None = None,
    deadline: float = math.inf,
) -> dict[str, Any]:
    """Measures cases one after the other.

    Args:
        planned: names of configs, and what is measured of them.
        configs: by name; data is prepared in a folder that is gone afterwards.
        repeat: how often each case is timed.
        output: where the report is written after every case, None for nowhere.
        reference: times of the PyTorch reference.
        peak_tflops: of the device, None where it is to be measured.
        deadline: on the monotonic clock; cases that cannot begin before are named only.

    Returns:
        The report.
    """
    report = {"machine": None, "results": []}
    if reference:
        report["reference_machine"] = reference["machine"]
    with tempfile.TemporaryDirectory() as prepared:
        for config in configs.values():
            config.data.data_dir = prepared
        for number, (spec, case) in enumerate(planned, 1):
            print(f"[{number}/{len(planned)}] {spec} {case}", file=sys.stderr, flush=True)
            if time.monotonic() < deadline:
                record = measure_apart(case, configs[spec], repeat)
            else:
                record = {"error": "no time was left"}
            report["machine"] = record.pop("machine", report["machine"])
            record = {"config": spec, "case": str(case), "part": case.part} | record
            if record.get("flop"):
                record["tflops"] = record["flop"] / record["median_ms"] / 1e9
                record["peak_tflops"] = peak_tflops or record["peak_tflops"]
                record["utilization"] = record["tflops"] / record["peak_tflops"]
            if reference and "median_ms" in record and report["machine"]["platform"] == "cpu":
                theirs = reference["results"].get(reference_name(case, configs[spec]))
                if theirs:
                    record["reference_ms"] = theirs["median_ms"]
                    record["ratio"] = record["median_ms"] / theirs["median_ms"]
            report["results"].append(record)
            if output:
                output.write_text(json.dumps(report, indent=2) + "\n")
    return report


def cases(config: ConfigDict, args: argparse.Namespace) -> Iterator[Case]:
    """Everything that the command line asks for of a config."""
    if "network" in args.parts:
        for size, precision, batch in itertools.product(args.size, args.precision, args.batch):
            yield Case("network", precision, batch, size)
    if "fuse" in args.parts:
        kinds = ("fuse", "fuse_torch") if args.torch else ("fuse",)
        for sizes, batch, scene, kind in itertools.product(
            args.fuse_size, args.batch, SCENES, kinds
        ):
            yield Case(kind, "float32", batch, *sizes, scene)
    if "segmenter" in args.parts:
        for size, precision, batch, scene in itertools.product(
            args.picture_size, args.precision, args.batch, SCENES
        ):
            yield Case("segmenter", precision, batch, original=size, scene=scene)
    if "train" in args.parts:
        for size, precision, batch in itertools.product(
            args.train_size, args.precision, args.train_batch
        ):
            yield Case("train", precision, batch, size)
    if "loader" in args.parts:
        for workers in args.workers:
            yield Case("loader", batch=config.train.batch_size, workers=workers)


def measure_apart(case: Case, config: ConfigDict, repeat: int) -> dict[str, Any]:
    """The record of a case, or {"error": ...} where it fails, be it by the end of its process."""
    flags = os.environ.get("XLA_FLAGS", "")
    if case.devices > 1:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={case.devices}"
    # Not a fork: it would share threads and devices with this process.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        try:
            return process.submit(run_case, case, config, repeat).result()
        # What ends this case only: memory, a missing dataset or library, a process that is gone.
        except (ImportError, MemoryError, RuntimeError, ValueError) as error:
            first_line = (str(error).splitlines() or [""])[0]
            return {"error": f"{type(error).__name__}: {first_line[:200]}"}
        finally:
            os.environ["XLA_FLAGS"] = flags


def reference_name(case: Case, config: ConfigDict) -> str | None:
    """The reference's name of a case, None if it has none: it timed the panoptic ResNet-50 in
    float32."""
    backbone = config.model.backbone
    size = (*backbone.depths, backbone.get("width"))
    if (config.task, case.precision, size) != ("panoptic", "float32", (3, 4, 6, 3, 64)):
        return None
    fusion = f"post_{case.size}_to_{case.original}"
    names = {
        ("network", 1): f"net_{case.size}",
        ("fuse", 1): fusion,
        ("fuse_torch", 1): fusion,
        ("train", 2): f"train_step_b2_{case.size}",
    }
    return f"det_panoptic_r50_{names.get((case.part, case.batch))}"


def table(records: list[dict[str, Any]]) -> str:
    """Records as text, a line each, with the columns that any of them has."""
    columns = {key: c for key, c in COLUMNS.items() if any(key in record for record in records)}
    width = max(len(record["case"]) for record in records)
    lines = ["  ".join([" " * width, *(title for title, _ in columns.values())])]
    config = None
    for record in records:
        if record["config"] != config:
            config = record["config"]
            lines.append(config)
        cells = [
            (form.format(record[key]) if key in record else "").rjust(len(title))
            for key, (title, form) in columns.items()
        ]
        cells = [record["error"]] if "error" in record else cells
        lines.append("  ".join([record["case"].ljust(width), *cells]))
    return "\n".join(lines)


# The command line.


def parse_arguments() -> argparse.Namespace:
    """Checked arguments; `values` is the config."""
    default = "(default: %(default)s)"
    sizes = "800x1216,512x512,128x160"
    fusions = "800x1216:427x640,512x512:512x512,128x160:96x120"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--parts",
        type=each(one_of(*PARTS)),
        default="network,fuse,train",
        help=f"A,B,... of {', '.join(PARTS)} {default}",
    )
    add(
        "--config",
        nargs="+",
        default=["configs/coco_panoptic.py"],
        help="FILE.py or FILE.py:variant, one or several (default: configs/coco_panoptic.py)",
    )
    add(
        "--size",
        type=each(input_size),
        default=sizes,
        help=f"HEIGHTxWIDTH,... of the network's input {default}",
    )
    add(
        "--batch",
        type=each(count),
        default="1",
        help=f"pictures at a time, of network, fusion and segmenter {default}",
    )
    add(
        "--fuse-size",
        type=each(size_pair),
        default=fusions,
        help=f"INPUT:ORIGINAL,... of the fusion {default}",
    )
    add(
        "--picture-size",
        type=each(size),
        default="800x1333,480x640",
        help=f"of the pictures of the segmenter {default}",
    )
    add("--train-size", type=each(input_size), default="512x512", help=f"of a train step {default}")
    add("--train-batch", type=each(count), default="2", help=f"of a train step {default}")
    add(
        "--precision",
        type=each(one_of(*PRECISIONS)),
        default="float32",
        help=f"of {', '.join(PRECISIONS)} {default}; bfloat16 is that of the feature maps, "
        "tensorfloat32 needs a GPU that has it; the fusion is always float32",
    )
    add("--data-root", help="dataset for the loader, in COCO's layout")
    add("--workers", type=each(count), default="2", help=f"of the loader {default}")
    add("--repeat", type=count, default=7, help=f"how often each case is timed {default}")
    add(
        "--peak-tflops",
        type=float,
        help="of the device, for the utilization; default: measured by a large matrix "
        "product, in turn with each case",
    )
    add(
        "--torch",
        action="store_true",
        help="also time a plain fusion in torch, where that is installed",
    )
    add("--reference", type=Path, help="JSON with the times of the PyTorch reference, to compare")
    add("--output", type=Path, help="JSON for the results, such as benchmarks/results/cpu.json")
    args = parser.parse_args()

    try:
        args.configs = {spec: load_config(spec) for spec in args.config}
    except UserError as error:
        parser.error(str(error))
    if "loader" in args.parts and not args.data_root:
        parser.error("the loader needs --data-root")
    if args.torch and importlib.util.find_spec("torch") is None:
        parser.error("--torch: torch is not installed")
    if args.reference and not args.reference.is_file():
        parser.error(f"--reference: there is no file {args.reference}")
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
    for spec, config in args.configs.items():
        config.data.root = args.data_root or ""
        if args.torch and config.task != "panoptic":
            parser.error(f"--torch times panoptic maps; the task of {spec} is {config.task}")
        for batch in args.train_batch if "train" in args.parts else ():
            if batch % min(batch, config.train.microbatch):
                parser.error(
                    f"--train-batch={batch} is no multiple of config.train.microbatch of {spec}, "
                    f"{config.train.microbatch}"
                )
    return args


def each(parse: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """A parser of values between commas."""
    return lambda text: [parse(item) for item in text.split(",")]


def one_of(*accepted: str) -> Callable[[str], str]:
    """A parser of one of several words."""

    def parse(text: str) -> str:
        if text not in accepted:
            raise argparse.ArgumentTypeError(f"{text!r}; accepted: {', '.join(accepted)}")
        return text

    return parse


def count(text: str) -> int:
    """A number of at least 1."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r}; accepted: a whole number of at least 1")
    return int(text)


def size(text: str) -> Size:
    """HEIGHTxWIDTH."""
    parts = text.split("x")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r}; accepted: HEIGHTxWIDTH, such as 800x1216")
    return Size(*map(int, parts))


def input_size(text: str) -> Size:
    """HEIGHTxWIDTH that the network takes."""
    parsed = size(text)
    if any(side % 32 for side in parsed):
        raise argparse.ArgumentTypeError(f"{text!r}; accepted: multiples of 32")
    return parsed


def size_pair(text: str) -> tuple[Size, Size]:
    """INPUT:ORIGINAL."""
    network, _, original = text.partition(":")
    return input_size(network), size(original)


if __name__ == "__main__":
    sys.exit(main())
