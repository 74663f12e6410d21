"""Does a model draw what its training captions say? Reports the share of pictures that find their own original.

    python -m flaxkd.recall [--model DIR|HUB_ID|WORKDIR] [--out recall.png]

Draws a picture for each of 128 training captions of OpenMoji, and looks for the caption's original among the 5
nearest (mean squared pixel difference) of 512 originals. A blind guess finds 1 %. The grid shows the first 24, beside
their originals and the nearest.
"""

import argparse
from pathlib import Path

import numpy as np

from flaxkd.data import sources
from flaxkd.diffusion import samplers
from flaxkd.drawing import grids
from flaxkd.drawing.pipeline import Pipeline
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


def nearest(drawn: np.ndarray, originals: np.ndarray) -> np.ndarray:
    """Indices int[n, m]: for each picture uint8[n, H, W, 3] the originals uint8[m, H, W, 3], nearest first."""
    a, b = (x.reshape(len(x), -1).astype(np.float64) for x in (drawn, originals))
    squares = (a**2).sum(1)[:, None] - 2 * a @ b.T + (b**2).sum(1)
    return np.argsort(squares, axis=1, kind="stable")


def recall(order: np.ndarray, k: int) -> float:
    """The share of rows i of `order` int[n, m] with i among their first k."""
    return float(np.mean([i in row[:k] for i, row in enumerate(order)]))


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
    if not 1 <= args.captions <= args.originals:
        raise ValueError(f"--captions {args.captions} of --originals {args.originals}: 1 is the least, all the most")
    source = sources.open_source("openmoji", "train")
    chosen = np.random.default_rng(args.seed).permutation(len(source))[: args.originals]
    examples = [source[int(i)] for i in chosen]
    captions = [example["caption"] for example in examples[: args.captions]]
    originals = np.stack([example["image"] for example in examples])
    drawn = draw(args.model, captions, steps=args.steps, guidance=args.guidance, seed=args.seed, vae=args.vae)
    order = nearest(drawn, originals)
    shares = ", ".join(f"{recall(order, k):.1%} among the {k}" for k in (1, 5, 20))
    print(f"{len(captions)} pictures find their own original: {shares} nearest of {len(originals)}")
    columns = {"drawn": drawn[:24], "original": originals[:24], "nearest": originals[order[:24, 0]]}
    grids.grid(columns, captions[:24], args.out, scale=1)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
