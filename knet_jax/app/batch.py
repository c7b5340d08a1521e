"""Segmenting any number of pictures on the machines of a Ray cluster, whatever dies meanwhile.

A picture is done when a Parquet file has its row, and such a file is written whole or not at all. What
has no row when the program starts is what it does, so there is no other state, and everything but the
model may change between two starts.

Plain actors do that in one loop. Ray Data would give pictures whose process died to the next one, all
of them and without end, where a single one may be the cause.
"""

from __future__ import annotations

import os
import re
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from knet_jax.app.batch_pictures import Picture, find_pictures, read_picture
from knet_jax.app.batch_rows import Row, Rows, bad_row, good_row
from knet_jax.app.predictions import end_if_asked, save_overlay, segment_sources
from knet_jax.app.segmenter import load
from knet_jax.segmentation.image_files import MAX_MEGAPIXELS
from knet_jax.system.errors import UserError, one_line
from knet_jax.system.locks import lock
from knet_jax.system.output_files import local_path, write_json
from knet_jax.system.signals import StopRequest, stop_when_asked

ROWS, SUMMARY = "rows", "summary.json"
"""Names in the folder of the output."""
CHUNK = 256
"""Default of how many pictures an actor gets at a time."""
CPUS_PER_ACTOR = 2
"""Default of what an actor has: one to read pictures while the other computes, or feeds a GPU."""
MAX_BAD = 0.05
"""Default of the share of pictures that may be bad."""
TRIES = 2
"""How often a picture may end its process."""
FAILED_STARTS = 3
"""How many processes may end one after the other before they have opened the model."""


class Summary(NamedTuple):
    """What the output holds in the end, counted in its files."""

    pictures: int
    """How many were asked for; each is good or bad."""
    good: int
    bad: int
    reasons: dict[str, int]
    """How many pictures are bad for each reason."""
    model: str
    """Digest of the model that made the rows."""
    new: int
    """How many rows this call added."""
    seconds: float
    """How long this call took."""


def predict_batch(
    model: str | os.PathLike,
    images: str | Path,
    output: str | Path,
    *,
    address: str | None = None,
    actors: int | None = None,
    cpus_per_actor: int = CPUS_PER_ACTOR,
    chunk: int = CHUNK,
    max_bad: float = MAX_BAD,
    max_megapixels: float = MAX_MEGAPIXELS,
    overlays: bool = False,
    **opening: Any,
) -> Summary:
    """Segments pictures on Ray, and writes a row of each to `output/rows/*.parquet`.

    What has a row is not done again, nor is a bad picture. With an address, the machines of the
    cluster find the model and the pictures at the same paths as this one.

    Args:
        model: folder or file of a model, as for `knet_jax.load`.
        images: the pictures, see `find_pictures`.
        output: a folder, created if need be.
        address: of a cluster, as for `ray.init`; default: Ray is started here, and ended.
        actors: how many processes segment; default: one a GPU, or as many as the CPUs suffice for.
        cpus_per_actor: how many CPUs each of them takes.
        chunk: how many pictures an actor gets at a time, and the least number of rows of a file.
        max_bad: the share of pictures that may be bad.
        max_megapixels: of a picture; larger ones are bad.
        overlays: whether drawings go to `output/overlays/`, which all machines then share.
        opening: further arguments of `knet_jax.load`.

    Raises:
        UserError: there are no such pictures, no such model or cluster, the output has rows of
            another model or of other pictures, or too many pictures are bad.
        Preempted: SIGTERM or Ctrl-C came; the rows that there are stay.
    """
    start = time.monotonic()
    images = local_path("images", images).absolute()
    output = local_path("output", output).absolute()
    model = os.path.abspath(model) if os.path.exists(model) else model
    try:
        import pyarrow  # noqa: F401
        import ray
    except ImportError as error:
        raise UserError(f"{error}: pip install 'knet-jax[ray]'") from error
    pictures = find_pictures(images, output)
    output.mkdir(parents=True, exist_ok=True)
    with lock(output, f"another process writes to {output}; accepted: another --output"):
        with Rows(output / ROWS, [picture.id for picture in pictures], chunk, max_bad) as rows:
            missing = [picture for picture in pictures if picture.id not in rows.done]
            print(f"{len(pictures)} pictures, {len(missing)} of them without a row", flush=True)
            with _cluster(address, (actors or 1) * cpus_per_actor) as resources:
                num_gpus = int(resources.get("GPU", 0))
                most = actors or num_gpus or int(resources.get("CPU", 0)) // cpus_per_actor or 1
                actor = ray.remote(Predictor).options(
                    num_cpus=cpus_per_actor,
                    num_gpus=min(num_gpus, 1),
                    scheduling_strategy="SPREAD",
                )
                drawings = output if overlays else None
                make = partial(
                    actor.remote, model, opening, cpus_per_actor, drawings, max_megapixels
                )
                with stop_when_asked() as stop:
                    _segment(missing, chunk, make, most, rows, stop)
        return _audit(output, rows, len(missing), time.monotonic() - start)


