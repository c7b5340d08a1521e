"""Times our network in turn with a plain PyTorch network of the same layers, on the CPU.

python benchmarks/against_torch.py --work network --size 512x512
python benchmarks/against_torch.py --work network --size 800x1216
python benchmarks/against_torch.py --work train --size 512x512 --batch 2
python benchmarks/against_torch.py --work train --model semantic_uper --size 512x512 --batch 2
python benchmarks/against_torch.py --work onnx model.onnx --size 800x1333

Each of the two runs in a process of its own, as many threads as there are cores, and is warmed up
alone; then each does its work once in turn, round after round, so that a machine that others share is
slower for both. They have the same random weights and see the same pictures: what they compute for the
first time (the mean size of the mask logits, or the loss) is printed too. An exported panoptic model
makes a map of a picture end to end, in onnxruntime; PyTorch's network alone sees the next multiples of
32, with weights of its own. The twins are in torch_twins.py.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
THREADS = os.cpu_count()
WORKS = ("network", "train", "onnx")
CONFIGS = {"panoptic": "coco_panoptic.py", "semantic_uper": "ade20k_semantic.py:uper,wide"}
WARM_UPS = 2


def main() -> int:
    args = parse_arguments()
    if args.worker:
        WORKERS[args.worker](args)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        report = measure(args, folder)
    print_report(report)
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


# The one who asks.


class Contestant(NamedTuple):
    """A process that does its work once for every line that it gets."""

    name: str
    process: subprocess.Popen

    def hear(self) -> dict[str, Any]:
        """What it says next."""
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"the process of {self.name} ended with status {self.process.wait()}")
        return json.loads(line)

    def work(self) -> dict[str, float]:
        """How long it takes once, and what it finds."""
        self.process.stdin.write("once\n")
        self.process.stdin.flush()
        return self.hear()


def measure(args: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Times the two in turn; `folder` is for what ours hands to the other."""
    command = [__file__, *sys.argv[1:], "--folder", folder, "--worker"]
    pythons = {"ours": sys.executable, "PyTorch": args.torch_python}
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    contestants, records = [], {}
    try:
        for name, python in pythons.items():  # ours first, which writes what the other reads
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            process = subprocess.Popen([python, *command, name], env=environment, **pipes)
            contestants.append(Contestant(name, process))
            record = contestants[-1].hear()
            first, *_ = [contestants[-1].work() for _ in range(WARM_UPS)]
            records[name] = record | {"found": first["found"], "seconds": []}
        check(*records.values())
        for _ in range(args.rounds):
            for contestant in contestants:
                records[contestant.name]["seconds"].append(contestant.work()["seconds"])
    finally:
        for contestant in contestants:
            contestant.process.kill()
            contestant.process.wait()
    report = {"work": args.work, "model": args.model, "size": "x".join(map(str, args.size))}
    report |= {"batch": args.batch, "threads": THREADS, "results": records}
    ours, theirs = (record["seconds"] for record in records.values())
    report["ratio_least"] = min(ours) / min(theirs)
    report["ratio_median"] = statistics.median(ours) / statistics.median(theirs)
    return report


