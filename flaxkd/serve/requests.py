"""What a client may ask for: every field with its limits, checked before anything is queued.

The APIs translate their own fields into these. Nothing in a request is ever opened: no path, no address.
"""

import base64
import binascii
import dataclasses
import io
import math
import secrets
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from flaxkd.diffusion import samplers
from flaxkd.drawing.pipeline import Pipeline, pixels

MOST_SEED = 2**32 - 1
MOST_PIXELS = 4096 * 4096  # of a picture to start from, before it is scaled
FORMATS = ("PNG", "JPEG", "WEBP")


class Refused(ValueError):
    """A request that is answered with an error. status: of HTTP. field: the one at fault."""

    def __init__(self, message: str, status: int = 422, field: str | None = None):
        super().__init__(message)
        self.status, self.field = status, field


class Limits(NamedTuple):
    """steps: the most of a sampler. count: pictures of one request. prompt: letters. body: bytes of a request."""

    steps: int = 100
    count: int = 10
    prompt: int = 2000
    body: int = 16 * 2**20


@dataclasses.dataclass(frozen=True)
class Served:
    """A model under the name that requests call it by. sizes: (width, height) that may be drawn, its own first.

    parameters: of the UNet."""

    name: str
    pipeline: Pipeline
    sizes: tuple[tuple[int, int], ...]
    parameters: int

    @classmethod
    def of(cls, name: str, pipeline: Pipeline, sizes: tuple[tuple[int, int], ...] = ()) -> "Served":
        """sizes: besides its own. Raises ValueError for one that the model cannot draw, and for an unknown sampler."""
        height, width = pipeline.folder.size
        for pair in sizes:
            for side, value in zip(("width", "height"), pair, strict=True):
                pipeline.folder.check_resolution(value, side)
        samplers.own(pipeline.scheduler_config)
        sizes = tuple(dict.fromkeys([(width, height), *sizes]))
        return cls(name, pipeline, sizes, pipeline.folder.count("unet"))

    @property
    def sampler(self) -> str:
        return samplers.own(self.pipeline.scheduler_config)


class Program(NamedTuple):
    """What is compiled: requests with the same one run through the same programs."""

    model: str
    width: int
    height: int
    guided: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """A checked request for `count` pictures, of which picture i has the seed `seed` + i."""

    model: str
    prompt: str
    negative_prompt: str | None
    width: int
    height: int
    steps: int
    sampler: str
    guidance: float
    seed: int
    count: int
    image: np.ndarray | None  # float32[height, width, 3] in [0, 1]
    strength: float | None
    schedule: samplers.Schedule

    @property
    def program(self) -> Program:
        return Program(self.model, self.width, self.height, self.guidance > 1)

    @property
    def together(self) -> tuple:
        """Pictures for which this is equal are drawn in one batch. Prompts, seeds and guidance may differ."""
        return *self.program, self.steps, self.sampler, self.strength

    def info(self, i: int) -> dict[str, str]:
        """The settings of picture i, as `Pipeline` writes them into a PNG."""
        found = {
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt or "",
            "seed": self.seed + i,
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance,
            "sampler": self.sampler,
            "width": self.width,
            "height": self.height,
            "model": self.model,
        }
        found |= {} if self.strength is None else {"strength": self.strength}
        return {name: str(value) for name, value in found.items()}


# -- Fields: (value of a request) -> value, or ValueError with what it must be ----------------------------------------


def text(most: int) -> Callable[[Any], str]:
    def read(value) -> str:
        if not isinstance(value, str) or len(value) > most:
            raise ValueError(f"must be a text of at most {most} letters")
        return value.encode("utf-8", "replace").decode()

    return read


def whole(low: int, high: int) -> Callable[[Any], int]:
    def read(value) -> int:
        integral = type(value) is int or (type(value) is float and value.is_integer())
        if not integral or not low <= value <= high:
            raise ValueError(f"must be a whole number from {low} to {high}")
        return int(value)

    return read


