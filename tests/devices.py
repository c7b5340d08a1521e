"""Processes with several simulated devices: a function of this folder in one, a command in several."""

import os
import socket
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


def free_address():
    """An address of this machine that nobody listens to."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


def start(words, num_processes, log, num_devices=1, before="import jax", **variables):
    """Starts `knet` in several processes that find each other.

    Args:
        words: what follows `knet`, or a function of the index of the process that gives it.
        num_processes: how many there are.
        log: what each prints goes to this path with .0, .1 and so on after it.
        num_devices: of each.
        before: Python that runs before all else; the default leaves out the trial of XLA's flags.
        variables: of their environment.
    """
    address = free_address()
    code = f"{before}\nfrom knet_jax.cli.main import main\nmain()"
    started = []
    for i in range(num_processes):
        joins = ["--coordinator", address, "--num_processes", num_processes, "--process_id", i]
        given = [*(words(i) if callable(words) else words), *(joins if num_processes > 1 else [])]
        with Path(f"{log}.{i}").open("w") as file:
            process = subprocess.Popen(
                [sys.executable, "-c", code, *map(str, given)],
                cwd=FOLDER.parent,
                env=environment(num_devices) | {"PYTHONPATH": f"{FOLDER.parent}"} | variables,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        started.append(process)
    return started
