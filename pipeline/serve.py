"""Serve a model over HTTP from its file alone: an image in, its label map out.

    POST /label     the bytes of an image file -> a palette PNG of the upright image's size, class indices, 255 = void
    GET  /          JSON: the classes with their colours, and the limits

What is no image, too large or asked for wrongly gets a 4xx and {"error": "one line"}.
"""

from __future__ import annotations

import argparse
import sys
import threading
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.formats import photo
from pipeline.formats.label_images import indexed
from pipeline.predict import device_named, machine_options, scales_of
from pipeline.runtime.cli import command_parser, run_cli
from refinenet.config import Protocol
from refinenet.data import IGNORE_INDEX
from refinenet.errors import UserError

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.datastructures import QueryParams
    from starlette.requests import Request

    from refinenet.inference.predictor import Predictor

_EXAMPLES = """\
examples:
  refinenet serve models/voc-res101.safetensors
  curl --data-binary @photo.jpg 'http://127.0.0.1:5001/label?scales=0.8,1&flip=true' --output label.png

It takes a .safetensors that `train` made or an .onnx of `export`, 8-bit integers included. Images are labelled one at a
time; who waits behind too many others gets a 503. There is no password and no encryption: whoever opens it to others
(--host 0.0.0.0) puts a proxy in front.
"""
MEGA = 1_000_000
WAITING = 32  # requests at once
MOST_SCALES = 8


class TooLargeError(UserError):
    """An image of more bytes or pixels than the server takes."""


def application(predictor: Predictor, most_bytes: int, most_pixels: int) -> Starlette:
    """Return the application that labels with `predictor`; larger images get a 413."""
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    alone = threading.Lock()  # PyTorch uses all cores for one image

    def labelled(data: bytes, protocol: Protocol) -> bytes:
        png = BytesIO()
        with alone:
            image = photo.decoded(BytesIO(data), "image", most_pixels)
            label = predictor.label_photo(image, protocol, "image")
        indexed(label, predictor.palette).save(png, "png")
        return png.getvalue()

    async def label(request: Request) -> Response:
        protocol = _protocol(request.query_params)
        data = bytearray()
        async for chunk in request.stream():  # its length need not be told, or be true
            data += chunk
            if len(data) > most_bytes:
                raise TooLargeError(f"image: more than {most_bytes} bytes")
        return Response(await run_in_threadpool(labelled, bytes(data), protocol), media_type="image/png")

    async def about(request: Request) -> Response:
        named = enumerate(zip(predictor.classes, predictor.palette, strict=True))
        return JSONResponse(
            {
                "model": predictor.path.name,
                "dataset": predictor.about.get("dataset"),
                "classes": [{"index": index, "name": name, "colour": colour} for index, (name, colour) in named],
                "void": IGNORE_INDEX,
                "most_bytes": most_bytes,
                "most_pixels": most_pixels,
            }
        )

    async def refused(request: Request, error: Exception) -> Response:
        return JSONResponse({"error": str(error)}, 413 if isinstance(error, TooLargeError | photo.PixelsError) else 400)

    routes = [Route("/label", label, methods=["POST"]), Route("/", about)]
    return Starlette(routes=routes, exception_handlers={UserError: refused})


def _protocol(query: QueryParams) -> Protocol:
    """Read scales=0.8,1&flip=true. Raises UserError for anything else."""
    if unknown := sorted(set(query) - {"scales", "flip"}):
        raise UserError(f"{unknown[0]}: not known here, expected scales=0.8,1 or flip=true")
    try:
        scales = scales_of(query.get("scales", "1"))
    except argparse.ArgumentTypeError as error:
        raise UserError(f"scales: {error}") from None
    if len(scales) > MOST_SCALES:
        raise UserError(f"scales: {len(scales)} of them, expected {MOST_SCALES} at most")
    if (flip := query.get("flip", "false").lower()) not in ("true", "false"):
        raise UserError(f"flip: {flip!r}, expected true or false")
    return Protocol(scales, flip == "true")


def run(options: argparse.Namespace) -> None:
    """Serve until Ctrl-C or SIGTERM."""
    import socket

    import torch
    import uvicorn

    from refinenet.inference.predictor import Predictor

    if options.threads:
        torch.set_num_threads(options.threads)
    predictor = Predictor(options.model, device_named(options.device))
    app = application(predictor, round(options.megabytes * MEGA), round(options.megapixels * MEGA))
    taken = socket.socket()
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        taken.bind((options.host, options.port))
        taken.listen()  # who asks as soon as the line below is printed waits until the first answer
    except OSError as error:
        raise UserError(f"{options.host}:{options.port}: {error.strerror}, expected a free port; set --port") from None
    host, port = taken.getsockname()[:2]
    print(
        f"{options.model}: http://{host}:{port}/label takes images, http://{host}:{port}/ tells the classes", flush=True
    )
    config = uvicorn.Config(app, log_level="warning", limit_concurrency=WAITING, timeout_graceful_shutdown=30)
    uvicorn.Server(config).run([taken])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    line = command_parser("serve", __doc__, _EXAMPLES)
    line.add_argument("model", type=Path, metavar="MODEL", help="a model that `train` made, or an .onnx of `export`")
    line.add_argument("--port", type=int, default=5001, help="default: 5001; 0: any that is free")
    line.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1, this machine only")
    line.add_argument("--megabytes", type=float, default=20, metavar="N", help="of an image file, at most; default: 20")
    line.add_argument("--megapixels", type=float, default=50, metavar="N", help="of an image, at most; default: 50")
    machine_options(line)
    options = line.parse_args(arguments)
    return run_cli(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
