"""Pictures of several models from the same noise, as arrays, to be compared."""

from collections.abc import Sequence

import numpy as np

from flaxkd.drawing.pipeline import Pipeline

BATCH = 32


def draw(pipeline: Pipeline, prompts: Sequence[str], seed: int, **options) -> np.ndarray:
    """Pictures uint8[n, H, W, 3]. Picture i has the same noise for all models of one latent size. options: of a call of
    the pipeline."""
    shape = (len(prompts), *pipeline.folder.latent_shape())
    latents = np.random.default_rng(seed).standard_normal(shape, np.float32)
    drawn = pipeline(list(prompts), latents=latents, seed=seed, batch_size=BATCH, **options)
    return np.stack([np.asarray(picture) for picture in drawn])
