"""Writing a dataset as ArrayRecord in shards, each by any process, whole or not at all.

`plan` divides the pictures and leaves a file for each shard; `write` needs only that file, so processes of
this machine (`write_locally`) or of a cluster (`beam_writer`) do the same; `finish` puts together what
they found. What is done stays done, whatever ends them.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import multiprocessing
import os
import pickle
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent import futures
from multiprocessing import pool
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module

import knet_jax
from knet_jax.data import records
from knet_jax.data.annotations import by_task
from knet_jax.data.annotations.kind import Record
from knet_jax.segmentation.segments import Categories, printable
from knet_jax.system import workers
from knet_jax.system.errors import UserError, one_line

RECORDS_PER_FILE = 250
"""Of a small dataset."""
MAX_FILES = 400
"""A loader opens all files of a split, a process may have two of them, and systems allow 1024."""
MAX_LINE = 200
"""Letters of what is said of a picture; more cannot be read."""


Write = Callable[[Sequence[Path]], Iterable[int]]
"""Writes the parts of a plan, and returns how many pictures each of them was to hold."""


class Part(NamedTuple):
    """What a shard is to hold."""

    name: str
    """Of the file of its records."""
    task: str
    categories: Categories
    read: Callable[[Any], tuple[Record, Sequence[str]]]
    entries: Sequence[tuple[str, Any]]
    """As of `records.Examples`."""


class Found(NamedTuple):
    """What a shard holds that was written."""

    sizes: np.ndarray
    """int32 [n, 2]: height and width of its pictures."""
    num_things: np.ndarray
    """int32 [n]: how many things each shows, crowds left out."""
    counts: Mapping[str, np.ndarray]
    """The sums of those of `Kind.tally`."""
    num_bytes: int
    problems: Sequence[str]
    """What is wrong with pictures, a line each."""


class Plan(NamedTuple):
    """How a dataset is divided."""

    count: int
    """How many pictures there may be."""
    parts: Sequence[Path]
    """A file for each shard, of its `Part`."""
    categories: Categories
    problems: Sequence[str]
    place: str
    """As of `records.Examples`."""


def plan(source: records.Source, unfinished: Path) -> Plan:
    """Divides a dataset, unless that was done before all was killed.

    Raises:
        UserError: the dataset cannot be used.
    """
    done = unfinished / "parts" / f"plan-{knet_jax.__version__}"
    for draft in done.parent.glob("*.draft"):  # of what was killed
        draft.unlink(missing_ok=True)
    if done.exists():
        return pickle.loads(done.read_bytes())
    examples = source.examine()
    for needed in (done.parent, unfinished / str(records.VERSION)):
        needed.mkdir(parents=True, exist_ok=True)
    size = max(RECORDS_PER_FILE, math.ceil(examples.count / MAX_FILES))
    count, entries = math.ceil(examples.count / size), iter(examples.entries)
    parts = [done.with_name(f"{number:05}.part") for number in range(count)]
    for number, path in enumerate(parts):
        name = f"{source.dataset}-{source.split}.array_record-{number:05}-of-{count:05}"
        given = tuple(itertools.islice(entries, size))
        part = Part(name, source.task, examples.categories, examples.read, given)
        with _draft(path) as draft:
            draft.write_bytes(pickle.dumps(part))
    made = Plan(examples.count, parts, examples.categories, examples.problems, examples.place)
    with _draft(done) as draft:
        draft.write_bytes(pickle.dumps(made))
    return made


def write(path: str | Path, num_threads: int = 1) -> int:
    """Writes the shard of the file of a `Part`, unless that has been done.

    A picture that cannot be used is left out and named.

    Returns:
        how many pictures it was to hold.

    Raises:
        Unfit: a picture makes the dataset unfit for use.
        OSError or RuntimeError: the shard cannot be written.
    """
    path = Path(path)
    part = pickle.loads(path.read_bytes())
    if _found(path).exists():
        return len(part.entries)
    kind = by_task.KINDS[part.task](part.categories)
    encode = records.features(part.task).serialize_example
    sizes, num_things, counts, num_bytes, problems = [], [], {}, 0, []
    read = functools.partial(_read, part.read)
    with (
        _draft(path, path.parents[1] / str(records.VERSION) / part.name) as draft,
        in_threads(read, part.entries, num_threads) as results,
    ):
        writer = array_record_module.ArrayRecordWriter(str(draft), "group_size:1")
        for record, remarks in results:
            problems += remarks
            if record is None:
                continue
            fields = {name: getattr(record, name) for name in ("image", "image_id", "file_name")}
            data = encode(fields | kind.encode(record.annotation))
            writer.write(data)
            things, seen = kind.tally(record)
            sizes.append(record.size)
            num_things.append(things)
            counts = {name: counts.get(name, 0) + values for name, values in seen.items()}
            num_bytes += len(data)
        writer.close()
    sizes = np.array(sizes, np.int32).reshape(-1, 2)
    found = Found(sizes, np.array(num_things, np.int32), counts, num_bytes, problems)
    with _draft(_found(path)) as draft:
        draft.write_bytes(pickle.dumps(found))
    return len(part.entries)


def write_locally(num_workers: int, parts: Sequence[Path]) -> Iterator[int]:
    """Writes shards, in processes of this machine.

    Args:
        num_workers: how many processes; 0 is one for each core.
        parts: those of a `Plan`.

    Yields:
        how many pictures a shard that is done was to hold.

    Raises:
        as `write`; RuntimeError if a process was ended.
    """
    num_workers = num_workers or os.cpu_count()
    num_left = sum(not _found(path).exists() for path in parts)
    if min(num_workers, num_left) <= 1:
        yield from (write(path, num_workers) for path in parts)
        return
    others = multiprocessing.active_children()
    with workers.starting():
        processes = futures.ProcessPoolExecutor(
            min(num_workers, num_left), multiprocessing.get_context("spawn"), workers.start
        )
        shards = [processes.submit(write, path) for path in parts]
    try:
        yield from (shard.result() for shard in futures.as_completed(shards))
    except BaseException:
        for child in multiprocessing.active_children():
            if child not in others:
                child.kill()
        raise
    finally:
        processes.shutdown(cancel_futures=True)


def beam_writer(flags: Sequence[str]) -> Write:
    """Writes shards on a cluster, with Apache Beam.

    All of its machines need this package, and see the pictures and the shards at the same paths.

    Args:
        flags: of Beam's pipelines, such as `--runner=FlinkRunner`.

    Returns:
        a function of the parts of a `Plan`, which raises a RuntimeError where Beam fails.

    Raises:
        UserError: Beam is not installed.
    """
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise UserError("Apache Beam is missing: pip install 'knet-jax[beam]'") from error

    def write_all(parts: Sequence[Path]) -> list[int]:
        try:
            with beam.Pipeline(options=PipelineOptions([*flags])) as pipeline:
                # Without the shuffle a runner may give all shards to one machine.
                shards = pipeline | beam.Create([*map(str, parts)]) | beam.Reshuffle()
                shards | beam.Map(write)
        except Exception as error:  # whatever a runner, or a machine of it, leads to
            raise RuntimeError(f"{' '.join(flags)}: {one_line(error):.500}") from error
        if missing := [path for path in parts if not _found(path).exists()]:
            raise RuntimeError(
                f"{' '.join(flags)}: {missing[0]} was written nowhere that is seen here"
            )
        return [write(path) for path in parts]

    return write_all


def finish(source: records.Source, made: Plan, unfinished: Path) -> Path:
    """Puts together what is known of the shards, when all are written.

    Returns:
        the folder of the prepared split, to be moved to its place.

    Raises:
        UserError: no picture shows anything.
    """
    shards = [pickle.loads(_found(path).read_bytes()) for path in made.parts]
    names = dict.fromkeys(name for shard in shards for name in shard.counts)
    counts = {name: sum(shard.counts.get(name, 0) for shard in shards) for name in names}
    problems = [*itertools.chain(*(shard.problems for shard in shards)), *made.problems]
    problems = [line if len(line) <= MAX_LINE else f"{line[:MAX_LINE]} …" for line in problems]
    if made.place and not any(values.any() for values in counts.values()):
        first = problems[0] if problems else "nothing is annotated"
        raise UserError(f"{made.place} can be used, the first of {len(problems)} problems: {first}")
    prepared = unfinished / str(records.VERSION)
    columns = [prepared / name for name in records.COLUMNS]
    for path, field in zip(columns, ("sizes", "num_things")):
        np.save(path, np.concatenate([getattr(shard, field) for shard in shards]))
    metadata = {
        "task": source.task,
        "categories": made.categories._asdict(),
        "columns": {name: values.tolist() for name, values in counts.items()},
        "problems": problems,
    }
    lengths, num_bytes = [len(shard.sizes) for shard in shards], sum(s.num_bytes for s in shards)
    tfds.folder_dataset.write_metadata(
        data_dir=prepared,
        features=records.features(source.task),
        split_infos=[tfds.core.SplitInfo(source.split, lengths, num_bytes)],
        disable_shuffling=True,
        metadata=tfds.core.MetadataDict(metadata, digest=records.digest(metadata, columns)),
        check_data=False,
    )
    return prepared


@contextlib.contextmanager
def in_threads(
    function: Callable[[Any], Any], items: Iterable[Any], num_threads: int | None = None
) -> Iterator[Iterator[Any]]:
    """Calls a function with each item in threads, by default as many as cores: an iterator of results."""
    threads = pool.ThreadPool(num_threads)
    try:
        yield threads.imap(function, items)
    finally:
        # A thread that decodes while Python shuts down would abort the process.
        threads.terminate()
        threads.join()


def _found(path: Path) -> Path:
    """Where `write` leaves what the shard of a part holds, last of all."""
    return path.with_suffix(".found")


def _read(read: Callable, entry: tuple[str, Any]) -> tuple[Record | None, list[str]]:
    """The record of an entry, None where it is left out, and what is wrong with it."""
    name, argument = entry
    try:
        name.encode()  # as it will be stored
        record, remarks = read(argument)
    except records.Unfit:
        raise
    except UnicodeEncodeError:
        record, problems = None, [f"{name!a}: its name is not in UTF-8, left out"]
    except Exception as error:  # noqa: BLE001 - whatever files of others lead to
        said = error if isinstance(error, UserError) else repr(error)
        record, problems = None, [f"{name}: {said}, left out"]
    else:
        problems = [f"{name}: {remark}" for remark in remarks]
    return record, [printable(line) for line in problems]


@contextlib.contextmanager
def _draft(path: Path, target: Path | None = None) -> Iterator[Path]:
    """A path beside `path` for what becomes `target`, by default `path`, when it is whole."""
    draft = path.with_name(f"{secrets.token_hex(8)}.draft")
    yield draft
    draft.replace(target or path)
