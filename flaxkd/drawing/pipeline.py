"""Text to image and image to image in three lines, with any Stable Diffusion 1.x or 2.x, teacher or student:

    from flaxkd import Pipeline

    pipeline = Pipeline.from_pretrained("runs/small")
    pipeline("red apple", seed=0)[0].save("apple.png")

`python -m flaxkd.generate` is the same as a command. What is computed is in `sampling`.
"""

import dataclasses
import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from flaxkd import export, pretrained
from flaxkd.diffusion import samplers, sampling
from flaxkd.machine import sharding
from flaxkd.models.attention import DotProductAttention

Picture = Image.Image | str | os.PathLike


@dataclasses.dataclass(frozen=True, eq=False)
class Pipeline:
    """What is needed to draw: `from_pretrained` reads it, a call draws.

    name: for people. modules, params: {part: module}, {part: nested dict of arrays} of unet, vae and text_encoder.
    tokenizer: its CLIPTokenizer. scheduler_config: its scheduler_config.json. mesh: the devices that draw."""

    name: str
    modules: dict[str, Any]
    params: dict[str, dict]
    tokenizer: Any
    scheduler_config: dict
    mesh: jax.sharding.Mesh

    @classmethod
    def from_pretrained(cls, model: str | os.PathLike | None = None, dtype=None, mesh=None) -> "Pipeline":
        """Reads a pipeline folder of diffusers, a hub id (owner/name), or the workdir of a training.

        model: None is the embedded teacher. A workdir draws with what it exported (`diffusers/`), or while it has
        not, with its newest checkpoint. dtype: of parameters and compute; None is bfloat16 on an accelerator and
        float32 on a CPU. mesh: the devices that draw; None is all of this process, see `sharding.local_mesh`.
        Raises FileNotFoundError and ValueError, both with the remedy, if there is no such model, or if it draws with
        more than a caption (SDXL, inpainting)."""
        dtype = sharding.compute_dtype(dtype)
        mesh = mesh or sharding.local_mesh()
        folder, trained, name = locate(model)
        configs = {part: pretrained.read_config(folder, part) for part in pretrained.MODELS} | trained
        _check(folder, configs)
        if trained:
            step, restored, _ = export.restore(Path(model).expanduser() / "checkpoints")
            name = f"{name}, step {step}"
        scheduler_config = pretrained.read_config(folder, "scheduler")
        tokenizer = pretrained.load_tokenizer(folder)
        modules, params = {}, {}
        for part, config in configs.items():
            if part in trained:
                modules[part] = pretrained.build(part, config, dtype)
                params[part] = jax.tree.map(lambda x: np.asarray(x, dtype), restored[part])
            else:
                modules[part], params[part] = pretrained.load(folder, part, dtype)
        modules["unet"] = modules["unet"].clone(attend=DotProductAttention(mesh))
        params = jax.device_put(params, sharding.replicated(mesh))
        return cls(name, modules, params, tokenizer, scheduler_config, mesh)

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] = "",
        num_inference_steps: int = 25,
        guidance_scale: float = 7.5,
        height: int | None = None,
        width: int | None = None,
        image: Picture | Sequence[Picture] | None = None,
        strength: float | None = None,
        sampler: str = "dpmsolver++",
        seed: int = 0,
        latents: np.ndarray | None = None,
        batch_size: int = 4,
        progress: bool = True,
    ) -> list[Image.Image]:
        """A picture of `width` x `height` pixels for each prompt, with what it was drawn from in its `info`.

        Picture i has seed + i, so that it does not depend on those beside it nor on the batch. One program is
        compiled per model, size, batch and number of steps (and one more if a sampler draws noise, or for an image).

        prompt: captions; what the text encoder cannot take in is named in a warning. negative_prompt: what not to
        draw, one for all or one each. num_inference_steps, sampler: see `samplers.plan`. guidance_scale: how far from
        the negative prompt to the prompt, 1 is none. height, width: None for those the model was trained at.
        image: picture or its path, one for all or one each, from which to begin: scaled and cropped to the size.
        strength: of its change, in (0, 1], None is 0.8. latents: float32[n, h, w, 4], unit Gaussian, in place of
        those of the seeds. batch_size: pictures at a time, at least one on each device. progress: a bar on stderr.

        Raises ValueError or FileNotFoundError before any compute, with the numbers and the remedy, and
        FloatingPointError if the model gives no numbers in its dtype."""
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        n = len(prompts)
        if not n:
            raise ValueError("there is no prompt: give at least one")
        negatives = _each("negative_prompt", negative_prompt, str, n)
        if seed < 0 or batch_size < 1:
            raise ValueError(f"seed = {seed} must be at least 0, and batch_size = {batch_size} at least 1")
        if not np.isfinite(guidance_scale):
            raise ValueError(f"guidance_scale = {guidance_scale}: 1 is no guidance, 7.5 is usual")
        height, width = self._pixels("height", height), self._pixels("width", width)
        settings = {}
        if image is None and strength is not None:
            raise ValueError(f"strength = {strength} is how far to change an image: give one, or no strength")
        if image is not None:
            strength = 0.8 if strength is None else strength
            settings = {"strength": strength}
            if isinstance(image, str | os.PathLike):
                settings["image"] = image
            image = [_read(x, width, height) for x in _each("image", image, Picture, n)]
        plan = samplers.plan(sampler, self.scheduler_config, num_inference_steps, strength)
        vae = self.modules["vae"]
        shape = (height // vae.config.factor, width // vae.config.factor, vae.config.latent_channels)
        if latents is not None and np.shape(latents) != (n, *shape):
            raise ValueError(f"latents have the shape {np.shape(latents)}, and must have {(n, *shape)}")
        self._warn([*prompts, *negatives])

        input_ids = pretrained.tokenize(self.tokenizer, prompts)
        negative_ids = pretrained.tokenize(self.tokenizer, negatives)
        pictures = []
        batch_size = -(-min(batch_size, n) // self.mesh.size) * self.mesh.size
        put = lambda x: jax.device_put(x, sharding.batch(self.mesh))
        for i in tqdm(range(0, n, batch_size), desc="drawing", unit="batch", disable=not progress):
            rows = np.arange(i, i + batch_size).clip(max=n - 1)  # the last batch is filled up: one program
            first, between = zip(*(_noise(seed + j, shape, plan) for j in rows), strict=True)
            drawn = sampling.text_to_image(
                **self.modules,
                params=self.params,
                input_ids=put(input_ids[rows]),
                negative_ids=put(negative_ids[rows]),
                latents=put(np.stack(first) if latents is None else np.asarray(latents, np.float32)[rows]),
                plan=plan,
                guidance=float(guidance_scale),  # an int would compile another program
                image_latents=None
                if image is None
                else sampling.image_to_latents(
                    vae, self.params["vae"], put(np.stack([image[j] for j in rows]))
                ),
                noise=None if plan.noise is None else np.stack(between, axis=1),
            )
            drawn = np.asarray(drawn)
            if not np.isfinite(drawn).all():
                raise FloatingPointError(
                    f"{self.name} draws what is no number: load it with dtype float32, and if that does not help, "
                    "look for the step at which its training went wrong"
                )
            pictures += [Image.fromarray(x) for x in np.round(drawn * 255).astype(np.uint8)]
        settings |= {
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "sampler": sampler,
            "width": width,
            "height": height,
            "model": self.name,
        }
        for i, picture in enumerate(pictures := pictures[:n]):
            info = {"prompt": prompts[i], "negative_prompt": negatives[i], "seed": seed + i} | settings
            picture.info = {name: str(value) for name, value in info.items()}
        return pictures

    def _pixels(self, name: str, value: int | None) -> int:
        factor = self.modules["vae"].config.factor
        if value is None:
            return self.modules["unet"].config.sample_size * factor
        if value < factor or value % factor:
            near = max(1, round(value / factor)) * factor
            raise ValueError(
                f"{name} = {value} pixels is no multiple of {factor}, the size of a latent: take {near}"
            )
        return value

    def _warn(self, prompts: list[str]) -> None:
        """Names the words that `pretrained.tokenize` cuts off, once for each text."""
        length = self.tokenizer.model_max_length
        for text in dict.fromkeys(prompts):
            tokens = self.tokenizer(text, return_offsets_mapping=True, verbose=False)
            if len(tokens["input_ids"]) > length:  # the first and the last one are marks
                cut = tokens["offset_mapping"][length - 1][0]
                lost = " ".join(
                    text[text.rfind(" ", 0, cut) + 1 :].split()
                )  # of a word cut in two, the whole
                warnings.warn(
                    f"the text encoder takes {length - 2} tokens, and this prompt has "
                    f"{len(tokens['input_ids']) - 2}: not seen is {lost!r}",
                    stacklevel=3,
                )


def locate(model: str | os.PathLike | None) -> tuple[Path, dict[str, dict], str]:
    """(pipeline folder, {part: config.json} of those that a checkpoint has in place of its own, name for people).

    A workdir is its `diffusers/` if that is there, else the folder of its teacher with the parts of its newest
    checkpoint. Raises FileNotFoundError like `pretrained.resolve` and `export.read_plan`."""
    if model is None:
        return pretrained.resolve(None), {}, "embedded teacher"
    workdir = Path(model).expanduser()
    if not (workdir / export.EXPORT).is_file():
        return pretrained.resolve(model), {}, str(model)
    if (workdir / "diffusers" / "model_index.json").is_file():
        return workdir / "diffusers", {}, str(model)
    configs, folder = export.read_plan(workdir)
    return folder, configs, str(model)


def _check(folder: Path, configs: dict[str, dict]) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    kind = index.get("_class_name", "")
    channels = configs["unet"].get("in_channels", 4), configs["vae"].get("latent_channels", 4)
    if "text_encoder_2" in index or not kind.startswith("StableDiffusion") or channels[0] != channels[1]:
        raise ValueError(
            f"{folder} is a {kind} whose UNet takes {channels[0]} channels for latents of {channels[1]}: "
            "flaxkd draws with Stable Diffusion 1.x and 2.x from text alone, not with SDXL or inpainting models"
        )


def _each(name: str, value, kind: type, n: int) -> list:
    """One for all, or one for each of n prompts."""
    values = [value] * n if isinstance(value, kind) else list(value)
    if len(values) != n:
        raise ValueError(f"{name} has {len(values)} entries for {n} prompts: give one, or one for each")
    return values


def _read(picture: Picture, width: int, height: int) -> np.ndarray:
    """float32[height, width, 3] in [0, 1], scaled and cropped about the center, upon white where transparent."""
    try:
        image = picture if isinstance(picture, Image.Image) else Image.open(picture)
        image = ImageOps.exif_transpose(image).convert("RGBA")
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no picture {picture}") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{picture} cannot be read as a picture ({error})") from error
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if image.size != (width, height):
        image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    return np.asarray(image, np.float32) / 255


def _noise(seed: int, shape: tuple[int, ...], plan: samplers.Plan) -> tuple[np.ndarray, np.ndarray | None]:
    """float32[h, w, c] to begin with, and float32[steps, h, w, c] if the sampler draws between its steps."""
    rng = np.random.default_rng(seed)
    first = rng.standard_normal(shape, np.float32)
    return first, None if plan.noise is None else rng.standard_normal((len(plan.noise), *shape), np.float32)
