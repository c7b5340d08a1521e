"""What `knet batch` costs beside a plain loop of the segmenter, and what is left after kills.

python benchmarks/batch.py --folder /tmp/batch --pictures 1000
python benchmarks/batch.py --folder /tmp/batch --pictures 2000 --broken 20 --kills 5

Draws pictures of 384 to 512 pixels a side, some of them broken, for the demo's network with random
weights; segments them in one process by `Segmenter.stream`, and by `knet batch`, which is killed (SIGKILL
to all its processes) at random; and compares the segments. Both are timed from the command to its end.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import cv2
import tiny_runs

import knet_jax
from knet_jax.data.sources.shapes import draw

SIDES = (384, 512)
NETWORK = (  # that of the demo, at a canvas of its pictures
    "--config.data.canvas=(512, 512)",
    "--config.data.short_side=(384, 512)",
    "--config.data.long_side=512",
    "--config.model.channels=64",
    "--config.model.ffn_channels=128",
    "--config.model.num_heads=4",
    "--config.model.num_proposals=20",
    "--config.model.num_stages=3",
    "--config.model.backbone.width=16",
)


def prepare(folder: Path, num_pictures: int, num_broken: int) -> None:
    """Draws the pictures, of which some are cut off, and writes the model."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "pictures").mkdir(parents=True)
    broken = set(random.sample(range(num_pictures), num_broken))
    for i in range(num_pictures):
        data = cv2.imencode(".jpg", draw("batch", i, SIDES).image[..., ::-1])[1].tobytes()
        name = f"{'broken' if i in broken else 'good'}_{i:06}.jpg"
        (folder / "pictures" / name).write_bytes(data[: len(data) // 2] if i in broken else data)
    tiny_runs.write(folder / "model", "panoptic", *NETWORK)


def loop(folder: Path) -> None:
    """Segments all pictures that are not broken, one after the other."""
    paths = sorted((folder / "pictures").glob("good_*"))
    segmenter = knet_jax.load(folder / "model")
    segments = [result.to_coco()["segments_info"] for result in segmenter.stream(paths)]
    (folder / "loop.json").write_text(json.dumps({p.name: s for p, s in zip(paths, segments)}))


def batch(folder: Path, words: list[str]) -> subprocess.Popen:
    """Starts the command, with processes that can be killed together."""
    flags = ["--model", folder / "model", "--output", folder / "output", *words]
    return subprocess.Popen(
        [sys.executable, "-m", "knet_jax.cli.main", "batch", folder / "pictures", *flags],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )


def rows_of(folder: Path) -> Iterator[dict]:
    """The rows that there are."""
    from pyarrow.parquet import read_table

    for file in sorted((folder / "output/rows").glob("*.parquet")):
        yield from read_table(file).to_pylist()


def main() -> None:
    """Runs the comparison that the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="emptied, but for --keep")
    parser.add_argument("--pictures", type=int, default=1000)
    parser.add_argument("--broken", type=int, default=0)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument(
        "--longest", type=float, default=60, help="seconds from a start to its kill"
    )
    parser.add_argument("--keep", action="store_true", help="take the pictures that there are")
    parser.add_argument("--loop", action="store_true", help="run the plain loop and nothing else")
    args, words = parser.parse_known_args()
    if args.loop:
        return loop(args.folder)
    if not args.keep:
        prepare(args.folder, args.pictures, args.broken)
    shutil.rmtree(args.folder / "output", ignore_errors=True)

    start = time.monotonic()
    subprocess.run([sys.executable, __file__, "--folder", args.folder, "--loop"], check=True)
    plain = time.monotonic() - start

    for _ in range(args.kills):
        process = batch(args.folder, words)
        time.sleep(random.uniform(0, args.longest))
        os.killpg(process.pid, signal.SIGKILL)
        print(f"\nkilled, {sum(1 for _ in rows_of(args.folder))} rows", flush=True)
        assert process.wait() == -signal.SIGKILL, "it was done before"
    start = time.monotonic()
    status = batch(args.folder, words).wait()
    seconds = time.monotonic() - start

    rows = list(rows_of(args.folder))
    wanted = json.loads((args.folder / "loop.json").read_text())
    found = {row["id"]: row["segments"] for row in rows if row["status"] == "good"}
    fields = ("category_id", "score", "area", "bbox", "segmentation")
    same = found.keys() == wanted.keys() and all(
        [[segment[field] for field in fields] for segment in found[name]]
        == [[segment[field] for field in fields] for segment in segments]
        for name, segments in wanted.items()
    )
    print(
        f"status {status}; {len(rows)} rows of {len({row['id'] for row in rows})} pictures, "
        f"{len(rows) - len(found)} with a reason; segments are those of the loop: {same}\n"
        f"loop {plain:.1f} s, knet batch {seconds:.1f} s: {seconds / plain:.3f}"
    )


if __name__ == "__main__":
    main()
