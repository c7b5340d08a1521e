"""Turns maps of classes and of instances into COCO's layout, panoptic and instance.

knet from-masks --images photos/train --class_maps classes/train \\
    --instance_maps instances/train --names classes.txt --things cell,fiber --root DATA --split train

A map is a PNG of one index a pixel, named like its picture (and in the same subfolder). Line i of
--names, counted from 0, names the class whose pixels hold i. In a map of instances each thing has a
number of its own; things with the number 0 are a crowd. Without --instance_maps every connected
region of a thing class is one thing.

Writes ROOT/annotations/panoptic_SPLIT.json with its PNG files, and ROOT/annotations/instances_SPLIT.json;
pictures go to ROOT/SPLIT, as links where the disk allows.

Exit status: 0, or 3 where pictures were left out; they are named.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from knet_jax.cli.commandline import SOME_SKIPPED, Parser, number
from knet_jax.data.from_masks import write_panoptic_dataset


def add_flags(parser: Parser) -> None:
    parser.reads_config = False
    parser.flag("images", "folder of pictures", required=True)
    parser.flag("class_maps", "folder of PNG files: the class of each pixel", required=True)
    parser.flag("instance_maps", "folder of PNG files: the thing of each pixel; default: regions")
    parser.flag("names", "text file with the name of a class on every line", required=True)
    parser.flag("things", "the classes whose things are told apart: NAME,NAME", required=True)
    parser.flag("void", "the index of pixels of unknown class", 255, type=number(int))
    parser.flag("root", "the dataset to write, config.data.root of the training", required=True)
    parser.flag("split", "what it is: train, val", required=True)


def main(args: Namespace) -> int:
    problems = write_panoptic_dataset(
        images=Path(args.images),
        class_maps=Path(args.class_maps),
        instance_maps=Path(args.instance_maps) if args.instance_maps else None,
        names=Path(args.names),
        things=[name.strip() for name in args.things.split(",")],
        void=args.void,
        root=Path(args.root),
        split=args.split,
    )
    for problem in problems:
        print(problem)
    return SOME_SKIPPED if problems else 0
