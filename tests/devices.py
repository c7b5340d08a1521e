"""Runs a function of this folder in a process with several simulated devices."""

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

FOLDER = Path(__file__).parent


COMPILE_FAST = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
"""Flags of XLA: tiny networks are compiled for much longer than they run."""
if [int(number) for number in version("jaxlib").split(".")[:2]] < [0, 11]:
    # The older way to compile a fusion takes a third as long. Later versions, which have no other
    # way, end at a flag that they do not know.
    COMPILE_FAST += " --xla_cpu_use_fusion_emitters=false"


def environment(num_devices: int) -> dict[str, str]:
    """Variables under which jax shows so many CPU devices, and compiles fast rather than well."""
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={num_devices} {COMPILE_FAST}",
        "NPROC": "16",  # threads: with two, devices that wait for each other may starve
    }


def call(module: str, function: str, *arguments: object, num_devices: int) -> str:
    """Calls `module.function(*arguments)`, texts, and returns what it printed."""
    code = (
        "import importlib, sys; module, function, *arguments = sys.argv[1:];"
        "getattr(importlib.import_module(module), function)(*arguments)"
    )
    path = os.pathsep.join([str(FOLDER), str(FOLDER.parent)])
    done = subprocess.run(
        [sys.executable, "-c", code, module, function, *map(str, arguments)],
        env=environment(num_devices) | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
