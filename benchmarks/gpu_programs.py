"""Compiles K-Net's programs for an H200, on a machine without one, and says what they need.

pip install 'jax[cuda12]'
python benchmarks/gpu_programs.py --output benchmarks/results/gpu_programs.json
python benchmarks/gpu_programs.py --only gradients --batch 8 --most 20    # what reads and writes most

XLA makes the programs that it would run there, except for what it chooses by trying it on the device
(algorithms of convolutions, tiles of matrix products). Nothing is run and no time is measured. Of
each program:

    Tflop       operations as written, a multiply-add being two
    traffic     what all kernels read and write, GiB
    work space  beside arguments and results, GiB
    kernels     how many are launched; of a loop whose end is not known, the assignment's, those of one turn,
                and of a choice those of all branches
    at best     milliseconds if the bandwidth of the memory (4.8 TB/s) and the arithmetic were fully used,
                whichever takes longer
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from parts import Programs, Size, flops, on_devices, own_mesh
from run import count, input_size

from knet_jax.config.files import load_config
from knet_jax.nn.layers import AXIS
from knet_jax.system.errors import UserError

H200 = """
gpu_device_info {
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
  shared_memory_per_block: 49152  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472  registers_per_core_limit: 65536
  registers_per_block_limit: 65536  core_count: 132  fpus_per_core: 128
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000  l2_cache_size: 62914560  clock_rate_ghz: 1.98
  device_memory_size: 151000000000  cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
runtime_version { major: 12 minor: 9 }
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H200"
"""
"""By NVIDIA's data sheet, in the form of XLA's `GpuTargetConfigProto`."""

MEMORY = 4.8e12
"""Bytes a second."""
TFLOPS = {"float32": 67, "tensorfloat32": 495, "bfloat16": 989}
"""10^12 operations a second, of dense products."""

ARRAY = re.compile(r"\b(pred|token|[a-z]+(\d+)\w*)\[([\d,]*)\]")
INSTRUCTION = re.compile(r"\s+(?:ROOT )?%([\w.-]+) = (.+?) ([\w-]+)\((.*?)\)(.*)")
NO_KERNEL = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"}
CALLED = re.compile(
    r"(?:body|to_apply|calls|(?:true|false)_computation|branch_computations)="
    r"\{?((?:%[\w.-]+(?:, )?)+)"
)


class Instruction(NamedTuple):
    """A line of a compiled program."""

    name: str
    size: int
    """Bytes of what it makes."""
    kind: str
    operands: list[str]
    rest: str
    """Its attributes; of a parameter, its number."""


class Kernel(NamedTuple):
    """Some launches of a compiled program."""

    source: str
    """The operation that it was made of, as JAX names it."""
    bytes_moved: int
    times: int


def kernels(program: str) -> list[Kernel]:
    """The launches of a program that XLA has compiled, from its text."""
    computations: dict[str, list[Instruction]] = {}
    entry = ""
    for line in program.splitlines():
        if found := INSTRUCTION.match(line):
            name, shape, kind, operands, rest = found.groups()
            rest = operands if kind == "parameter" else rest
            operands = re.findall(r"%([\w.-]+)", operands)
            # What stands outside of computations are tables of names.
            next(reversed(computations.values())).append(
                Instruction(name, size_of(shape), kind, operands, rest)
            )
        elif found := re.match(r"(ENTRY )?%([\w.-]+) .*\{$", line):
            computations[found[2]] = []
            entry = found[2] if found[1] else entry

    def launches(computation: str, times: int) -> Iterator[Kernel]:
        sizes = {each.name: each.size for each in computations[computation]}
        for each in computations[computation]:
            called = re.findall(r"%([\w.-]+)", " ".join(CALLED.findall(each.rest)))
            if each.kind in {"while", "conditional", "call", "async-start"}:
                known = re.search(r'"known_trip_count":\{"n":"(\d+)"', each.rest)
                for inner in called:
                    yield from launches(inner, times * int(known[1] if known else 1))
            elif each.kind not in NO_KERNEL and not each.kind.endswith("-done"):
                read, written = [sizes[operand] for operand in each.operands], each.size
                if each.kind == "fusion":
                    fused = computations[called[0]]
                    read, written = map(min, read, reads(fused)), writes(fused)
                source = re.search(r'op_name="([^"]*)"', each.rest)
                moved = times * (written + sum(read))
                yield Kernel(source[1] if source else each.name, moved, times)

    return [*launches(entry, 1)]


def reads(fused: list[Instruction]) -> list[int]:
    """Bytes that a kernel reads of each of its parameters at most: of slices only these, and nothing of
    what it changes in place."""

    def read(name: str, size: int) -> int:
        total = 0
        for user in fused:
            if name not in user.operands:
                continue
            if user.kind == "bitcast":
                total += read(user.name, user.size)
            elif user.kind in {"slice", "dynamic-slice"}:
                total += user.size
            elif user.kind != "dynamic-update-slice" or user.operands[0] != name:
                return size
        return total

    parameters = sorted((int(each.rest), each) for each in fused if each.kind == "parameter")
    return [read(each.name, each.size) for _, each in parameters]


def writes(fused: list[Instruction]) -> int:
    """Bytes that a kernel writes: of an array that it changes in place only the change."""
    made, root = {each.name: each for each in fused}, fused[-1]
    results = [made[name] for name in root.operands] if root.kind == "tuple" else [root]
    return sum(
        made[each.operands[1]].size if each.kind == "dynamic-update-slice" else each.size
        for each in results
    )


def size_of(shape: str) -> int:
    """Bytes of an array, or of all of a tuple, as XLA writes them: `(f32[2,3]{1,0}, pred[])`."""
    return sum(
        (int(bits) if bits else 8 * (kind == "pred"))
        * math.prod(int(n) for n in dims.split(",") if n)
        // 8
        for kind, bits, dims in ARRAY.findall(shape)
    )


DONATED = {"network": (), "gradients": (0,), "update": (0,)}
"""Of each program, the arguments whose memory the results take."""


def h200_mesh(devices: int) -> Mesh:
    """GPUs that are described and need not be there."""
    try:
        described = topologies.get_topology_desc(
            platform="cuda", topology=f"1x1x{devices}", target_config=H200
        )
    except NotImplementedError:  # JAX's answer where it knows no such platform
        sys.exit("XLA for GPUs is not installed: pip install 'jax[cuda12]' (or --here)")
    return topologies.make_mesh(described, (devices,), (AXIS,))


def compile_program(
    program: Callable[..., Any], arguments: tuple[Any, ...], donated: tuple[int, ...], mesh: Mesh
) -> jax.stages.Compiled:
    """Compiles a program for the devices of the mesh; results take the memory of `donated` arguments."""
    sharding = NamedSharding(mesh, PartitionSpec())
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        jax.eval_shape(lambda: arguments),
    )
    jitted = jax.jit(on_devices(program, mesh), donate_argnums=donated)
    return jitted.lower(*shapes).compile()


def needs(name: str, programs: Programs, mesh: Mesh) -> tuple[dict[str, float], list[Kernel]]:
    """What one of `DONATED` needs, and its kernels."""
    program, arguments = getattr(programs, name)()
    compiled = compile_program(program, arguments, DONATED[name], mesh)
    launched = kernels(compiled.as_text())
    record = {
        "flop": flops(jax.jit(on_devices(program, own_mesh())), *arguments),
        "bytes_moved": sum(kernel.bytes_moved for kernel in launched),
        "work_space": compiled.memory_analysis().temp_size_in_bytes,
        "kernels": sum(kernel.times for kernel in launched),
    }
    return record, launched


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="coco_panoptic")
    parser.add_argument("--size", type=input_size, default=Size(800, 1344))
    parser.add_argument("--only", choices=DONATED, nargs="+", default=[*DONATED])
    parser.add_argument("--batch", type=count, nargs="+", default=[1, 2, 8])
    parser.add_argument("--precision", choices=TFLOPS, nargs="+", default=[*TFLOPS])
    parser.add_argument("--gpus", type=count, nargs="+", default=[1, 8], help="that are updated")
    parser.add_argument("--most", type=count, default=0, help="kernels to list, by their traffic")
    parser.add_argument("--here", action="store_true", help="programs of this machine's devices")
    parser.add_argument("--output", type=Path, help="JSON for the results")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # the GPU is only described
    if args.output and not args.output.parent.is_dir():
        parser.error(f"--output: there is no folder {args.output.parent}")
    dtypes = {name: "bfloat16" if name == "bfloat16" else "float32" for name in args.precision}
    try:
        configs = {
            name: load_config(args.config, {"model.dtype": dtype}) for name, dtype in dtypes.items()
        }
    except UserError as error:
        parser.error(str(error))
    meshes = {n: own_mesh() if args.here else h200_mesh(n) for n in {1, *args.gpus}}
    print(
        "| program | precision | pictures | GPUs | Tflop | traffic | work space | kernels | at best |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    cases = [
        (name, precision, batch, 1)
        for name in ("network", "gradients")
        for precision in args.precision
        for batch in args.batch
    ]
    updated = [1] if args.here else args.gpus
    cases += [("update", args.precision[0], 1, gpus) for gpus in updated]
    records = []
    for name, precision, batch, gpus in cases:
        if name not in args.only:
            continue
        programs = Programs(configs[precision], args.size, batch)
        with jax.default_matmul_precision(precision):
            needed, launched = needs(name, programs, meshes[gpus])
        peak = 1e12 * TFLOPS[precision]
        best = max(needed["bytes_moved"] / MEMORY, needed["flop"] / peak)
        cells = [name, precision, batch, gpus, f"{needed['flop'] / 1e12:.2f}"]
        cells += [f"{needed[key] / 2**30:.2f}" for key in ("bytes_moved", "work_space")]
        print("|", " | ".join(map(str, [*cells, needed["kernels"], f"{1e3 * best:.1f} ms |"])))
        for kernel in sorted(launched, key=lambda k: -k.bytes_moved)[: args.most]:
            print(f"    {kernel.bytes_moved / 2**20:8.1f} MiB, {kernel.times} x {kernel.source}")
        case = {"program": name, "precision": precision, "batch": batch, "gpus": gpus}
        records.append(case | needed)
    report = {
        "config": args.config,
        "size": args.size,
        "target": "here" if args.here else "h200",
        "jax": version("jax"),
        "gradient_bytes": sum(x.nbytes for x in jax.tree.leaves(programs.params)),
        "programs": records,
    }
    if args.output:
        args.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
