"""A folder of drawn pictures that goes on where it stopped: what is there is kept, every file is whole or absent.

    000000.png 000001.png ...   picture i is of prompt i, from noise that depends on the seed and on i alone
    settings.json               what they were drawn with; another model or sampler is refused

So neither the batch, nor the number of devices or processes, nor an interruption changes what is drawn.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from PIL import Image
from tqdm import tqdm

SETTINGS = "settings.json"


def draw(
    folder: Path,
    prompts: Sequence[str],
    draw_batch: Callable[[list[str], np.ndarray], np.ndarray],
    *,
    settings: dict,
    latents: tuple[int, int, int],
    seed: int,
    batch_size: int,
    size: int | None = None,
    suffix: str = ".png",
    process_index: int = 0,
    process_count: int = 1,
    desc: str = "drawing",
) -> list[Path]:
    """Draws what is missing of this process's share of the pictures, and returns the paths of all, in order.

    draw_batch: (b prompts, unit Gaussian latents float32[b, h, w, c]) -> uint8[b, H, W, 3], always called with
    b = batch_size. settings: what `draw_batch` depends on, JSON. latents: (h, w, c). size: pixels a side of what
    is kept, resized as Pillow does by default (bicubic); None for all. suffix: ".png", or ".jpg" at Pillow's
    quality. Process i of n draws the prompts i, i + n, ...: `folder` is one that all of them see.
    Raises ValueError if the folder holds pictures that were drawn with other settings.
    """
    folder = Path(folder)
    digest = hashlib.sha256("\0".join(prompts).encode()).hexdigest()[:16]
    claim(folder, settings | {"prompts": len(prompts), "prompts_sha256": digest, "seed": seed, "size": size})
    paths = [folder / f"{i:06d}{suffix}" for i in range(len(prompts))]
    mine = range(process_index, len(prompts), process_count)
    missing = [i for i in mine if not paths[i].is_file()]
    with tqdm(
        total=len(mine), initial=len(mine) - len(missing), desc=desc, unit=" pictures", mininterval=1
    ) as bar:
        for start in range(0, len(missing), batch_size):
            here = missing[start : start + batch_size]
            filled = here + here[-1:] * (batch_size - len(here))  # one shape: one compiled program
            noise = np.stack([noise_of(seed, i, latents) for i in filled])
            images = draw_batch([prompts[i] for i in filled], noise)
            for i, image in zip(here, images[: len(here)], strict=True):
                save(image, paths[i], size)
            bar.update(len(here))
    return paths


def noise_of(seed: int, index: int, shape: tuple[int, ...]) -> np.ndarray:
    """The latents float32[shape] from which picture `index` is drawn, unit Gaussian."""
    return np.random.default_rng([seed, index]).standard_normal(shape, np.float32)


def save(image: np.ndarray, path: Path, size: int | None = None) -> None:
    """Writes uint8[H, W, 3] under another name and renames it: a picture that is there is whole."""
    picture = Image.fromarray(image)
    if size is not None and picture.size != (size, size):
        picture = picture.resize((size, size))
    scratch = path.with_name(f".{path.name}")
    picture.save(scratch, "JPEG" if path.suffix == ".jpg" else "PNG")
    scratch.rename(path)


def read(path: Path, size: int | None = None) -> np.ndarray:
    """uint8[H, W, 3] of a picture file; `size`: squashed to so many pixels a side. ValueError if it is not one."""
    try:
        with Image.open(path) as picture:
            picture = picture.convert("RGB")
            return np.asarray(picture if size is None else picture.resize((size, size)))
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a picture ({error}): remove it and run again") from error


def claim(folder: Path, settings: dict) -> None:
    """Writes settings.json, or compares it. Raises ValueError naming every setting that is not the same."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / SETTINGS
    if path.is_file():
        before = json.loads(path.read_text())
        changed = [
            f"{name} was {before.get(name)!r} and is {settings.get(name)!r}"
            for name in sorted(before.keys() | settings.keys())
            if before.get(name) != settings.get(name)
        ]
        if changed:
            raise ValueError(
                f"{folder} holds pictures drawn with other settings ({'; '.join(changed)}): remove that folder, or "
                "choose another --out"
            )
        return
    scratch = path.with_name(f".{SETTINGS}.{os.getpid()}")  # several processes may do this at once
    scratch.write_text(json.dumps(settings, indent=2) + "\n")
    scratch.rename(path)


def fingerprint(params: dict) -> str:
    """Of all weights {part: tree}, so that pictures of an older checkpoint are not taken for today's."""
    digest = hashlib.sha256()
    for path, x in sorted(flatten_dict(jax.device_get(params)).items()):
        digest.update("/".join(path).encode() + np.ascontiguousarray(x).view(np.uint8).tobytes())
    return digest.hexdigest()[:16]
