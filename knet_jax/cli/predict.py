"""Segments pictures and videos with a trained model.

knet predict photo.jpg --model runs/demo --output out
knet predict pictures/ more/1.jpg --model runs/demo --output out --threshold 0.5
knet predict clip.mp4 --model runs/demo --output out --track
knet predict data/coco/test2017 --model runs/mine --output out \\
    --image_info data/coco/annotations/image_info_test-dev2017.json

Takes pictures, videos, and folders with those that they hold, subfolders included. Writes to the
output, as they come: overlays/ (the pictures under their segments), the results in COCO's format
(panoptic.json and panoptic/*.png, instance.json, or semantic.json and semantic/*.png), images.json
(which id is which file) and contact_sheet.jpg; of a video videos/NAME.mp4 and videos/NAME.json. With
--track the things of a video have a number, and a color, that they keep through all of it.

Exit status: 0, or 3 where files could not be read, or not to their end; they are named.
"""

from __future__ import annotations

from argparse import Namespace

from knet_jax.app.predict import predict_files
from knet_jax.cli.commandline import SOME_SKIPPED, Parser, number
from knet_jax.system.errors import UserError


def add_flags(parser: Parser) -> None:
    parser.add_argument("paths", nargs="*", metavar="PICTURE|FOLDER|VIDEO", help="what to segment")
    parser.picture_flags()
    parser.flag(
        "threshold",
        "least score of a thing; default: the config's, else 0.3",
        type=number(float, 0, 1),
    )
    parser.switch("track", "give the things of videos identities that stay from frame to frame")
    parser.checkpoint_flags()
    parser.flag(
        "image_info",
        "JSON in COCO's form: only its pictures are taken, under its ids; default: all, as 1, 2 ...",
    )


def main(args: Namespace) -> int:
    if not args.paths:
        raise UserError("no picture is named: PICTURE|FOLDER|VIDEO … --model DIR")
    problems = predict_files(
        args.model,
        args.paths,
        args.output,
        threshold=args.threshold,
        checkpoint=args.checkpoint,
        ema=args.ema,
        batch_size=args.batch_size,
        image_info=args.image_info,
        max_megapixels=args.max_megapixels,
        track=args.track,
        overrides=args.overrides,
    ).problems
    return SOME_SKIPPED if problems else 0
