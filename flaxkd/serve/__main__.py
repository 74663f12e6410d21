"""Serves models over HTTP: a page to draw on, OpenAI's images API, and that of AUTOMATIC1111's web UI.

    python -m flaxkd.serve                                                        # the embedded teacher
    python -m flaxkd.serve --model teacher= --model small=runs/small              # and a student beside it

Then open http://127.0.0.1:7860. Requests that wait are drawn together. SIGTERM and Ctrl-C finish what is begun. Needs
`pip install -e ".[serve]"`.
"""

import argparse
import os
import re
from pathlib import Path

from flaxkd.machine import command, dtypes

TOKEN = "FLAXKD_TOKEN"
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def named(model: str) -> tuple[str, str | None]:
    """("small", "runs/small") of "runs/small" and of "small=runs/small"; ("teacher", None) of "teacher=".

    A LoRA file is named without its scale: "ink" of "files/ink.safetensors:0.8"."""
    name, equals, path = model.partition("=")
    if not equals or os.path.exists(os.path.expanduser(model)):
        name, path = Path(re.sub(r":-?[\d.]+$", "", model)).stem, model
    if not re.fullmatch(r"[\w .+:-]{1,80}", name):
        raise ValueError(f"--model {model}: give it a name of letters, digits and spaces, as --model NAME={path}")
    return name, path or None


def size(text: str) -> tuple[int, int]:
    """(512, 768) of "512x768"."""
    if not (match := re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)):
        raise argparse.ArgumentTypeError(f"{text!r} is no size: WIDTHxHEIGHT, such as 512x768")
    return int(match[1]), int(match[2])


def load(args: argparse.Namespace) -> dict:
    """{name: Served} of all models, and of each with each adapter."""
    from flaxkd.drawing.pipeline import Pipeline
    from flaxkd.serve.requests import Served

    found = {}
    for name, path in map(named, args.model or ["teacher="]):
        _check_new(name, found, "--model NAME=DIR")
        pipeline = Pipeline.from_pretrained(path, args.dtype, vae=args.vae)
        for adapter, file in [("", None), *map(named, args.lora)]:
            own = f"{name} + {adapter}" if adapter else name
            _check_new(own, found, "--lora NAME=FILE")
            found[own] = Served.of(own, pipeline.with_lora(file) if file else pipeline, tuple(args.size))
    return found


def _check_new(name: str, found: dict, remedy: str) -> None:
    if name in found:
        raise ValueError(f"two models are called {name!r}: name them, as {remedy}")


@command.reported()
def main(arguments: list[str] | None = None) -> None:
    parser = command.parser("flaxkd.serve", __doc__)
    add = parser.add_argument
    models = f"{command.MODEL}; default: the embedded teacher, which is also NAME= alone; repeat for several"
    command.add(parser, "model", action=command.Several, metavar="[NAME=]MODEL", help=models)
    command.add(parser, "vae")
    adapters = "LoRA file, served as a further model beside each --model; repeat for several"
    add("--lora", action="append", default=[], metavar="[NAME=]FILE", help=adapters)
    add("--host", default="127.0.0.1", help="address to listen on; default: %(default)s, this machine alone")
    add("--port", type=int, default=7860, help="default: %(default)s")
    add("--token", default=os.environ.get(TOKEN), help=f"asked of every request; default: {TOKEN} of the environment")
    add("--size", action="append", type=size, default=[], metavar="WIDTHxHEIGHT",
        help="pixels that may be drawn besides the model's own size; repeat for several")  # fmt: skip
    batch = "pictures drawn together, which a single one then also takes; default: 4, on a CPU 1"
    command.add(parser, "batch-size", default=None, help=batch)
    add("--queue", type=int, default=64, metavar="N", help="pictures that may wait; default: %(default)s, then 429")
    add("--most-steps", type=int, default=100, metavar="N", help="that a request may ask for; default: %(default)s")
    add("--most-pictures", type=int, default=10, metavar="N", help="the same of pictures; default: %(default)s")
    command.add(parser, "dtype", choices=dtypes.NAMES)
    args = parser.parse_args(arguments)
    if args.host not in LOOPBACK and not args.token:
        raise ValueError(f"--host {args.host} can be reached from other machines: set {TOKEN} or --token")
    if min(args.queue, args.most_steps, args.most_pictures, args.batch_size or 1) < 1:
        raise ValueError("--queue, --most-steps, --most-pictures and --batch-size must be at least 1")
    if args.queue < args.most_pictures:
        raise ValueError(
            f"--queue {args.queue} has no room for the --most-pictures {args.most_pictures} of one request"
        )
    if empty := [text for text in args.lora if named(text)[1] is None]:
        raise ValueError(f"--lora {empty[0]}: give it a file, as --lora NAME=FILE")
    command.keep_compiled_programs()
    serve(args)


def serve(args: argparse.Namespace) -> None:
    import jax
    import uvicorn

    from flaxkd.serve import app
    from flaxkd.serve.requests import Limits

    batch_size = args.batch_size or (1 if jax.default_backend() == "cpu" else 4)
    limits = Limits(steps=args.most_steps, count=args.most_pictures)
    hosts = app.LOCAL if args.host in LOOPBACK and not args.token else ("*",)
    made = app.make(load(args), limits=limits, waiting=args.queue, batch_size=batch_size, token=args.token, hosts=hosts)
    queue = made.state.server.queue

    class Server(uvicorn.Server):
        """Refuses jobs from the signal on, where uvicorn alone would wait for the queue to empty."""

        async def startup(self, sockets=None) -> None:
            await super().startup(sockets)
            if self.started:
                names = ", ".join(made.state.server.models)
                print(f"{names}: http://{args.host}:{args.port} (Ctrl-C ends it)", flush=True)

        def handle_exit(self, sig, frame) -> None:
            queue.close()
            super().handle_exit(sig, frame)

    config = uvicorn.Config(made, host=args.host, port=args.port, log_level="warning", access_log=False)
    Server(config).run()


if __name__ == "__main__":
    main()
