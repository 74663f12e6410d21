"""A model under evaluation: where it is, whether it can be compared, how it draws and encodes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from flaxkd import diffusion, fidelity, gallery, latents, pretrained, sampling, sharding
from flaxkd.pipeline import Pipeline, locate


class Candidate(NamedTuple):
    """A pipeline folder, hub id or workdir, as `Pipeline.from_pretrained` takes it."""

    name: str
    model: str | None
    configs: dict[str, dict]  # unet, vae, text_encoder, scheduler
    modules: dict[str, Any] = {}  # noqa: RUF012 - nothing writes it; the rest is empty until `load`
    params: dict[str, Any] = {}  # noqa: RUF012
    tokenizer: Any = None
    fingerprint: str = ""


def find(model: str | None, taken: tuple[str, ...] = ()) -> Candidate:
    """The model with its configurations, without weights. taken: names of rows that are there already.

    Raises FileNotFoundError like `pipeline.locate`."""
    path = None if model is None else Path(model).expanduser()
    folder, parts, _ = locate(model)
    words = ("miniature",) if path is None else path.resolve().parts if path.is_dir() else path.parts
    name = "/".join(words[-2:] if words[-1] == "diffusers" or not (path and path.is_dir()) else words[-1:])
    name = next(n for n in (name, *(f"{name} ({i})" for i in range(2, 1000))) if n not in taken)
    configs = {part: parts.get(part) or pretrained.read_config(folder, part) for part in pretrained.CONFIGS}
    return Candidate(name, model, configs)


def check(model: Candidate, reference: Candidate) -> None:
    """Raises ValueError unless both see the same noisy latents and say the same of them."""
    wrong = []
    vaes = [pretrained.build("vae", m.configs["vae"]).config for m in (model, reference)]
    kinds = [diffusion.NoiseSchedule.from_config(m.configs["scheduler"]) for m in (model, reference)]
    for what, (own, others) in {
        "latents are scaled by": [vae.scaling_factor for vae in vaes],
        "a latent is so many pixels wide:": [vae.factor for vae in vaes],
        "prediction_type is": [kind.prediction_type for kind in kinds],
        "training timesteps are": [len(kind.alphas_cumprod) for kind in kinds],
    }.items():
        if own != others:
            wrong.append(f"{what} {own!r}, not {others!r}")
    if not wrong and not np.allclose(kinds[0].alphas_cumprod, kinds[1].alphas_cumprod, atol=1e-5):
        wrong.append("the noise schedules (betas) differ")
    if wrong:
        raise ValueError(
            f"{model.name} cannot be compared with {reference.name}: {'; '.join(wrong)}. Give the teacher that it was "
            "distilled from with --reference, or --no-fidelity for the published protocol alone"
        )


def sizes(reference: Candidate, resolution: int | None) -> tuple[tuple[int, int, int], int]:
    """((h, w, c) of the latents, pixels a side), None for the reference's own. ValueError if a UNet cannot take it."""
    unet, vae = (pretrained.build(part, reference.configs[part]).config for part in ("unet", "vae"))
    resolution = resolution or unet.sample_size * vae.factor
    multiple = vae.factor * 2 ** (len(unet.block_out_channels) - 1)
    if resolution < 1 or resolution % multiple:
        raise ValueError(
            f"resolution {resolution} is no multiple of {multiple} pixels, which {reference.name} needs"
        )
    side = resolution // vae.factor
    return (side, side, unet.in_channels), resolution


def load(model: Candidate, dtype, mesh) -> Candidate:
    """The model with modules, tokenizer, and weights on every device of the mesh."""
    pipeline = Pipeline.from_pretrained(model.model, dtype, mesh)
    return model._replace(
        modules=pipeline.modules,
        fingerprint=gallery.fingerprint(pipeline.params),
        params=pipeline.params,
        tokenizer=pipeline.tokenizer,
    )


def network(model: Candidate, captions: list[str]) -> fidelity.Network:
    """What of a loaded model predicts, and `captions` as its own tokenizer has them."""
    params = {part: model.params[part] for part in ("unet", "text_encoder")}
    ids = pretrained.tokenize(model.tokenizer, captions)
    return fidelity.Network(model.modules["unet"], model.modules["text_encoder"], params, ids)


def drawer(model: Candidate, plan: sampling.Plan, guidance: float, mesh) -> Callable:
    """(b prompts, latents float32[b, h, w, c]) -> pictures uint8[b, H, W, 3], split over the devices of the mesh."""
    put = lambda x: jax.device_put(x, sharding.batch(mesh))
    tokenize = lambda prompts: put(pretrained.tokenize(model.tokenizer, prompts))

    def draw(prompts: list[str], latents: np.ndarray) -> np.ndarray:
        images = sampling.text_to_image(
            **model.modules,
            params=model.params,
            input_ids=tokenize(prompts),
            negative_ids=tokenize([""] * len(prompts)),
            latents=put(latents),
            plan=plan,
            guidance=guidance,
        )
        return np.round(np.asarray(images) * 255).astype(np.uint8)

    return draw


def encode(model: Candidate, images: np.ndarray, batch_size: int, mesh) -> np.ndarray:
    """Moments float32[n, h, w, 2c] of pictures uint8[n, H, W, 3], by the model's autoencoder."""
    found = []
    for start in range(0, len(images), batch_size):
        here = np.arange(start, start + batch_size).clip(max=len(images) - 1)  # one shape: compiled once
        batch = jax.device_put(images[here], sharding.batch(mesh))
        found.append(np.asarray(latents.moments(model.modules["vae"], model.params["vae"], batch), np.float32))
    return np.concatenate(found)[: len(images)]