def check(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Ends where the two are not the same network; a file's size tells its parameters roughly."""
    apart = abs(ours["parameters"] / theirs["parameters"] - 1)
    if apart > ours["tolerance"]:
        counts = f"{ours['parameters']:,} and {theirs['parameters']:,} parameters"
        sys.exit(f"these are different networks: {counts}")


def print_report(report: dict[str, Any]) -> None:
    """Prints what the two are, and a table of times."""
    for name, record in report["results"].items():
        counted = f"{record['parameters']:,} parameters"
        found = f", finds {record['found']:.6g}" if record["found"] is not None else ""
        print(f"{name}: {record['made_of']}, {counted}{found}")
    what = " ".join(str(report[key]) for key in ("work", "model", "size"))
    print(f"{what}, batch {report['batch']}, {report['threads']} threads")
    print(f"{'seconds':<16}{'least':>10}{'median':>10}")
    for name, record in report["results"].items():
        seconds = record["seconds"]
        print(f"{name:<16}{min(seconds):>10.3f}{statistics.median(seconds):>10.3f}")
    print(f"{'ours / PyTorch':<16}{report['ratio_least']:>10.2f}{report['ratio_median']:>10.2f}")


# Those who work.


def serve(run: Callable[[], Any], found: Callable[[Any], float | None], **facts: Any) -> None:
    """Says who it is, then runs once for every line, and says how long that took."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever a library prints
    print(json.dumps(facts), file=answers, flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        result = run()
        seconds = time.perf_counter() - began
        answer = {"seconds": seconds, "found": found(result)}
        print(json.dumps(answer), file=answers, flush=True)


def mean_size(array: Any) -> float:
    """Of the numbers in an array of either library; of a loss, the loss itself."""
    return float(abs(array).mean())


def nothing(_: Any) -> None:
    """Where there is nothing to compare."""


def made_of(*packages: str) -> str:
    """Versions in words."""
    python = f"Python {sys.version.split()[0]}"
    return ", ".join([*(f"{name} {version(name)}" for name in packages), python])


def work_ours(args: argparse.Namespace) -> None:
    """Our network, as an evaluation runs it, or a train step; or a file of it."""
    if args.work == "onnx":
        return work_onnx(args)
    sys.path.insert(0, str(ROOT))
    import jax
    import scenes
    from flax.traverse_util import flatten_dict

    from knet_jax.config.files import SHIPPED, load_config
    from knet_jax.inference.forward import run_rounds
    from knet_jax.model import init_variables, make_model
    from knet_jax.system.backend import start_backend

    start_backend()  # as every command does
    jax.config.update("jax_default_matmul_precision", "float32")
    config = load_config(f"{SHIPPED}/{CONFIGS[args.model]}")
    model = make_model(**config.model)
    variables = jax.device_get(init_variables(model, config.seed))
    batch = scenes.batch(args.batch, args.size, config, seed=0)
    np.savez(args.folder / "batch.npz", image=batch.image, **batch.targets._asdict())
    weights = [flatten_dict(kind, sep="/") for kind in variables.values()]
    np.savez(args.folder / "weights.npz", **{k: v for kind in weights for k, v in kind.items()})

    num_parameters = sum(x.size for x in jax.tree.leaves(variables["params"]))
    if args.work == "train":
        run = train_step_of_ours(config, model, variables, batch)
    else:
        network = jax.jit(partial(run_rounds, model=model))
        inputs = jax.device_put((variables, batch))

        def run() -> Any:
            [last] = jax.block_until_ready(network(*inputs))
            return last.masks

    facts = {"parameters": num_parameters, "tolerance": 0, "made_of": made_of("jax")}
    serve(run, mean_size, **facts)


def train_step_of_ours(config: Any, model: Any, variables: Any, batch: Any) -> Callable[[], Any]:
    """A function that takes a training step and gives the loss before it."""
    import jax
    import jax.numpy as jnp

    from knet_jax.matching import LossWeights
    from knet_jax.tasks import TASKS
    from knet_jax.training import optim, train_step

    devices = jax.local_devices()[:1]
    params, batch_stats = variables["params"], variables.get("batch_stats", {})
    optimizer, _ = optim.make_optimizer(config.optim, params, 1000, len(batch.id))
    step = train_step.make_train_step(
        devices,
        model=model,
        task=TASKS[config.task],
        optimizer=optimizer,
        trainable=optim.trainable(config.optim.groups, params),
        weights=LossWeights(**config.loss),
        seed=config.seed,
    )
    num_parts = len(batch.id) // min(len(batch.id), config.train.microbatch)
    parts = train_step.to_devices(batch, devices, num_parts)
    start = (jnp.zeros((), jnp.int32), params, batch_stats, optimizer.init(params))
    state = train_step.replicate(train_step.TrainState(*start), devices)

    def run() -> Any:
        nonlocal state
        state, metrics = jax.block_until_ready(step(state, parts))
        return metrics["loss/total"]

    return run


def work_onnx(args: argparse.Namespace) -> None:
    """An exported file, from a picture to its map."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    session = onnxruntime.InferenceSession(args.file, options, ["CPUExecutionProvider"])
    metadata = json.loads(session.get_modelmeta().custom_metadata_map["knet_jax"])
    if metadata["task"] != "panoptic":
        sys.exit(f"{args.file} is of the task {metadata['task']}; accepted: panoptic")
    inputs = {"image": pictures(args.size), "size": np.int32([args.size])}
    serve(
        lambda: session.run(None, inputs),
        nothing,
        parameters=args.file.stat().st_size // 4,
        tolerance=0.05,
        made_of=made_of("onnxruntime"),
    )


def work_torch(args: argparse.Namespace) -> None:
    """The network, or the train step, of plain PyTorch."""
    import torch
    import torch_twins

    torch.set_num_threads(THREADS)
    weights, batch = None, {"image": pictures([-(-side // 32) * 32 for side in args.size])}
    if args.work != "onnx":
        weights, batch = (dict(np.load(args.folder / f"{n}.npz")) for n in ("weights", "batch"))
    network = torch_twins.make_network(args.model, weights)
    if args.work == "train":
        run = torch_twins.train(network, args.model, batch)
    else:
        run = torch_twins.forward(network, batch["image"])
    facts = {
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "made_of": made_of("torch"),
    }
    serve(run, nothing if args.work == "onnx" else mean_size, **facts)


def pictures(size: tuple[int, int]) -> np.ndarray:
    """One picture of noise."""
    return np.random.default_rng(0).integers(0, 256, (1, *size, 3)).astype(np.uint8)


WORKERS = {"ours": work_ours, "PyTorch": work_torch}


# The command line.


def parse_arguments() -> argparse.Namespace:
    """Checked arguments; `file` is that of the work `onnx`."""
    default = "(default: %(default)s)"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--work", nargs="+", required=True, help="network, train, or onnx FILE.onnx")
    add("--model", choices=CONFIGS, default="panoptic", help=f"which network {default}")
    add("--size", type=size, default="512x512", help=f"HEIGHTxWIDTH of the pictures {default}")
    add("--batch", type=int, default=1, help=f"pictures at a time {default}")
    add("--rounds", type=int, default=8, help=f"how often each is timed {default}")
    add("--torch-python", default=sys.executable, help="a Python that has torch (default: this)")
    add("--json", type=Path, help="a file for all times")
    add("--worker", choices=WORKERS, help=argparse.SUPPRESS)
    add("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.work, *files = args.work
    args.file = Path(files[0]) if files else None
    if args.work not in WORKS or len(files) != (args.work == "onnx"):
        parser.error("--work: accepted: network, train, onnx FILE.onnx")
    if min(args.rounds, args.batch) < 1:
        parser.error("--rounds and --batch are at least 1")
    if args.work == "onnx":
        if args.model != "panoptic" or args.batch > 1:
            parser.error("--work onnx is for a panoptic network, one picture at a time")
    elif any(side % 32 for side in args.size):
        parser.error(f"--size={args.size}; accepted: multiples of 32")
    if args.work == "train" and args.model == "semantic_uper" and args.batch == 1:
        parser.error("--batch=1; accepted: 2 and more, as BatchNorm needs several values a channel")
    return args


def size(text: str) -> tuple[int, int]:
    """HEIGHTxWIDTH."""
    parts = text.split("x")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r}; accepted: HEIGHTxWIDTH, such as 800x1216")
    return int(parts[0]), int(parts[1])


if __name__ == "__main__":
    sys.exit(main())
