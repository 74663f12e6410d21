"""A folder of drawn pictures that is resumed: finished pictures are reused, every file is whole or absent.

    000000.png 000001.png ...   picture i is of prompt i, from noise that depends on the seed and on i alone
    settings.json               what they were drawn with; another model or sampler is refused

So neither the batch, nor the number of devices or processes, nor an interruption changes what is drawn.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from PIL import Image
from tqdm import tqdm

from flaxkd.machine import files

SETTINGS = "settings.json"


def draw(
    folder: Path,
    prompts: Sequence[str],
    pictures_of: Callable[[list[int]], Iterable[np.ndarray]],
    *,
    settings: dict,
    size: int | None = None,
    suffix: str = ".png",
    process_index: int = 0,
    process_count: int = 1,
    desc: str = "drawing",
) -> list[Path]:
    """Draws what is missing of this process's share of the pictures, and returns the paths of all, in order.

    pictures_of: numbers of prompts -> their pictures uint8[H, W, 3], in that order. settings: what the pictures depend
    on, JSON. size: pixels a side of what is kept, resized as Pillow does by default (bicubic); None for all. suffix:
    ".png", or ".jpg" at Pillow's quality. Process i of n draws the prompts i, i + n, ...: `folder` is one that all of
    them see. Raises ValueError if the folder holds pictures that were drawn with other settings.
    """
    folder = Path(folder)
    digest = hashlib.sha256("\0".join(prompts).encode()).hexdigest()[:16]
    files.claim(
        folder / SETTINGS,
        settings | {"prompts": len(prompts), "prompts_sha256": digest, "size": size},
        differ="holds pictures drawn with other settings",
        remedy="Remove that folder, or choose another --out.",
    )
    paths = [folder / f"{i:06d}{suffix}" for i in range(len(prompts))]
    mine = range(process_index, len(prompts), process_count)
    missing = [i for i in mine if not paths[i].is_file()]
    done = len(mine) - len(missing)
    with tqdm(total=len(mine), initial=done, desc=desc, unit=" pictures", mininterval=1) as bar:
        for i, image in zip(missing, pictures_of(missing) if missing else (), strict=True):
            save(image, paths[i], size)
            bar.update()
    return paths


def noise_of(seed: int, index: int, shape: tuple[int, ...]) -> np.ndarray:
    """The latents float32[shape] from which picture `index` is drawn, unit Gaussian."""
    return np.random.default_rng([seed, index]).standard_normal(shape, np.float32)


def save(image: np.ndarray, path: Path, size: int | None = None) -> None:
    """Writes uint8[H, W, 3], whole or not at all."""
    picture = Image.fromarray(image)
    if size is not None and picture.size != (size, size):
        picture = picture.resize((size, size))
    with files.whole(path) as scratch:
        picture.save(scratch, "JPEG" if path.suffix == ".jpg" else "PNG")


def read(path: Path, size: int | None = None) -> np.ndarray:
    """uint8[H, W, 3] of a picture file; `size`: squashed to so many pixels a side. ValueError if it is not one."""
    try:
        with Image.open(path) as picture:
            picture = picture.convert("RGB")
            return np.asarray(picture if size is None else picture.resize((size, size)))
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a picture ({error}): remove it and run again") from error


def fingerprint(params: dict) -> str:
    """Of all weights {part: tree}, so that pictures of an older checkpoint are not taken for today's."""
    digest = hashlib.sha256()
    for path, x in sorted(flatten_dict(jax.device_get(params)).items()):
        digest.update("/".join(path).encode() + np.ascontiguousarray(x).view(np.uint8).tobytes())
    return digest.hexdigest()[:16]
