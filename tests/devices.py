"""Runs a function of this folder in a process with several simulated devices."""

import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent


def environment(num_devices: int) -> dict[str, str]:
    """Variables under which jax shows so many CPU devices, and compiles fast rather than well."""
    xla = {
        "xla_force_host_platform_device_count": num_devices,
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": "true",
    }
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": " ".join(f"--{name}={value}" for name, value in xla.items()),
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
