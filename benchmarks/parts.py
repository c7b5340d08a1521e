"""The parts of K-Net that are timed, each a function (case, config, repeat) -> record."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import io
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import scenes
from jax.sharding import Mesh, PartitionSpec
from ml_collections import ConfigDict

from knet_jax.app.segmenter import Segmenter
from knet_jax.data import pipeline, recipes
from knet_jax.inference.forward import run_rounds
from knet_jax.inference.resampling import ResultCanvas
from knet_jax.knet import KNet
from knet_jax.matching import LossWeights
from knet_jax.model import init_variables, make_model
from knet_jax.nn import convolution
from knet_jax.nn.layers import AXIS
from knet_jax.saved.models import Model
from knet_jax.segmentation.segments import Categories
from knet_jax.structs import Output, Pass, Sizes, Stage
from knet_jax.tasks import TASKS
from knet_jax.training import optim, train_step

LOADER_WINDOW = 4
"""Batches of the loader that are timed together: workers deliver in bursts."""


class Size(NamedTuple):
    """Height and width."""

    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.height}x{self.width}"


class Case(NamedTuple):
    """What one process measures."""

    part: str
    """A key of `PARTS`."""
    precision: str = "float32"
    batch: int = 1
    size: Size | None = None
    """Of the network's input."""
    original: Size | None = None
    """What a fusion returns to; of a segmenter, the size of the pictures."""
    scene: str | None = None
    """Of a fusion or a segmenter, one of `scenes.SCENES`."""
    workers: int | None = None
    """Of the loader."""
    things: int = scenes.THINGS
    """In a picture of a train step, or of the scene `objects` of a fusion."""
    devices: int = 1
    """That share the batch of a train step; on a CPU they are simulated."""

    def __str__(self) -> str:
        words = [self.part, self.scene, self.size, self.original and f"-> {self.original}"]
        words += [self.precision if self.workers is None else f"{self.workers} workers"]
        words += [f"{self.things} things"] if self.things != scenes.THINGS else []
        words += [f"{self.devices} devices"] if self.devices > 1 else []
        return " ".join(str(word) for word in [*words, f"b{self.batch}"] if word)


# Measuring.


def measure(run: Callable[[], Any], repeat: int) -> dict[str, Any]:
    """Times `run`, which returns arrays, in milliseconds, after two runs that do not count."""
    [times] = in_turn(repeat, run)
    return timed(times)


def measure_with_peak(run: Callable[[], Any], repeat: int, precision: str) -> dict[str, Any]:
    """`measure`, and what the device gives at most: the operations a second of a large matrix
    product. It is timed in turn with `run`, as a machine that others share has less at times."""
    on_cpu = jax.local_devices()[0].platform == "cpu"
    n, num_products = (2048, 5) if on_cpu else (4096, 50)
    dtype = "bfloat16" if precision == "bfloat16" else "float32"
    x = jax.random.normal(jax.random.key(0), (n, n), dtype)
    product = jax.jit(jnp.matmul)
    times, products = in_turn(repeat, run, lambda: [product(x, x) for _ in range(num_products)])
    peak = num_products * 2 * n**3 / statistics.median(products[2:]) / 1e9
    return timed(times) | {"peak_tflops": peak}


def in_turn(repeat: int, *functions: Callable[[], Any]) -> list[list[float]]:
    """Times of each function in milliseconds, of which the first two are not to count."""
    times = [[] for _ in functions]
    for i in range(2 + repeat):
        if i == 2:
            forget_peak()
        for own, function in zip(times, functions):
            began = time.perf_counter()
            jax.block_until_ready(function())
            own.append(1e3 * (time.perf_counter() - began))
    return times


def timed(times: list[float]) -> dict[str, Any]:
    """What is kept of the times of `in_turn`."""
    first, second, *rest = times
    return summary(rest) | {"compile_s": max(0.0, first - second) / 1e3}


def summary(times: list[float]) -> dict[str, Any]:
    """What is kept of several times in milliseconds."""
    return {"median_ms": statistics.median(times), "min_ms": min(times), "n": len(times)}


