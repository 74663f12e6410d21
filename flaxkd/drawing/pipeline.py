"""Text to image, image to image and inpainting in three lines, with any Stable Diffusion 1.x, 2.x or XL:

    from flaxkd import Pipeline

    pipeline = Pipeline.from_pretrained("runs/small")
    pipeline("red apple", seed=0)[0].save("apple.png")

`python -m flaxkd.generate` does the same as a command. diffusion/sampling.py has the computation.
"""

import dataclasses
import os
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from flax.core import FrozenDict
from PIL import Image, ImageOps

from flaxkd import export
from flaxkd.diffusion import samplers
from flaxkd.drawing import batches
from flaxkd.drawing.emphasis import parse
from flaxkd.machine import sharding
from flaxkd.models.attention import DotProductAttention
from flaxkd.pretrained import Folder, lora_files
from flaxkd.weights import quantize

Picture = Image.Image | str | os.PathLike
WITH = " + "  # before a LoRA in the name of a pipeline


@dataclasses.dataclass(frozen=True, eq=False)
class Pipeline:
    """Everything needed to draw: `from_pretrained` reads it, a call draws.

    name: for people. folder: tokenizer and family. modules, params: {part: module}, {part: nested dict of arrays on
    the devices} of its networks. scheduler_config: its scheduler_config.json. mesh: the devices that draw."""

    name: str
    folder: Folder
    modules: FrozenDict[str, Any]
    params: dict[str, dict]
    scheduler_config: dict
    mesh: Any

    @classmethod
    def from_pretrained(
        cls, model: str | os.PathLike | None = None, dtype=None, mesh=None, vae=None, lora: Sequence = ()
    ) -> "Pipeline":
        """Reads a pipeline folder of diffusers, a single-file checkpoint, a hub id (owner/name), or a run's workdir.

        model: None is the embedded teacher. A workdir draws with its export (`diffusers/`), or before there is one,
        with its newest checkpoint. dtype: of parameters and compute; None is bfloat16 on an accelerator and float32
        on a CPU. mesh: the devices that draw; None is all of this process, see `sharding.local_mesh`. vae: another
        autoencoder than the model's own: folder, file or hub id. lora: see `with_lora`.
        Raises FileNotFoundError and ValueError, both with the remedy, if there is no such model, or if it is of a kind
        that flaxkd does not know."""
        folder = export.open_model(model, vae)
        name = "embedded teacher" if model is None else str(model)
        made = cls.from_folder(lora_files.applied(folder, lora), _with(name, lora), dtype, mesh)
        if folder.step is not None:
            made = dataclasses.replace(made, name=_with(f"{model}, step {folder.step()}", lora))
        return dataclasses.replace(made, folder=folder)

    @classmethod
    def from_folder(cls, folder: Folder, name: str, dtype=None, mesh=None, parts=None, params=None) -> "Pipeline":
        """The same for a folder. parts: those to read; None: all. params: of the others, on the devices of `mesh`."""
        dtype, mesh = sharding.compute_dtype(dtype), mesh or sharding.local_mesh()
        attend = {"unet": {"attend": DotProductAttention(mesh)}}
        modules = {part: folder.module(part, dtype, **attend.get(part, {})) for part in folder.parts}
        read = {part: folder.params(part, dtype) for part in (folder.parts if parts is None else parts)}
        on_devices = sharding.put(read, sharding.replicated(mesh)) | (params or {})
        if "unet" in on_devices:
            modules["unet"] = quantize.wrapped(modules["unet"], on_devices["unet"], folder.quantization)
        return cls(name, folder, FrozenDict(modules), on_devices, folder.config("scheduler"), mesh)

    def with_lora(self, *lora: str | os.PathLike) -> "Pipeline":
        """The same pipeline with these LoRA files, each FILE or FILE:SCALE, in place of those it has; none: the base.

        The weights are its folder's + the sum of scale * A @ B, made in float32 and then cast. Raises what
        `lora_files.read` and `lora_files.fit` do, if a file is for another family or UNet."""
        folder = lora_files.applied(self.folder, lora)
        dtypes = {part: self.modules[part].dtype for part in ("unet", *folder.family.encoders)}
        params = {part: folder.params(part, dtype) for part, dtype in dtypes.items()}
        made = self.with_parts({}, sharding.put(params, sharding.replicated(self.mesh)))
        return dataclasses.replace(made, name=_with(self.name.partition(WITH)[0], lora))

    def with_parts(self, modules: dict[str, Any], params: dict[str, dict]) -> "Pipeline":
        """The same pipeline with these networks or weights in place of its own."""
        modules = FrozenDict({**self.modules, **modules})
        return dataclasses.replace(self, modules=modules, params=self.params | params)

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str | None] | None = None,
        num_images_per_prompt: int = 1,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_rescale: float = 0.0,
        height: int | None = None,
        width: int | None = None,
        image: Picture | Sequence[Picture] | None = None,
        mask_image: Picture | Sequence[Picture] | None = None,
        strength: float | None = None,
        sampler: str | None = None,
        seed: int = 0,
        latents: np.ndarray | None = None,
        clip_skip: int | None = None,
        emphasis: bool = False,
        long_prompts: bool = False,
        batch_size: int = 4,
        progress: bool = True,
    ) -> list[Image.Image]:
        """Pictures of `width` x `height` pixels, one or more for each prompt, with their settings in their `info`.

        Picture i has seed + i: it depends neither on its neighbours nor on the batch. Programs are compiled once per
        model, size and batch (and once more for a sampler that adds noise, or for an image).

        prompt: captions; a warning names the words cut off by the text encoder. negative_prompt: what not to draw,
        one for all or one each; None: nothing, which with Stable Diffusion XL is not the same as "".
        num_images_per_prompt: those of the first prompt come first. num_inference_steps, sampler: see
        `samplers.schedule`; without a sampler, the model's own draws; None: the usual steps of the sampler.
        guidance_scale: how far from the negative prompt
        to the prompt, 1 is none, and so is anything below, with a warning; None: the model's own, `Folder.guidance`.
        guidance_rescale: how much of the contrast that guidance adds is taken back, 0 to 1; 0.7 for models without
        signal at their last timestep.
        height, width: pixels; None: as in training. image: picture or path to start from, one for all or one each,
        scaled and cropped to the size. mask_image: white where to draw in the image, black where it stays (as the
        autoencoder gives it back). strength: how much the image changes, in (0, 1]; None: 0.8, and with a mask 1: from
        noise alone.
        latents: float32[n, h, w, 4], unit Gaussian, in place of the seeds' noise. clip_skip: layers left out at the end
        of the text encoder, see `Folder.skip_layers`. emphasis: read (word:1.2), ((word)) and [word] in prompts as
        weights; without it they are text. long_prompts: read a prompt of any length, in chunks; without it the rest is
        cut off. Both as user interfaces do it: see emphasis.py.
        batch_size: pictures at a time, at least one on each device. progress: a bar over the steps, on stderr.

        Raises ValueError or FileNotFoundError before any compute, with the numbers and the remedy, and
        FloatingPointError if the pictures are not finite in the model's dtype."""
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts:
            raise ValueError("there is no prompt: give at least one")
        if num_images_per_prompt < 1:
            raise ValueError(f"num_images_per_prompt = {num_images_per_prompt}: 1 is the least")
        several = lambda values: [value for value in values for _ in range(num_images_per_prompt)]
        negatives = several(_each("negative_prompt", negative_prompt, str | None, len(prompts)))
        starts = [] if image is None else _each("image", image, Picture, len(prompts))
        masks = [] if mask_image is None else _each("mask_image", mask_image, Picture, len(prompts))
        prompts = several(prompts)
        n = len(prompts)
        if seed < 0 or batch_size < 1:
            raise ValueError(f"seed = {seed} must be at least 0, and batch_size = {batch_size} at least 1")
        guidance_scale = self.folder.guidance if guidance_scale is None else guidance_scale
        if not np.isfinite(guidance_scale):
            raise ValueError(
                f"guidance_scale = {guidance_scale}: 1 is no guidance, {self.folder.guidance:g} the model's"
            )
        if not 0 <= guidance_rescale <= 1:
            raise ValueError(f"guidance_rescale = {guidance_rescale}: it is 0 to 1, and 0.7 is usual")
        height, width = self._pixels("height", height), self._pixels("width", width)
        settings = {}
        if image is None and strength is not None:
            raise ValueError(f"strength = {strength} is how far to change an image: give one, or no strength")
        if image is None and masks:
            raise ValueError("mask_image says where to draw in an image: give one too, or no mask_image")
        if image is not None:
            strength = (1.0 if masks else 0.8) if strength is None else strength
            settings = {"strength": strength}
            named = {"image": image, "mask_image": mask_image}
            settings |= {name: path for name, path in named.items() if isinstance(path, str | os.PathLike)}
            image = several([pixels(x, width, height) for x in starts])
            masks = several([pixels(x, width, height, "L") >= 0.5 for x in masks])
        sampler = sampler or samplers.own(self.scheduler_config)
        if num_inference_steps is None:
            num_inference_steps = samplers.usual_steps(sampler, self.scheduler_config)
        begin = None if masks and strength == 1 else strength
        schedule = samplers.schedule(sampler, self.scheduler_config, num_inference_steps, begin)
        self._warn_of_guidance(sampler, guidance_scale)
        factor, channels = self.folder.factor, self.modules["vae"].config.latent_channels
        shape = (height // factor, width // factor, channels)
        if latents is not None and np.shape(latents) != (n, *shape):
            raise ValueError(f"latents have the shape {np.shape(latents)}, and must have {(n, *shape)}")
        if not long_prompts:
            read = lambda text: "".join(piece for piece, _ in parse(text)) if emphasis else text
            self._warn([read(text) for text in (*prompts, *negatives) if text])

        def noise(i: int) -> tuple[np.ndarray, np.ndarray | None]:
            first, between = batches.noise_of(seed + i, shape, schedule)
            return first if latents is None else np.asarray(latents[i], np.float32), between

        drawn = batches.draw(
            self._skip_layers(clip_skip),
            prompts,
            noise,
            schedule,
            guidance_scale,
            batch_size=min(batch_size, n),
            negatives=negatives,
            images=image,
            masks=masks or None,
            emphasis=emphasis,
            long_prompts=long_prompts,
            guidance_rescale=guidance_rescale,
            words=(f"drawing {n} pictures" if n > 1 else "drawing") if progress else None,
        )
        pictures = [Image.fromarray(x) for x in drawn]
        options = {"clip_skip": clip_skip, "emphasis": emphasis, "long_prompts": long_prompts}
        options |= {"guidance_rescale": guidance_rescale}
        settings |= {name: value for name, value in options.items() if value}
        settings |= {
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "sampler": sampler,
            "width": width,
            "height": height,
            "model": self.name,
        }
        for i, picture in enumerate(pictures):
            info = {"prompt": prompts[i], "negative_prompt": negatives[i] or "", "seed": seed + i} | settings
            picture.info = {name: str(value) for name, value in info.items()}
        return pictures

    def _skip_layers(self, clip_skip: int | None) -> "Pipeline":
        if not clip_skip:
            return self
        folder = self.folder.skip_layers(clip_skip)
        dtypes = {part: self.modules[part].dtype for part in folder.family.encoders}
        return self.with_parts({part: folder.module(part, dtype) for part, dtype in dtypes.items()}, {})

    def _pixels(self, name: str, value: int | None) -> int:
        if value is None:
            return self.folder.size[name == "width"]
        self.folder.check_resolution(value, name)
        return value

    def _warn_of_guidance(self, sampler: str, guidance: float) -> None:
        """Warns of a guidance on top of the one that a model of few steps has learnt."""
        most = samplers.most_guidance(sampler, self.scheduler_config)
        if guidance > most and self.modules["unet"].config.time_cond_proj_dim is None:
            warnings.warn(
                f"guidance_scale = {guidance:g}: models of few steps, drawn by {sampler}, have learnt their guidance; "
                f"more than {most:g} burns the colors; 1 is right, at half the compute",
                stacklevel=3,
            )

    def _warn(self, prompts: list[str]) -> None:
        """Warns of the words that `Folder.tokenize` cuts off, once for each text."""
        length = self.folder.text_length
        for text in dict.fromkeys(prompts):
            tokens = self.folder.tokenizer(text, return_offsets_mapping=True, verbose=False)
            if len(tokens["input_ids"]) > length:  # the first and the last one are markers
                cut = tokens["offset_mapping"][length - 1][0]
                lost = " ".join(text[text.rfind(" ", 0, cut) + 1 :].split())  # a word cut in two is named whole
                warnings.warn(
                    f"the text encoder takes {length - 2} tokens, and this prompt has "
                    f"{len(tokens['input_ids']) - 2}: not seen is {lost!r}",
                    stacklevel=3,
                )


def _with(name: str, lora: Sequence) -> str:
    return WITH.join([name, *(os.path.basename(file) for file in lora)])


def _each(name: str, value, kind: type, n: int) -> list:
    """A list of n values: one for all prompts, or one for each."""
    values = [value] * n if isinstance(value, kind) else list(value)
    if len(values) != n:
        raise ValueError(f"{name} has {len(values)} entries for {n} prompts: give one, or one for each")
    return values


def pixels(picture: Picture, width: int, height: int, mode: str = "RGB") -> np.ndarray:
    """float32[height, width, 3] in [0, 1], scaled and cropped around the center, on white where transparent.

    mode: of Pillow; "L" is grey, without the last axis."""
    try:
        image = picture if isinstance(picture, Image.Image) else Image.open(picture)
        image = ImageOps.exif_transpose(image).convert("RGBA")
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no picture {picture}") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{picture} cannot be read as a picture ({error})") from error
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert(mode)
    if image.size != (width, height):
        image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    return np.asarray(image, np.float32) / 255
