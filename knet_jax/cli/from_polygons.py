"""Turns polygons of LabelMe and YOLO into COCO's instance layout.

knet from-polygons --images photos/train --labels photos/train --root DATA --split train
knet from-polygons --images images/train --labels labels/train --names data.yaml --root DATA --split train

Each picture has a file of its name in --labels: LabelMe's .json, or YOLO's .txt of polygons.
--names is YOLO's data.yaml or a text file with a class on every line; without it the classes are
those of LabelMe's files, which must then be the same in every split.

Writes ROOT/annotations/instances_SPLIT.json; pictures go to ROOT/SPLIT, as links where the disk allows.

Exit status: 0, or 3 where pictures or annotations were left out; they are named.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from knet_jax.cli.commandline import SOME_SKIPPED, Parser
from knet_jax.data.from_polygons import write_instance_dataset


def add_flags(parser: Parser) -> None:
    parser.reads_config = False
    parser.flag("images", "folder of pictures", required=True)
    parser.flag("labels", "folder of their annotations", required=True)
    parser.flag("names", "data.yaml, or a text file with the name of a class on every line")
    parser.flag("root", "the dataset to write, config.data.root of the training", required=True)
    parser.flag("split", "what it is: train, val", required=True)


def main(args: Namespace) -> int:
    images, labels, root = map(Path, (args.images, args.labels, args.root))
    names = Path(args.names) if args.names else None
    problems = write_instance_dataset(images, labels, root, args.split, names)
    for problem in problems:
        print(problem)
    return SOME_SKIPPED if problems else 0
