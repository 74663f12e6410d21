"""Does a model draw what its training captions say? Reports the share of pictures that find their own original.

    python -m flaxkd.recall [--model DIR|HUB_ID|WORKDIR] [--out recall.png]

Draws a picture for each of 128 training captions of OpenMoji, and looks for the caption's original among the 5
nearest (mean squared pixel difference) of 512 originals. A blind guess finds 1 %. The grid shows the first 24, beside
their originals and the nearest.
"""

import argparse
from pathlib import Path

from flaxkd.diffusion import samplers
from flaxkd.drawing import grids, same_noise
from flaxkd.drawing.pipeline import Pipeline
from flaxkd.evaluate import originals
from flaxkd.machine import command


@command.reported()
def main(arguments: list[str] | None = None) -> None:
    parser = command.parser("flaxkd.recall", __doc__)
    command.add(parser, "model")
    command.add(parser, "vae")
    parser.add_argument("--captions", type=int, default=128, help="default: %(default)s")
    parser.add_argument("--originals", type=int, default=512, help="default: %(default)s")
    command.add(parser, "steps", help=samplers.USUAL)
    command.add(parser, "guidance")
    command.add(parser, "seed")
    command.add(parser, "out", default=Path("recall.png"))
    args = parser.parse_args(arguments)
    command.keep_compiled_programs()
    run(args)


def run(args: argparse.Namespace) -> None:
    captions, known = originals.read(args.captions, args.originals, args.seed)
    pipeline = Pipeline.from_pretrained(args.model, vae=args.vae)
    originals.check(pipeline.name, pipeline.folder.resolution, known)
    options = {"num_inference_steps": args.steps, "guidance_scale": args.guidance}
    drawn = same_noise.draw(pipeline, captions, args.seed, **options)
    order = originals.nearest(drawn, known)
    shares = ", ".join(f"{originals.recall(order, k):.1%} among the {k}" for k in (1, 5, 20))
    print(f"{len(captions)} pictures find their own original: {shares} nearest of {len(known)}")
    columns = {"drawn": drawn[:24], "original": known[:24], "nearest": known[order[:24, 0]]}
    grids.grid(columns, captions[:24], args.out, scale=1)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
