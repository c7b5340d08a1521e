"""Segments any number of pictures on the machines of a Ray cluster, or on this one.

knet batch photos/ --model runs/demo --output out
knet batch photos.txt --model runs/demo --output out --actors 4 --cpus_per_actor 4
knet batch shards/ --model /shared/mine --output /shared/out --address ray://head:10001

Needs `pip install -e '.[ray]'`. Takes a folder of pictures, a .txt with a path a line, or Parquet (a file,
or a folder of files) with the columns path, or id and bytes. Writes to the output rows/*.parquet, a row
for every picture: id, path, status (good or bad), reason, size (height, width), segments (category_id,
category_name, score, area, bbox, segmentation as COCO's run lengths) and model, a digest; at the end
summary.json. Started again after whatever ended it, it does the pictures that have no row yet.

A picture that cannot be read, or ends its process twice, is bad. Every key of config.eval is a flag, such
as --config.eval.instance_threshold=0.5; rows of another config or model need another output.

Exit status: 0, or 3 where pictures are bad.
"""

from __future__ import annotations

from argparse import Namespace

from knet_jax.app.batch import CHUNK, CPUS_PER_ACTOR, MAX_BAD, SUMMARY, predict_batch
from knet_jax.cli.commandline import SOME_SKIPPED, Parser, number
from knet_jax.system.errors import UserError

MOST_REASONS = 10
"""How many reasons are printed."""


def add_flags(parser: Parser) -> None:
    parser.add_argument("images", nargs="*", metavar="IMAGES", help="what to segment")
    parser.picture_flags()
    parser.flag("address", "of a Ray cluster; default: $RAY_ADDRESS, else Ray is started here")
    parser.flag(
        "actors",
        "how many processes segment; default: one a GPU, else as many as the CPUs suffice for",
        type=number(int, 1),
    )
    parser.flag("cpus_per_actor", "CPUs of each", CPUS_PER_ACTOR, type=number(int, 1))
    parser.flag("chunk", "pictures that an actor gets at a time", CHUNK, type=number(int, 1))
    parser.flag(
        "max_bad", "share of bad pictures beyond which it stops", MAX_BAD, type=number(float, 0, 1)
    )
    parser.switch("overlays", "also draw the segments, as overlays/NAME.jpg")
    parser.checkpoint_flags()


def main(args: Namespace) -> int:
    if len(args.images) != 1:
        raise UserError("accepted: one IMAGES, a folder, a .txt or a .parquet")
    summary = predict_batch(
        args.model,
        args.images[0],
        args.output,
        address=args.address,
        actors=args.actors,
        cpus_per_actor=args.cpus_per_actor,
        chunk=args.chunk,
        max_bad=args.max_bad,
        max_megapixels=args.max_megapixels,
        overlays=args.overlays,
        checkpoint=args.checkpoint,
        ema=args.ema,
        batch_size=args.batch_size,
        overrides=args.overrides,
    )
    counts = {"good": summary.good, "bad": summary.bad}
    shown = [*summary.reasons.items()][:MOST_REASONS]
    for name, count in [*counts.items(), *((f"  {reason}", count) for reason, count in shown)]:
        print(f"{count:10}  {name}")
    print(
        f"audit: {summary.pictures} pictures = {summary.good} good + {summary.bad} bad; "
        f"{summary.new} new in {summary.seconds:.0f} s; wrote {args.output}/{SUMMARY}"
    )
    return SOME_SKIPPED if summary.bad else 0
