"""Does a model draw what its training captions say? Reports the share of pictures that find their own original.

    python -m flaxkd.recall [--model DIR|HUB_ID|WORKDIR] [--out recall.png]

Draws a picture for each of 128 training captions of OpenMoji, and looks for the caption's original among the 5
nearest (mean squared pixel difference) of 512 originals. A blind guess finds 1 %. The grid shows the first 24, beside
their originals and the nearest.
"""

import argparse
from pathlib import Path

import numpy as np

from flaxkd.diffusion import samplers
from flaxkd.drawing import grids
from flaxkd.drawing.pipeline import Pipeline
from flaxkd.evaluate import originals
from flaxkd.machine import command

BATCH = 32


def draw(
    model: str | None, captions: list[str], *, steps: int | None, guidance: float | None, seed: int, vae=None
) -> np.ndarray:
    """Pictures uint8[n, H, W, 3] of captions, with a progress bar."""
    pipeline = Pipeline.from_pretrained(model, vae=vae)
    shape = (len(captions), *pipeline.folder.latent_shape())
    drawn = pipeline(
        captions,
        num_inference_steps=steps,
        guidance_scale=guidance,
        latents=np.random.default_rng(seed).standard_normal(shape, np.float32),
        batch_size=BATCH,
    )
    return np.stack([np.asarray(image) for image in drawn])


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
    drawn = draw(args.model, captions, steps=args.steps, guidance=args.guidance, seed=args.seed, vae=args.vae)
    order = originals.nearest(drawn, known)
    shares = ", ".join(f"{originals.recall(order, k):.1%} among the {k}" for k in (1, 5, 20))
    print(f"{len(captions)} pictures find their own original: {shares} nearest of {len(known)}")
    columns = {"drawn": drawn[:24], "original": known[:24], "nearest": known[order[:24, 0]]}
    grids.grid(columns, captions[:24], args.out, scale=1)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