def number(low: float, high: float) -> Callable[[Any], float]:
    def read(value) -> float:
        if type(value) not in (int, float) or not low <= value <= high:
            raise ValueError(f"must be a number from {low:g} to {high:g}")
        return float(value)

    return read


def picture(most: int) -> Callable[[Any], Image.Image]:
    """Of base64, or of a data URL with it. most: bytes."""

    def read(value) -> Image.Image:
        if not isinstance(value, str) or len(value) > most * 4 // 3 + 100:
            raise ValueError(f"must be a PNG, JPEG or WebP of at most {most} bytes, in base64")
        try:
            data = base64.b64decode(value.partition(",")[2] if value.startswith("data:") else value, validate=True)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            if math.prod(image.size) > MOST_PIXELS:
                raise ValueError(f"has {image.width} x {image.height} pixels: at most {MOST_PIXELS} are read")
            image.load()
        except (OSError, SyntaxError, binascii.Error, Image.DecompressionBombError):
            raise ValueError("is no PNG, JPEG or WebP in base64; addresses and paths are not read") from None
        return image

    return read


def readers(limits: Limits) -> dict[str, Callable[[Any], Any]]:
    """THE TABLE of the fields that a request may have."""
    return {
        "model": text(200),
        "prompt": text(limits.prompt),
        "negative_prompt": text(limits.prompt),
        "width": whole(1, 2**14),
        "height": whole(1, 2**14),
        "steps": whole(1, limits.steps),
        "sampler": text(100),
        "guidance": number(0, 100),
        "seed": whole(-1, MOST_SEED - limits.count),
        "count": whole(1, limits.count),
        "image": picture(limits.body),
        "strength": number(0.01, 1),
    }


def checked(fields: Mapping[str, Any], models: Mapping[str, Served], limits: Limits) -> Request:
    """The request of JSON fields; None stands for one that is missing. Raises Refused, which names the field.

    Only the prompt is needed. Without them, the first model draws, at its own size, with its sampler, steps and
    guidance; a seed of -1 or none is random; an image is changed by a strength of 0.8."""
    known = readers(limits)
    if unknown := [name for name in fields if name not in known]:
        raise Refused(f"{str(unknown[0])[:80]!r} is no field (fields: {', '.join(known)})", field=str(unknown[0])[:80])
    given = {}
    for name, value in fields.items():
        if value is not None:
            try:
                given[name] = known[name](value)
            except ValueError as error:
                raise Refused(f"{name} {error}", field=name) from None
    if not given.get("prompt", "").strip():
        raise Refused("prompt is missing", field="prompt")
    name = given.setdefault("model", next(iter(models)))
    if name not in models:
        raise Refused(f"model {name!r} is not served (served: {', '.join(models)})", 404, "model")
    served, config = models[name], models[name].pipeline.scheduler_config
    size = given.setdefault("width", served.sizes[0][0]), given.setdefault("height", served.sizes[0][1])
    if size not in served.sizes:
        sizes = ", ".join(f"{width} x {height}" for width, height in served.sizes)
        raise Refused(f"{name} is not served at {size[0]} x {size[1]} pixels (sizes: {sizes})", field="width")
    image, strength = given.pop("image", None), given.pop("strength", None)
    if image is None and strength is not None:
        raise Refused("strength is how far to change an image: give one, or no strength", field="strength")
    if image is not None:
        image, strength = pixels(image, *size), 0.8 if strength is None else strength
    try:
        sampler = samplers.name_of(given.pop("sampler", None) or served.sampler)
        steps = given.pop("steps", None) or min(samplers.usual_steps(sampler, config), limits.steps)
        schedule = samplers.schedule(sampler, config, steps, strength)
    except ValueError as error:
        raise Refused(str(error), field="sampler") from None
    seed = given.pop("seed", -1)
    defaults = {"negative_prompt": None, "guidance": served.pipeline.folder.guidance, "count": 1}
    given = defaults | given
    return Request(
        **given | {"guidance": max(given["guidance"], 1.0)},
        image=image,
        strength=strength,
        sampler=sampler,
        steps=steps,
        schedule=schedule,
        seed=secrets.randbelow(2**31) if seed < 0 else seed,
    )
