"""The one loop that draws: prompts in batches of one shape, split over devices, to pictures of 8 bits."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from flaxkd.diffusion import sampling
from flaxkd.diffusion.samplers import Schedule
from flaxkd.machine import sharding

Noise = Callable[[int], tuple[np.ndarray, np.ndarray | None]]


def draw(
    pipeline,
    prompts: Sequence[str],
    noise: Noise,
    schedule: Schedule,
    guidance: float,
    *,
    batch_size: int,
    negatives: Sequence[str] | None = None,
    images: Sequence[np.ndarray] | None = None,
    finite: bool = True,
) -> Iterator[np.ndarray]:
    """The pictures uint8[H, W, 3] of all prompts, in order.

    pipeline: has modules, params on devices, folder and mesh (see pipeline.py); all processes of the mesh call this.
    noise(i) -> (latents float32[h, w, c] from which picture i begins, unit Gaussian; float32[steps, h, w, c] that is
    added between the steps, for a sampler that does so, else None). schedule: of the sampler. negatives: what not to
    draw, for each prompt; None: "". images: float32[H, W, 3] in [0, 1] from which to begin, for each prompt.
    batch_size: pictures at a time, at least one on each device; the last batch is filled up, so that one program is
    compiled. finite: raise FloatingPointError for a picture that is no number, else it is black."""
    modules, params, mesh = pipeline.modules, pipeline.params, pipeline.mesh
    n, batch_size = len(prompts), -(-batch_size // mesh.size) * mesh.size
    ids = pipeline.folder.tokenize(prompts)
    negative_ids = pipeline.folder.tokenize(negatives or [""] * n)
    put = lambda x: sharding.put(x, sharding.batch(mesh))
    for start in range(0, n, batch_size):
        rows = np.arange(start, start + batch_size).clip(max=n - 1)
        first, between = zip(*map(noise, rows.tolist()), strict=True)
        begin = None if images is None else put(np.stack([images[i] for i in rows]))
        drawn = sampling.text_to_image(
            modules=modules,
            condition=pipeline.folder.family.condition,
            params=params,
            input_ids=put(ids[rows]),
            negative_ids=put(negative_ids[rows]),
            latents=put(np.stack(first)),
            schedule=schedule,
            guidance=float(guidance),  # an int would compile another program
            image_latents=begin if begin is None else sampling.image_to_latents(modules["vae"], params["vae"], begin),
            noise=None if schedule.noise is None else np.stack(between, axis=1),
        )
        drawn = sharding.whole(drawn, mesh)[: n - start]
        if finite and not np.isfinite(drawn).all():
            raise FloatingPointError(
                f"{pipeline.name} draws what is no number: load it with dtype float32, and if that does not help, "
                "look for the step at which its training went wrong"
            )
        yield from np.round(np.nan_to_num(drawn) * 255).astype(np.uint8)