def flops(jitted: Any, *args: Any) -> float | None:
    """Operations of a program as written, before XLA changes it; None where XLA does not say.

    Gradients of kernels are counted in XLA's own form, which GPUs keep: those of CPUs are loops, whose
    body XLA counts once.
    """
    own = {
        "_fastest_on_cpu": lambda *_, **__: convolution._kernel_gradient,
        "_sums_of_products": convolution._depthwise_kernel_gradient,
    }
    with mock.patch.multiple(convolution, **own):
        return (jitted.lower(*args).cost_analysis() or {}).get("flops")


class Programs:
    """K-Net's programs by a config, each a function and its arguments."""

    def __init__(self, config: ConfigDict, size: Size, batch: int, things: int = scenes.THINGS):
        self.config = config
        self.model, self.task = make_model(**config.model), TASKS[config.task]
        self.variables = init_variables(self.model, config.seed)
        self.params = self.variables["params"]
        self.batch_stats = self.variables.get("batch_stats", {})
        self.batch = scenes.batch(batch, size, config, 0, things)

    def network(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """uint8 pictures -> mask and class logits."""
        return partial(run_rounds, model=self.model), (self.variables, self.batch)

    def gradients(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Forward, matching, losses and gradients of the pictures, added to gradients before."""
        gradients = partial(
            train_step.accumulate,
            model=self.model,
            task=self.task,
            weights=LossWeights(**self.config.loss),
        )
        counts = self.task.count(self.task.unpack(self.batch.targets))
        key = jax.random.key(self.config.seed)
        return gradients, (self.params, self.params, self.batch_stats, self.batch, counts, key)

    def update(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Gradients are added over the devices, then AdamW."""
        optimizer, _ = optim.make_optimizer(self.config.optim, self.params, 1000, 16)
        state = train_step.TrainState(
            jnp.zeros((), jnp.int32), self.params, self.batch_stats, optimizer.init(self.params)
        )
        update = partial(
            train_step.update,
            optimizer=optimizer,
            trainable=optim.trainable(self.config.optim.groups, self.params),
            ema_decay=0.0,
        )
        gradients, arguments = self.gradients()
        *_, judgement = jax.eval_shape(on_devices(gradients, own_mesh()), *arguments)
        return update, (state, self.params, self.batch_stats, (judgement,))


def on_devices(program: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """Each device runs the program on arrays of its own."""
    each = PartitionSpec()  # what they hold has no bearing on what they need
    return jax.shard_map(program, mesh=mesh, in_specs=each, out_specs=each, check_vma=False)


def own_mesh() -> Mesh:
    """The first device of this machine, as all that there are."""
    return Mesh(np.array(jax.devices()[:1]), (AXIS,))


def forget_peak() -> None:
    """Lets the peak of this process's memory begin anew, where Linux is."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)  # what compiling has left behind
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def memory(device: jax.Device) -> dict[str, float]:
    """Peaks of this process in MiB: on Linux since `forget_peak`, else with compilation."""
    line = _find("/proc/self/status", "VmHWM")
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    peaks = {"host_peak_mib": (int(line.split()[0]) * 1024 if line else peak) / 2**20}
    stats = device.memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        peaks["device_peak_mib"] = stats["peak_bytes_in_use"] / 2**20
    return peaks


def machine() -> dict[str, Any]:
    """What the times belong to."""
    devices = jax.local_devices()
    memory_line = _find("/proc/meminfo", "MemTotal")
    return {
        "cpu": _find("/proc/cpuinfo", "model name") or platform.processor(),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "ram_gib": round(int(memory_line.split()[0]) / 2**20, 1) if memory_line else None,
        "load_average": os.getloadavg()[0],
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("jax", "jaxlib", "flax", "numpy")},
        "platform": devices[0].platform,
        "device": devices[0].device_kind,
        "devices": len(devices),
    }


def _find(path: str, key: str) -> str:
    """The value of the first line `key : value` of a file, '' if there is none."""
    lines = Path(path).read_text().splitlines() if Path(path).is_file() else []
    values = (line.partition(":")[2].strip() for line in lines if line.startswith(key))
    return next(values, "")


# The parts.


def network(case: Case, config: ConfigDict, repeat: int) -> dict[str, Any]:
    """uint8 pictures -> mask and class logits, as in an evaluation."""
    program, arguments = Programs(config, case.size, case.batch).network()
    run, arguments = jax.jit(program), jax.device_put(arguments)
    times = measure_with_peak(lambda: run(*arguments), repeat, case.precision)
    return times | {"flop": flops(run, *arguments)}


def fusion(case: Case, config: ConfigDict, repeat: int) -> dict[str, Any]:
    """Logits on the device -> results of the task at the size of the pictures, on the host."""
    task = TASKS[config.task]
    stage = scenes.stage(case.scene, case.batch, case.size, config, case.things)
    stage = jax.device_put(stage)
    sizes, originals = (
        np.array([size] * case.batch, np.int32) for size in (case.size, case.original)
    )
    seen = Pass(stage, sizes, sizes, np.zeros(case.batch, bool))
    run = jax.jit(
        partial(
            task.predict,
            canvas=ResultCanvas.of(sizes, originals),
            **task.choose_options(
                Sizes(*(config.model[name] for name in Sizes._fields)), config.eval
            ),
        )
    )

    def to_host() -> list[Any]:
        results = jax.device_get(run([seen], originals))
        return [
            task.read(jax.tree.map(lambda x, i=i: x[i], results), original)
            for i, original in enumerate(originals)
        ]

    return measure(to_host, repeat)


def fusion_torch(case: Case, config: ConfigDict, repeat: int) -> dict[str, Any]:
    """Panoptic maps the plain way in torch: all masks to the size of the picture, the best one at
    each pixel.

    The last step, which of them keep their pixels, is left out.
    """
    import torch  # Optional: nothing else needs it.
    from torch.nn.functional import interpolate

    device = "cuda" if torch.cuda.is_available() else "cpu"
    _, *arrays = scenes.stage(case.scene, case.batch, case.size, config)
    masks, logits = (torch.from_numpy(np.array(array)).to(device) for array in arrays)
    num_things, num_proposals = config.model.num_things, config.model.num_proposals
    resize = partial(interpolate, mode="bilinear", align_corners=False)

    @torch.inference_mode()
    def run() -> list[np.ndarray]:
        probs = logits.sigmoid()
        things = probs[:, :num_proposals, :num_things].amax(2)
        stuff = probs[:, num_proposals:, num_things:].diagonal(dim1=1, dim2=2)
        scores = torch.cat([things, stuff], 1)
        owners = []
        for i in range(case.batch):  # pictures of a batch differ in size
            x = resize(masks[i : i + 1], scale_factor=2).sigmoid()
            x = resize(x, size=case.size)[..., : case.size.height, : case.size.width]
            x = resize(x, size=case.original)[0]
            owners.append((scores[i, :, None, None] * x).argmax(0).cpu().numpy())
        return owners

    times = measure(run, repeat)
    del times["compile_s"]
    return times | {"torch": torch.__version__, "threads": torch.get_num_threads()}


class SceneModel(NamedTuple):
    """A network that is computed, and whose results are those of a scene: random weights would see
    what no trained network does."""

    model: KNet
    stage: Stage

    @property
    def backbone(self) -> Any:
        """Of the network."""
        return self.model.backbone

    @property
    def sizes(self) -> Sizes:
        """Of the network."""
        return self.model.sizes

    def apply(self, variables: Any, image: jax.Array) -> Output:
        """The output of the network, but for the masks and logits of its last stage."""
        output = self.model.apply(variables, image)
        last = output.stages[-1]
        # The network's own count for nothing, which XLA does not know.
        blended = jax.tree.map(
            lambda scene, own: scene + 1e-30 * own,
            self.stage._replace(kernels=None),
            last._replace(kernels=None),
        )
        return output._replace(stages=(*output.stages[:-1], blended))


def segmenter(case: Case, config: ConfigDict, repeat: int) -> dict[str, Any]:
    """uint8 pictures on the host -> results on the host, as a user of the package gets them; and the
    network alone, in turn with it."""
    config.precision = case.precision
    model = make_model(**config.model)
    variables = init_variables(model, config.seed)
    recipe = recipes.find(config.task, config.data)
    canvas = Size(*recipe.eval_canvas(case.original))
    stage = jax.device_put(scenes.stage(case.scene, case.batch, canvas, config))
    names = tuple(f"class {i}" for i in range(config.model.num_things + config.model.num_stuff))
    categories = Categories(names, tuple(range(1, 1 + len(names))), config.model.num_things)
    run = Model(config, SceneModel(model, stage), variables, categories, 0)
    sees = Segmenter(run, case.batch)
    rng = np.random.default_rng(0)
    pictures = list(rng.integers(0, 256, (case.batch, *case.original, 3)).astype(np.uint8))

    batch = jax.device_put(scenes.batch(case.batch, canvas, config, seed=0))
    network = jax.jit(partial(run_rounds, model=model))
    whole, alone = in_turn(repeat, lambda: sees(pictures), lambda: network(variables, batch))
    record = timed(whole) | {"network_ms": statistics.median(alone[2:])}
    return record | {"overhead": record["median_ms"] / record["network_ms"] - 1}


def train(case: Case, config: ConfigDict, repeat: int) -> dict[str, Any]:
    """Forward, matching, losses, gradients and AdamW, as train.py does it."""
    devices = jax.local_devices()[: case.devices]
    if len(devices) < case.devices:
        raise ValueError(f"there are {len(devices)} devices, not {case.devices}")
    share = case.batch // case.devices
    num_parts = share // min(share, config.train.microbatch)
    programs = Programs(config, case.size, share // num_parts, case.things)
    params, batch_stats = programs.params, programs.batch_stats
    optimizer, _ = optim.make_optimizer(config.optim, params, 1000, case.batch)
    step = train_step.make_train_step(
        devices,
        model=programs.model,
        task=programs.task,
        optimizer=optimizer,
        trainable=optim.trainable(config.optim.groups, params),
        weights=LossWeights(**config.loss),
        seed=config.seed,
    )
    batch = scenes.batch(case.batch, case.size, config, 0, case.things)
    parts = train_step.to_devices(batch, devices, num_parts)

    # The optimizer's operations are few: they are not counted.
    gradients, arguments = programs.gradients()
    flop = flops(jax.jit(on_devices(gradients, own_mesh())), *arguments)

    state = train_step.replicate(
        train_step.TrainState(
            jnp.zeros((), jnp.int32), params, batch_stats, optimizer.init(params)
        ),
        devices,
    )

    def run() -> Any:
        nonlocal state
        state, metrics = step(state, parts)
        return state, metrics

    return measure_with_peak(run, repeat, case.precision) | {
        "microbatch": share // num_parts,
        "flop": flop and case.devices * num_parts * flop,
    }


def loader(case: Case, config: ConfigDict, repeat: int) -> dict[str, Any]:
    """Training batches on the host, from prepared records, by the recipe of the config."""
    data = config.data
    data.num_workers = case.workers
    with contextlib.redirect_stdout(io.StringIO()):
        split = pipeline.load_split(data, data.train_split, config.task)
    batches = pipeline.train_batches(split, data, case.batch, config.seed, start=0)
    # What the workers have ready when the clock starts would count as fast.
    for _ in range(2 * case.workers + 2):
        next(batches)
    times = []
    for _ in range(repeat):
        began = time.perf_counter()
        for _ in range(LOADER_WINDOW):
            next(batches)
        times.append(1e3 * (time.perf_counter() - began) / LOADER_WINDOW)
    batches.close()
    return summary(times)


PARTS = {
    "network": network,
    "fuse": fusion,
    "fuse_torch": fusion_torch,
    "segmenter": segmenter,
    "train": train,
    "loader": loader,
}


def run_case(case: Case, config: ConfigDict, repeat: int) -> dict[str, Any]:
    """The record of a case, `machine` included. Meant for a process of its own."""
    jax.config.update("jax_default_matmul_precision", case.precision)
    if case.precision == "bfloat16":
        config.model.dtype = "bfloat16"
    record = PARTS[case.part](case, config, repeat)
    record["images_per_second"] = 1e3 * case.batch / record["median_ms"]
    return record | memory(jax.local_devices()[0]) | {"machine": machine()}
