"""Writes drawn pictures that no network was trained on, to try a model of shapes on.

knet shapes FOLDER
knet shapes FOLDER --video

A video is FOLDER/shapes.mp4, four seconds of shapes that cross, hide each other, go and return.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from knet_jax.cli.commandline import Parser
from knet_jax.data.sources.shapes import VIDEO_SIZE, draw_video, write_samples
from knet_jax.system.errors import UserError


def add_flags(parser: Parser) -> None:
    parser.reads_config = False
    parser.add_argument("folder", nargs="*", metavar="FOLDER", help="created if need be")
    parser.switch("video", "write a video, and no pictures")


def main(args: Namespace) -> None:
    if len(args.folder) != 1:
        raise UserError("accepted: FOLDER, where the pictures go")
    folder = Path(args.folder[0])
    if not args.video:
        return write_samples(folder)
    from knet_jax.app.videos import FRAMES_PER_SECOND, VideoWriter  # JAX takes seconds

    folder.mkdir(parents=True, exist_ok=True)
    with VideoWriter(folder / "shapes.mp4", FRAMES_PER_SECOND, VIDEO_SIZE) as video:
        for drawing in draw_video(seed=216, num_frames=100):
            video.add(drawing.image)
    print(f"wrote {folder}/shapes.mp4")