class Predictor:
    """A model in a process of its own, a Ray actor."""

    def __init__(
        self,
        model: str | os.PathLike,
        opening: Mapping[str, Any],
        num_threads: int,
        overlays: Path | None,
        max_megapixels: float,
    ):
        os.environ["NPROC"] = str(num_threads)  # XLA would take all CPUs of the machine
        self._model = model
        self._opening = opening
        self._overlays = overlays
        self._read = partial(read_picture, max_megapixels=max_megapixels)

    def open(self) -> str:
        """Opens the model. Returns its digest."""
        self._segmenter = load(self._model, **self._opening)
        return self._segmenter.digest

    def predict(self, pictures: Sequence[Picture]) -> list[Row]:
        """Makes the rows of some pictures."""
        rows: list[Row] = []

        def skip(picture: Picture, error: UserError) -> None:
            rows.append(bad_row(picture, one_line(error)))

        for picture, result in segment_sources(self._segmenter, pictures, self._read, skip):
            rows.append(good_row(picture, result))
            if self._overlays:
                save_overlay(self._overlays, picture.stem, result)
        return rows


@contextmanager
def _cluster(address: str | None, num_cpus: int) -> Iterator[Mapping[str, float]]:
    """Connects to a cluster, or starts Ray here. Gives the resources that there are."""
    import ray

    if ray.is_initialized():
        yield ray.cluster_resources()
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anyone
    # Ray starts nothing that wants more CPUs than are declared, and waits.
    here = {"num_cpus": max(num_cpus, os.cpu_count() or 1), "include_dashboard": False}
    address = address or os.environ.get("RAY_ADDRESS")
    # "local", since without an address Ray would join any cluster that it finds here.
    connect = partial(
        ray.init,
        address or "local",
        log_to_driver=False,
        logging_level="ERROR",
        **({} if address else here),
    )
    try:
        if place := re.fullmatch(r"(?:ray://)?(.+):(\d+)", address or ""):
            # Ray tries for minutes, and may end the process.
            socket.create_connection((place[1], int(place[2])), timeout=10).close()
        try:
            connect()
        except ConnectionError:
            # A process that a busy head forks for a client may die at once.
            connect()
    except (OSError, ValueError, RuntimeError, OverflowError) as error:
        raise UserError(f"--address={address}: {one_line(error):.300}") from error
    try:
        yield ray.cluster_resources()
    finally:
        ray.shutdown()


def _segment(
    pictures: Sequence[Picture],
    chunk: int,
    make: Callable[[], Any],
    most: int,
    rows: Rows,
    stop: StopRequest,
) -> None:
    """Gives pictures to at most `most` actors, `chunk` at a time, until each has a row."""
    import ray

    todo = deque((pictures[i : i + chunk], 1) for i in range(0, len(pictures), chunk))
    busy: dict[Any, tuple[Any, Sequence[Picture], int]] = {}
    idle: list[Any] = []
    opened, working = False, 0
    failed_starts = 0

    def start() -> None:
        actor = make()
        busy[actor.open.remote()] = actor, (), 0

    def fail(pictures: Sequence[Picture], tries: int, reason: str) -> None:
        if tries < TRIES:  # it may be any of them
            todo.extend(([picture], tries + 1) for picture in pictures)
        else:
            rows.add([bad_row(picture, f"{reason}, {tries} times") for picture in pictures])

    for _ in range(max(1, min(most, len(todo)))):
        start()
    with tqdm(total=len(rows.ids), desc="segmenting", unit="img", initial=len(rows.done)) as bar:
        # An actor that no machine has room for is never waited for: work goes to those that are open.
        while todo or working or not opened:
            for done in ray.wait([*busy], timeout=1)[0]:
                actor, given, tries = busy.pop(done)
                try:
                    answer = ray.get(done)
                except ray.exceptions.RayTaskError as error:
                    if not given:
                        raise error.cause from error
                    idle.append(actor)
                    cause = f"{type(error.cause).__name__}: {one_line(error.cause):.300}"
                    fail(given, tries, cause)
                except ray.exceptions.RayActorError as error:
                    failed_starts += not given
                    if failed_starts == FAILED_STARTS:
                        raise UserError(
                            f"{failed_starts} processes ended while they opened the model: "
                            f"{one_line(error):.500}"
                        ) from error
                    start()
                    fail(given, tries, "its process ended")
                else:
                    idle.append(actor)
                    if given:
                        rows.add(answer)
                    else:
                        opened, failed_starts = True, 0
                        rows.check_model(answer)
            while idle and todo:
                actor, (given, tries) = idle.pop(), todo.popleft()
                busy[actor.predict.remote(given)] = actor, given, tries
            bar.update(len(rows.done) - bar.n)
            working = sum(1 for _, given, _ in busy.values() if given)
            bar.set_postfix(bad=rows.reasons.total(), actors=working)
            rows.check_share()
            end_if_asked(stop)


def _audit(output: Path, rows: Rows, num_new: int, seconds: float) -> Summary:
    """Counts what lies on the disk, and writes `summary.json`."""
    rows.reload()
    if absent := set(rows.ids) - rows.done:
        raise UserError(
            f"{rows.folder} has no row of {len(absent)} pictures, such as {min(absent)!r:.200}, though "
            "they were written; accepted: files that nobody takes away"
        )
    bad = rows.reasons.total()
    reasons = dict(rows.reasons.most_common())
    summary = Summary(
        len(rows.ids), len(rows.done) - bad, bad, reasons, rows.model, num_new, round(seconds, 1)
    )
    write_json(output / SUMMARY, summary._asdict())
    return summary
