"""Several processes that train or evaluate one network together: all that concerns them stands here.

Each process has some of the devices and its share of every batch, and all run the same program. The
main one, the first, also does what is done once: it prepares data, prints, and writes files. With one
process, nothing here does anything. What they tell each other is pickled: they trust each other, as
their network must be one that only they can reach.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pickle
import re
import socket
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from knet_jax.system.backend import start_backend
from knet_jax.system.errors import UserError, one_line
from knet_jax.system.signals import Preempted

T = TypeVar("T")

HEARTBEAT = 100
"""Seconds without a sign of life after which a process is taken for dead."""
CHUNK = 2**24
"""Bytes of arrays that are sent at a time."""


# Start and end.


@contextlib.contextmanager
def joined(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    heartbeat: int = HEARTBEAT,
) -> Iterator[None]:
    """Joins the processes of a run, before anything touches a device, until the context ends.

    Without arguments that happens in a step of SLURM, under Open MPI and in a Kubernetes job where
    there are several, and else not at all. What goes wrong in this process alone ends it at once, in
    a line, since the others, which notice, would wait for it as it would for them.

    Args:
        coordinator: `HOST:PORT` at which the main process listens.
        num_processes: how many there are.
        process_id: which one this is, from 0.
        heartbeat: after so many seconds without a sign of life, a process is taken for dead.

    Raises:
        UserError: an argument is missing or makes no sense, or the others are not found.
    """
    found = find_cluster(os.environ, coordinator, num_processes, process_id)
    if found is None:
        yield
        return
    # Its handler of SIGTERM would keep a process from ending that is not training yet.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            **found, heartbeat_timeout_seconds=heartbeat, shutdown_timeout_seconds=heartbeat
        )
    except Exception as error:  # of JAX, of Kubernetes' library, of MPI
        raise UserError(f"several processes: {one_line(error):.300}") from error
    try:
        yield
    except BaseException as error:
        if is_shared(error):
            raise
        _say_last(error)
        os._exit({UserError: 2, KeyboardInterrupt: 130}.get(type(error), 1))


def find_cluster(
    environ: Mapping[str, str],
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
) -> dict[str, Any] | None:
    """Decides whether this is one of several processes.

    A shell inside an allocation of SLURM is none, however many tasks the allocation has: only a step
    that `srun` has started with several counts.

    Args:
        environ: the variables of the process; the others are those of `joined`.

    Returns:
        Arguments of `jax.distributed.initialize`, which finds the rest; None for one process.

    Raises:
        UserError: arguments are missing or make no sense.
    """
    coordinator = coordinator or environ.get("JAX_COORDINATOR_ADDRESS")
    given = {
        "--coordinator": coordinator,
        "--num_processes": num_processes,
        "--process_id": process_id,
    }
    is_pod = "JOB_COMPLETION_INDEX" in environ and importlib.util.find_spec("kubernetes")
    is_cluster = (
        int(environ.get("SLURM_STEP_NUM_TASKS") or 1) > 1
        or int(environ.get("OMPI_COMM_WORLD_SIZE") or 1) > 1
        or is_pod
    )
    if (num_processes, process_id) == (None, None) and (is_cluster or coordinator is None):
        return {"coordinator_address": coordinator} if is_cluster else None
    if missing := [name for name, value in given.items() if value is None]:
        raise UserError(
            f"{missing[0]} is missing; accepted: --coordinator HOST:PORT --num_processes N "
            "--process_id I together, or none of them"
        )
    if not re.fullmatch(r".+:\d+", coordinator):
        raise UserError(f"--coordinator={coordinator}; accepted: HOST:PORT of the first process")
    if not 0 <= process_id < num_processes:
        raise UserError(
            f"--process_id={process_id}; accepted: 0 to {num_processes - 1}, as --num_processes is "
            f"{num_processes}"
        )
    return {
        "coordinator_address": coordinator,
        "num_processes": num_processes,
        "process_id": process_id,
    }


def _say_last(error: BaseException) -> None:
    """Prints why this process ends: a line, or the traceback of a bug."""
    # What XLA says of a process that it cannot reach any more begins with the name of a status.
    is_lost = re.match(r"[A-Z_]{5,}: ", str(error)) is not None
    if not is_lost and not isinstance(error, UserError | OSError | KeyboardInterrupt):
        traceback.print_exception(error)
    line = one_line(error) or type(error).__name__
    hint = "; if another process has died, the same command goes on" if is_lost else ""
    print(f"{_name()} ends, and all others: {line:.500}{hint}", file=sys.stderr, flush=True)


def _name(index: int | None = None) -> str:
    return f"process {jax.process_index() if index is None else index} of {jax.process_count()}"


# Who does what.


def is_main() -> bool:
    """Whether this process does what is done once."""
    return jax.process_index() == 0


def is_alone() -> bool:
    """Whether there is no other process."""
    return jax.process_count() == 1


@contextlib.contextmanager
def main_speaks() -> Iterator[None]:
    """Starts JAX, and keeps what the other processes print on stdout to themselves; a line says which
    there are.

    Raises:
        UserError: there are no such devices, or processes have different numbers of them.
    """
    start_backend()
    if is_alone():
        yield
        return
    counts = Counter(device.process_index for device in jax.devices())
    if len(set(counts.values())) > 1:
        each = ", ".join(f"{index} has {count}" for index, count in sorted(counts.items()))
        raise shared(UserError(f"processes must have equal numbers of devices: {each}"))
    own = f"{jax.local_device_count()} x {jax.devices()[0].device_kind} on {socket.gethostname()}"
    with open(os.devnull, "w") as nowhere, contextlib.ExitStack() as stack:
        if not is_main():
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        lines = [f"process {index}: {text}" for index, text in enumerate(exchange(own))]
        print("\n".join(lines), flush=True)
        yield


class Absent:
    """Stands where only the main process has something: its methods do nothing and return None."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass


def on_main(make: Callable[[], T]) -> T | Absent:
    """What a function makes, on the main process, and `Absent` on the others."""
    return make() if is_main() else Absent()


# What they tell each other. All of them must come to the same calls in the same order.


def exchange(value: T) -> list[T]:
    """Tells a value, which pickle takes, to all processes.

    Returns:
        What they told, in their order.

    Raises:
        UserError: another process told instead what has gone wrong in it, see `together`.
    """
    if is_alone():
        return [value]
    values = _exchange((value, None))
    return [told for told, _ in values]


def _exchange(message: tuple[Any, str | None]) -> list[tuple[Any, str | None]]:
    """Tells (value, None) or (None, what went wrong)."""
    data = np.frombuffer(pickle.dumps(message), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(data.size))
    # One of few lengths, since each is a program of its own.
    length = 1 << int(sizes.max() - 1).bit_length()
    rows = multihost_utils.process_allgather(np.pad(data, (0, length - data.size)))
    messages = [pickle.loads(row[:size].tobytes()) for row, size in zip(rows, sizes)]
    for index, (_, error) in enumerate(messages):
        if error and not message[1]:
            raise shared(UserError(f"{_name(index)}: {error}"))
    return messages


@contextlib.contextmanager
def together() -> Iterator[Callable[[], None]]:
    """Ends all processes where one of them fails inside: the others hear of it in their next exchange.

    Yields:
        A function that ends this, and waits for all others to come there too; so does the end of the
        context. Programs that run on the devices of all processes must not start before that.
    """
    if is_alone():
        yield lambda: None
        return
    is_open = True

    def close() -> None:
        nonlocal is_open
        if is_open:
            exchange(None)
            is_open = False

    try:
        yield close
    except Exception as error:
        if is_open and not is_shared(error) and not isinstance(error, jax.errors.JaxRuntimeError):
            _exchange((None, one_line(error) or type(error).__name__))
            shared(error)
        raise
    close()


def shared(error: BaseException) -> BaseException:
    """Marks an error that all processes raise or have heard of, so that they can end in order."""
    error.is_shared = True
    return error


def is_shared(error: BaseException) -> bool:
    """Whether all processes end with this error, or have heard of it."""
    return isinstance(error, Preempted) or getattr(error, "is_shared", False)


def from_main(make: Callable[[], T]) -> T:
    """What a function returns on the main process, which alone calls it, told to all."""
    if is_alone():
        return make()
    with together():
        return exchange(make() if is_main() else None)[0]


def any_of(flag: bool) -> bool:
    """Whether `flag` is true in any process. All processes must call it."""
    return any(exchange(bool(flag)))


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """Lets the main process run a block before the others do."""
    with together():
        if not is_main():
            exchange(None)
        yield
        if is_main():
            exchange(None)


def check_same(facts: Mapping[str, Any]) -> None:
    """Checks that all processes have been given the same.

    Args:
        facts: by the names that the message calls them.

    Raises:
        UserError: a fact differs; all of them raise it.
    """
    first, *others = exchange(dict(facts))
    for index, other in enumerate(others, 1):
        for name in sorted(first.keys() | other.keys()):
            was, given = (each.get(name, "absent") for each in (first, other))
            if was != given:
                line = f"{name} is {given!r} in {_name(index)}, and {was!r} in process 0"
                raise shared(UserError(f"{line}; accepted: the same in all"))


def broadcast(tree: Any) -> Any:
    """The arrays of the main process, bit for bit, in all of them.

    Args:
        tree: arrays, in every process of the same structure, shapes and types.
    """
    if is_alone():
        return tree
    exchange(None)  # what has gone wrong before it in another process is heard here
    leaves, structure = jax.tree.flatten(jax.device_get(tree))
    data = np.concatenate([np.frombuffer(np.asarray(x).tobytes(), np.uint8) for x in leaves])
    received = np.empty_like(data)
    for start in range(0, data.size, CHUNK):
        part = data[start : start + CHUNK]
        sent = multihost_utils.broadcast_one_to_all(np.pad(part, (0, CHUNK - part.size)))
        received[start : start + CHUNK] = sent[: part.size]
    ends = np.cumsum([np.asarray(x).nbytes for x in leaves])[:-1]
    arrays = [
        part.copy().view(np.asarray(x).dtype).reshape(np.shape(x))
        for part, x in zip(np.split(received, ends), leaves)
    ]
    return jax.tree.unflatten(structure, arrays)
