"""Does a model draw what its training captions say? The share of pictures that find their own original.

    python -m flaxkd.recall [--model DIR|HUB_ID] [--out recall.png]

Draws a picture for each of 128 training captions of OpenMoji, and looks for the caption's original among the 5
nearest (mean square of pixels) of 512 originals. A blind guess finds 1 %. The picture shows the first 24, beside
their originals and the nearest.
"""

import argparse
from pathlib import Path

import numpy as np
from tqdm import tqdm

from flaxkd import pictures, pretrained, sampling
from flaxkd.data import sources

BATCH = 32


def draw(folder: Path, captions: list[str], *, steps: int, guidance: float, seed: int) -> np.ndarray:
    """Pictures uint8[n, H, W, 3] of captions by the pipeline `folder`, with a progress bar."""
    modules, params = {}, {}
    for part in pretrained.MODELS:
        modules[part], params[part] = pretrained.load(folder, part)
    tokenizer = pretrained.load_tokenizer(folder)
    plan = sampling.plan("dpmsolver++", pretrained.read_config(folder, "scheduler"), steps)
    size = modules["unet"].config.sample_size
    noise = np.random.default_rng(seed).standard_normal((len(captions), size, size, 4), np.float32)
    empty = pretrained.tokenize(tokenizer, [""] * BATCH)
    drawn = []
    for i in tqdm(range(0, len(captions), BATCH), desc="drawing", unit="batch"):
        here = np.arange(i, i + BATCH).clip(max=len(captions) - 1)  # the last batch is filled up
        ids = pretrained.tokenize(tokenizer, [captions[j] for j in here])
        images = sampling.text_to_image(
            **modules,
            params=params,
            input_ids=ids,
            negative_ids=empty,
            latents=noise[here],
            plan=plan,
            guidance=guidance,
        )
        drawn.append(np.round(np.asarray(images) * 255).astype(np.uint8))
    return np.concatenate(drawn)[: len(captions)]


def nearest(drawn: np.ndarray, originals: np.ndarray) -> np.ndarray:
    """Indices int[n, m]: for each picture uint8[n, H, W, 3] the originals uint8[m, H, W, 3], nearest first."""
    a, b = (x.reshape(len(x), -1).astype(np.float64) for x in (drawn, originals))
    squares = (a**2).sum(1)[:, None] - 2 * a @ b.T + (b**2).sum(1)
    return np.argsort(squares, axis=1, kind="stable")


def recall(order: np.ndarray, k: int) -> float:
    """The share of rows i of `order` int[n, m] that have i among their first k."""
    return float(np.mean([i in row[:k] for i, row in enumerate(order)]))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m flaxkd.recall", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="pipeline folder or hub id; without it the embedded teacher")
    parser.add_argument("--captions", type=int, default=128)
    parser.add_argument("--originals", type=int, default=512)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("recall.png"))
    args = parser.parse_args()
    source = sources.open_source("openmoji", "train")
    chosen = np.random.default_rng(args.seed).permutation(len(source))[: args.originals]
    examples = [source[int(i)] for i in chosen]
    captions = [example["caption"] for example in examples[: args.captions]]
    originals = np.stack([example["image"] for example in examples])
    drawn = draw(
        pretrained.resolve(args.model), captions, steps=args.steps, guidance=args.guidance, seed=args.seed
    )
    order = nearest(drawn, originals)
    shares = ", ".join(f"{recall(order, k):.1%} among the {k}" for k in (1, 5, 20))
    print(f"of {len(captions)} pictures, their own original is {shares} nearest of {len(originals)}")
    columns = {"drawn": drawn[:24], "original": originals[:24], "nearest": originals[order[:24, 0]]}
    pictures.grid(columns, captions[:24], args.out, scale=1)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
