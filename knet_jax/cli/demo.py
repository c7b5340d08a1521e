"""A page in the browser: drop a picture, see its segments, hover their names, save them.

knet demo --model runs/demo
knet demo --model runs/demo --port 8000 --max_megapixels 12

Needs `pip install -e '.[demo]'`. The page is for this machine alone, at http://127.0.0.1:7860, unless
--host says otherwise; with --host 0.0.0.0 everyone who reaches the machine may use it. Neither the
page nor the server asks the network for anything. Pictures are kept until the server ends, however
it does, for at most an hour. Ctrl-C ends it.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
from argparse import Namespace
from pathlib import Path
from typing import Any, NoReturn

from knet_jax.app.page.page import make_app
from knet_jax.app.segmenter import load
from knet_jax.cli.commandline import Parser, number
from knet_jax.segmentation.image_files import MAX_MEGAPIXELS
from knet_jax.system.errors import UserError
from knet_jax.system.output_files import temporary_folder
from knet_jax.system.signals import Preempted


def listen(host: str, port: int) -> socket.socket:
    """A socket of this address. Raises UserError where that cannot be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno > 0 else error.strerror
        raise UserError(
            f"--host={host} --port={port}: {reason}; --port=0 takes a free port"
        ) from error


def address(listener: socket.socket) -> str:
    """The address at which a browser finds a socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def end(signum: int, *_: Any) -> NoReturn:
    """Ends the command in order, as a handler of a signal."""
    raise Preempted("ended", signum)


def add_flags(parser: Parser) -> None:
    parser.flag("model", "folder of a run, or file or folder of a conversion", required=True)
    parser.checkpoint_flags()
    parser.flag("host", "address to listen at; 0.0.0.0 is all of this machine", "127.0.0.1")
    parser.flag(
        "port", "port to listen at; 0 is any that is free", 7860, type=number(int, 0, 65535)
    )
    parser.flag(
        "names", "names of this machine in a browser's address, as of a proxy: NAME,NAME", ""
    )
    parser.flag(
        "max_megapixels",
        "of a picture; larger ones are refused",
        MAX_MEGAPIXELS,
        type=number(float, 0.01, 178),
    )
    parser.flag(
        "max_upload_mb", "MiB of a file; larger ones are refused", 50, type=number(int, 1, 4096)
    )


def main(args: Namespace) -> None:
    signal.signal(signal.SIGTERM, end)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        # The server, which hears SIGTERM only, ends with it.
        signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGTERM))
    with temporary_folder() as folder:
        os.environ |= {
            "GRADIO_TEMP_DIR": folder,
            "GRADIO_ANALYTICS_ENABLED": "False",
            "HF_HUB_OFFLINE": "1",
        }
        try:
            import gradio  # noqa: F401
            import uvicorn
        except ImportError as error:
            raise UserError("the page needs gradio: pip install -e '.[demo]'") from error
        with listen(args.host, args.port) as listener:
            segmenter = load(args.model, args.checkpoint, args.ema, overrides=args.overrides)
            name = Path(args.model).resolve().name
            hosts = [args.host, socket.gethostname(), *filter(None, args.names.split(","))]
            app = make_app(segmenter, name, args.max_megapixels, args.max_upload_mb, hosts)
            print(f"{name} ({segmenter.task}, step {segmenter.step}): {address(listener)}")
            print("Ctrl-C ends it", flush=True)
            server = uvicorn.Server(
                uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
            )
            # Connections that are cut off at the end are no errors.
            logging.getLogger("uvicorn.error").addFilter(lambda record: not server.should_exit)
            server.run(sockets=[listener])
