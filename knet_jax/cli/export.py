"""Takes a model away as one file that runs without this project.

knet export runs/demo
knet export runs/demo --format onnx --output shapes.onnx
knet export runs/mine --format onnx --size 480,640 --batch 1

The file holds the weights, the resizing of pictures of any size, the network, and the way from masks
to a panoptic map, instances or a label map at the picture's own size; names of classes and the config
lie beside them. docs/exporting.md shows how to run it.
"""

from __future__ import annotations

import re
from argparse import ArgumentTypeError, Namespace

from knet_jax.cli.commandline import Parser, number
from knet_jax.export.formats import FORMATS
from knet_jax.export.model_file import export_model
from knet_jax.segmentation.image_files import MAX_MEGAPIXELS, read_image
from knet_jax.system.errors import UserError


def add_flags(parser: Parser) -> None:
    parser.add_argument("paths", nargs="*", metavar="MODEL", help="folder or file of a model")
    parser.flag("format", "what kind of file", "stablehlo", choices=list(FORMATS))
    parser.flag(
        "output", "the file; default: model.stablehlo.npz or model.onnx in the model's folder"
    )
    parser.flag("size", "height,width of all pictures; default: any", type=parse_size)
    parser.flag("batch", "number of pictures at a time; default: any", type=number(int, 1, 1024))
    parser.flag("image", "picture to try the file on; default: one is drawn")
    parser.checkpoint_flags()


def main(args: Namespace) -> None:
    if len(args.paths) != 1:
        raise UserError("name one model: the folder of a run, or of a conversion, or its file")
    path, model, share = export_model(
        args.paths[0],
        args.output,
        args.format,
        size=args.size,
        batch=args.batch,
        image=read_image(args.image) if args.image else None,
        checkpoint=args.checkpoint,
        ema=args.ema,
        overrides=args.overrides,
    )
    print(f"wrote {path}: {model.config.task}, {len(model.categories.names)} classes, ", end="")
    print(f"step {model.step}, {path.stat().st_size / 2**20:.1f} MiB")
    print(f"tried on a picture: its segments overlap those of the model by {share:.2%}")


def parse_size(text: str) -> tuple[int, int]:
    """`480,640` -> (480, 640). Raises ArgumentTypeError where a text is something else."""
    sides = re.fullmatch(r"([1-9]\d{0,7}),([1-9]\d{0,7})", text, re.ASCII)
    if not sides or int(sides[1]) * int(sides[2]) > MAX_MEGAPIXELS * 1e6:
        raise ArgumentTypeError(
            f"{text} is not accepted; accepted: height and width, such as 480,640, "
            f"of at most {MAX_MEGAPIXELS} megapixels"
        )
    return int(sides[1]), int(sides[2])
