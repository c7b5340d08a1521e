"""Makes a model of a checkpoint of PyTorch, and a checkpoint in PyTorch's names of a model.

knet convert knet_r50.pth --config coco_panoptic --output models/knet_r50
knet convert knet_r50.pth --config coco_panoptic --output models/mine \\
    --new_classes --categories mine.json --config.model.num_things=12 --config.model.num_stuff=5
knet convert models/knet_r50 --output knet_r50.safetensors
knet convert runs/mine --output models/other --new_classes --config.model.num_things=12

A checkpoint is pth, safetensors or npz: of K-Net, in the names of its authors or of OpenMMLab, or of
an ImageNet backbone, of torchvision, timm, OpenMMLab or the authors of Swin. Torch is not needed, and
nothing in the file is run. The config must be that of the network in the file. The model is a folder,
as a training run leaves one, for evaluation, predictions and further training; conversion.json in it
says which tensor went where. A model may stand in the place of the checkpoint, for other classes; it
has a config of its own. The file .safetensors of a model is a model too: all that opens such a folder
opens it.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from knet_jax.cli.commandline import Parser
from knet_jax.config.files import CONVERSION_NAME
from knet_jax.saved.convert import export_weights, import_weights, report_table
from knet_jax.saved.weight_files import READERS
from knet_jax.system.errors import UserError


def add_flags(parser: Parser) -> None:
    parser.add_argument("paths", nargs="*", metavar="CHECKPOINT|MODEL", help="what to convert")
    parser.config_flag()
    parser.flag("output", "the model to be made, a folder; of a model, a .safetensors")
    parser.flag("entry", "which set of weights, such as ema_state_dict or ema_buffers")
    parser.flag("categories", "names the classes: COCO's JSON, or a text, one a line")
    parser.switch("new_classes", "what belongs to the classes starts anew")
    parser.switch("partial", "whatever does not fit starts anew, or is left over")
    parser.flag("checkpoint", "of a model: best, latest, or the number of a step; default: best")
    parser.switch("ema", "of a model: the moving average of the parameters")


def main(args: Namespace) -> None:
    """Makes a file where --output has the name of one, else a folder."""
    if len(args.paths) != 1 or not args.output:
        raise UserError(
            "accepted: CHECKPOINT --config configs/FILE.py --output MODEL, "
            "or MODEL --output FILE.safetensors (--help tells more)"
        )
    source, output = Path(args.paths[0]), Path(args.output)
    checkpoint = args.checkpoint or "best"
    for name in ("entry",) if source.is_dir() else ("checkpoint", "ema"):
        if getattr(args, name):
            kind = "a file" if source.is_dir() else "a model"
            raise UserError(f"--{name} is for {kind}, which {source} is not")
    if output.suffix in READERS:
        names = ("config", "categories", "new_classes", "partial")
        unused = [f"--{name}" for name in names if getattr(args, name)] + args.overrides
        if unused:
            raise UserError(f"{unused[0]} is for a folder as --output, which {output} is not")
        print(export_weights(source, output, checkpoint, args.ema))
        return
    report = import_weights(
        source,
        args.config,
        output,
        args.overrides,
        entry=checkpoint if source.is_dir() else args.entry or "",
        ema=args.ema,
        categories_file=Path(args.categories) if args.categories else None,
        new_classes=args.new_classes,
        partial=args.partial,
    )
    print(report_table(report))
    print(f"wrote {output}, which {output / CONVERSION_NAME} describes")
