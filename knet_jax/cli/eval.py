"""Evaluates a run: PQ, AP or mIoU of its best checkpoint on the validation split.

knet eval --workdir runs/coco_panoptic
knet eval --workdir runs/coco_panoptic --checkpoint latest --limit 500 --results
knet eval --workdir runs/coco_panoptic --rounds
knet eval --workdir runs/coco_panoptic --analysis

Reads everything from the workdir, prints the tables, and writes metrics.json and pictures/ to the
workdir (or to --output). --analysis looks inside: it writes a page, analysis/index.html, that shows what
each kernel does, the masks after every update, the worst pictures and what is wrong in them, which classes
are confused, and quality by size, number and score; its numbers are in analysis/analysis.json.
"""

from __future__ import annotations

from argparse import Namespace

from knet_jax.cli.commandline import Parser, number
from knet_jax.system.processes import joined
from knet_jax.training.evaluation import evaluate


def add_flags(parser: Parser) -> None:
    parser.flag("workdir", "the folder of a trained run", required=True)
    parser.checkpoint_flags()
    parser.flag("limit", "evaluate only the first so many pictures", type=number(int, 1))
    parser.flag("output", "where results go; default: the workdir")
    parser.switch(
        "results", "write the results in files, as the test servers of COCO and ADE20K take them"
    )
    parser.switch("boundary", "also boundary AP, for the task instance")
    parser.switch("rounds", "also evaluate the masks of every earlier update")
    parser.switch(
        "analysis", "also look inside, and write analysis/index.html, a page for a browser"
    )
    parser.process_flags()


def main(args: Namespace) -> None:
    with joined(args.coordinator, args.num_processes, args.process_id, args.heartbeat):
        evaluate(
            args.workdir,
            checkpoint=args.checkpoint,
            ema=args.ema,
            limit=args.limit,
            output=args.output,
            results=args.results,
            rounds=args.rounds,
            boundary=args.boundary,
            analysis=args.analysis,
            overrides=args.overrides,
        )
