"""Segments pictures and videos with a trained model.

python predict.py photo.jpg --model runs/demo --output out
python predict.py pictures/ more/1.jpg --model runs/demo --output out --threshold 0.5
python predict.py clip.mp4 --model runs/demo --output out
python predict.py data/coco/test2017 --model runs/mine --output out \
    --image_info data/coco/annotations/image_info_test-dev2017.json

Takes pictures, videos, and folders with those that they hold, subfolders included. Writes to the
output, as they come: overlays/ (the pictures under their segments), the results in COCO's format
(panoptic.json and panoptic/*.png, instance.json, or semantic.json and semantic/*.png), images.json
(which id is which file) and contact_sheet.jpg; of a video videos/NAME.mp4 and videos/NAME.json.

Exit status: 0, or 3 where files could not be read, or not to their end; they are named.
"""

from __future__ import annotations

import sys
from pathlib import Path

import jax
from absl import flags

from knet_jax.app.predictions import (
    Predictions,
    find_ids,
    find_sources,
    predict_pictures,
)
from knet_jax.app.segmenter import load
from knet_jax.app.videos import predict_video
from knet_jax.cli.commandline import CommandLine, run
from knet_jax.saved.checkpoints import check_writable
from knet_jax.system.errors import UserError
from knet_jax.system.signals import stop_when_asked

MODEL = flags.DEFINE_string(
    "model", None, "folder of a run of train.py, or file or folder of a conversion"
)
OUTPUT = flags.DEFINE_string("output", "predictions", "folder where results go")
THRESHOLD = flags.DEFINE_float(
    "threshold", None, "least score of a thing; default: the config's, else 0.3", 0, 1
)
CHECKPOINT = flags.DEFINE_string("checkpoint", "best", "best, latest, or the number of a step")
EMA = flags.DEFINE_boolean("ema", False, "take the moving average of the parameters")
BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", None, "pictures at a time; default: 1 on a CPU, else 8", 1
)
IMAGE_INFO = flags.DEFINE_string(
    "image_info",
    None,
    "JSON in COCO's form: of pictures its own alone are taken, under its ids; default: all, as 1, 2 ...",
)

SOME_SKIPPED = 3
"""Exit status where files could not be read or videos not be written."""


def main(command: CommandLine) -> None:
    if MODEL.value is None:
        raise UserError("--model is missing: the folder of a run of train.py")
    if not command.paths:
        raise UserError("no picture is named: predict.py PICTURE|FOLDER|VIDEO … --model DIR")
    output = Path(OUTPUT.value)
    pictures, videos = find_sources(command.paths, output)
    ids = None
    if IMAGE_INFO.value and pictures:
        ids, num_listed = find_ids(Path(IMAGE_INFO.value), pictures)
        print(
            f"{len(ids)} of {len(pictures)} pictures are among the {num_listed} of {IMAGE_INFO.value}"
        )
        pictures = [picture for picture in pictures if picture.name in ids]
    check_writable(next(path for path in (output, *output.parents) if path.exists()))
    print(f"opening {MODEL.value}; the first picture of a size compiles", flush=True)
    segmenter = load(
        MODEL.value,
        CHECKPOINT.value,
        EMA.value,
        batch_size=BATCH_SIZE.value,
        overrides=command.overrides,
    )
    check_writable(output)
    print(
        f"{len(pictures)} pictures and {len(videos)} videos, {segmenter.task} model of step "
        f"{segmenter.step}, {jax.devices()[0].device_kind}"
    )
    problems = []
    with stop_when_asked() as stop:
        if pictures:
            with Predictions(output, segmenter.task, segmenter.categories, ids) as predictions:
                problems += predict_pictures(
                    segmenter, pictures, predictions, THRESHOLD.value, stop
                )
            print(predictions.table())
        for video in videos:
            if problem := predict_video(segmenter, video, output, THRESHOLD.value, stop):
                print(f"problem: {problem}", file=sys.stderr)
                problems.append(problem)
    print(f"wrote {output}/" + (f", problems with {len(problems)} files" if problems else ""))
    if problems:
        sys.exit(SOME_SKIPPED)


if __name__ == "__main__":
    run(main, takes_paths=True)
