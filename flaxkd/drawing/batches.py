"""The only drawing loop: from prompts, in batches of one shape split over devices, to 8-bit pictures."""

import warnings
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from flaxkd.diffusion import sampling
from flaxkd.diffusion.samplers import Schedule
from flaxkd.drawing.emphasis import encode
from flaxkd.machine import progress, sharding

Noise = Callable[[int], tuple[np.ndarray, np.ndarray | None]]


def noise_of(seed: int | Sequence[int], shape: tuple[int, ...], schedule: Schedule) -> tuple:
    """What `draw` asks of `noise`, from a generator of the picture's own. seed: a number, or [seed, index]."""
    rng, added = np.random.default_rng(seed), schedule.noise
    first = rng.standard_normal(shape, np.float32)
    return first, None if added is None else rng.standard_normal((len(added), *shape), np.float32)


def draw(
    pipeline,
    prompts: Sequence[str],
    noise: Noise,
    schedule: Schedule,
    guidance: float | Sequence[float],
    *,
    batch_size: int,
    negatives: Sequence[str | None] | None = None,
    images: Sequence[np.ndarray] | None = None,
    masks: Sequence[np.ndarray] | None = None,
    finite: bool = True,
    words: str | None = None,
    leave: bool = True,
    tick: Callable[[], object] | None = None,
    emphasis: bool = False,
    long_prompts: bool = False,
    guidance_rescale: float = 0.0,
) -> Iterator[np.ndarray]:
    """The pictures uint8[H, W, 3] of all prompts, in order.

    pipeline: has modules, params on devices, folder and mesh (see pipeline.py); all processes of the mesh call this.
    noise(i) -> (unit Gaussian latents float32[h, w, c] at the start of picture i; float32[steps, h, w, c] to add
    between steps, or None for a sampler that adds none). schedule: of the sampler. negatives: what not to draw, for
    each prompt, None in it for nothing; None: nothing. images: float32[H, W, 3] in [0, 1] to start from, for each
    prompt. masks: bool[H, W], where to draw in each of them; None: everywhere. batch_size: pictures at a time, at least
    one on each device; the last batch is filled up: it compiles nothing of its own. finite: raise FloatingPointError
    for a picture that is not finite; otherwise it is black. words: of a bar over the steps of all batches, None for no
    bar; leave: whether the bar stays at the end. guidance: one, or one for each prompt; below 1 it is 1, no guidance,
    as in diffusers, and a warning says so. tick: called after each step of a batch, in place of the bar's count; what
    it raises ends the drawing. emphasis, long_prompts: see emphasis.py. guidance_rescale: see
    `sampling.text_to_image`."""
    scales = np.broadcast_to(np.float32(guidance), len(prompts))
    if scales.min() < 1:
        warnings.warn(f"guidance = {scales.min():g} is drawn as 1, as in diffusers: without guidance", stacklevel=2)
    modules, params, mesh = pipeline.modules, pipeline.params, pipeline.mesh
    n, batch_size = len(prompts), -(-batch_size // mesh.size) * mesh.size
    negatives, folder, weights, empty = negatives or [None] * n, pipeline.folder, None, None
    size = tuple(folder.factor * side for side in noise(0)[0].shape[:2])
    both = folder.conditions([*prompts, *negatives], size)
    if emphasis or long_prompts:
        ids, weights = encode(folder, [*prompts, *negatives], emphasis=emphasis, long_prompts=long_prompts)
        both, weights, empty = both | ids, np.split(weights, 2), folder.conditions([""], size)
    inputs, negative_inputs = ({name: x[half] for name, x in both.items()} for half in (slice(n), slice(n, None)))
    if folder.beside:  # an inpainting UNet sees what stays; without a mask it draws everywhere
        masks = masks or [np.ones(size, bool)] * n
        images = images or [np.zeros((*size, 3), np.float32)] * n
    put = lambda x: sharding.put(x, sharding.batch(mesh))
    starts = range(0, n, batch_size)
    steps = len(starts) * len(schedule.timesteps)
    with progress.Bar(steps, words or "", first=progress.COMPILING, leave=leave, disable=words is None) as bar:
        for start in starts:
            rows = np.arange(start, start + batch_size).clip(max=n - 1)
            first, between = zip(*map(noise, rows.tolist()), strict=True)
            pixels = lambda of, rows=rows: None if of is None else put(np.stack([of[i] for i in rows]))
            vae, image, mask = (modules["vae"], params["vae"]), pixels(images), pixels(masks)
            beside = {"beside": sampling.seen_beside(*vae, image, mask)} if folder.beside else {}
            drawn = sampling.text_to_image(
                modules=modules,
                condition=pipeline.folder.family.condition,
                params=params,
                inputs={name: put(x[rows]) for name, x in inputs.items()} | beside,
                negative_inputs={name: put(x[rows]) for name, x in negative_inputs.items()} | beside,
                latents=put(np.stack(first)),
                schedule=schedule,
                guidance=put(np.maximum(scales[rows], 1)) if scales.max() > 1 else None,
                image_latents=None if image is None else sampling.image_to_latents(*vae, image),
                mask=None if mask is None or beside else sampling.mask_of_latents(mask, folder.factor),
                noise=None if schedule.noise is None else np.stack(between, axis=1),
                token_weights=None if weights is None else (put(weights[1][rows]), put(weights[0][rows])),
                empty_inputs=empty,
                guidance_rescale=float(guidance_rescale) or None,
                tick=tick or (None if words is None else bar.update),
            )
            drawn = sharding.whole(drawn, mesh)[: n - start]
            if finite and not np.isfinite(drawn).all():
                raise FloatingPointError(
                    f"{pipeline.name} draws values that are not finite: load it with dtype float32. If that does not "
                    "help, look for the step at which its training went wrong"
                )
            yield from np.round(np.nan_to_num(drawn) * 255).astype(np.uint8)
