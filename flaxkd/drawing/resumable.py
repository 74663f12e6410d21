"""A resumable folder of drawn pictures: finished pictures are reused, and every file is whole or absent.

    000000.png 000001.png ...   picture i is of prompt i, from noise that depends on the seed and on i alone
    settings.json               what they were drawn with; another model or sampler is refused

The pictures depend neither on the batch, nor on the number of devices or processes, nor on interruptions.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from PIL import Image

from flaxkd.machine import files
from flaxkd.pretrained import Folder

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
) -> list[Path]:
    """Draws the missing pictures of this process's share, and returns the paths of all pictures, in order.

    pictures_of: numbers of prompts -> their pictures uint8[H, W, 3], in that order. settings: what the pictures depend
    on, JSON. size: pixels a side of a stored picture, resized with Pillow's default (bicubic); None: not resized.
    suffix: ".png", or ".jpg" at Pillow's quality. Process i of n draws the prompts i, i + n, ...: all processes share
    `folder`. Raises ValueError if the folder holds pictures drawn with other settings.
    """
    folder = Path(folder)
    files.claim(
        folder / SETTINGS,
        settings | {"prompts": len(prompts), "prompts_sha256": digest(prompts), "size": size},
        differ="holds pictures drawn with other settings",
        remedy="Remove that folder, or choose another --out.",
    )
    shared = {"process_index": process_index, "process_count": process_count}
    return fill(folder, len(prompts), pictures_of, size=size, suffix=suffix, **shared)


def digest(prompts: Sequence[str]) -> str:
    """A hash of prompts in their order."""
    return hashlib.sha256("\0".join(prompts).encode()).hexdigest()[:16]


def fill(
    folder: Path, n: int, pictures_of: Callable[[list[int]], Iterable[np.ndarray]], *,
    size: int | None = None, suffix: str = ".png", process_index: int = 0, process_count: int = 1,
) -> list[Path]:  # fmt: skip
    """Draws the missing ones of n pictures in a folder that is claimed for them. For the arguments, see `draw`."""
    paths = [folder / f"{i:06d}{suffix}" for i in range(n)]
    mine = range(process_index, n, process_count)
    missing = [i for i in mine if not paths[i].is_file()]
    for i, image in zip(missing, pictures_of(missing) if missing else (), strict=True):
        save(image, paths[i], size)
    return paths


def save(image: np.ndarray, path: Path, size: int | None = None) -> None:
    """Writes a picture uint8[H, W, 3], whole or not at all. size: resized to that many pixels a side."""
    picture = Image.fromarray(image)
    if size is not None and picture.size != (size, size):
        picture = picture.resize((size, size))
    with files.whole(path) as scratch:
        picture.save(scratch, "JPEG" if path.suffix == ".jpg" else "PNG")


def read(path: Path, size: int | None = None) -> np.ndarray:
    """A picture file as uint8[H, W, 3]. size: squashed to that many pixels a side. Raises ValueError if unreadable."""
    try:
        with Image.open(path) as picture:
            picture = picture.convert("RGB")
            return np.asarray(picture if size is None else picture.resize((size, size)))
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a picture ({error}): remove it and run again") from error


def fingerprint(params: dict, folder: Folder | None = None) -> str:
    """A hash of all weights {part: tree}: it tells pictures of an older checkpoint from new ones.

    folder: its configurations are hashed too, such as the layers of a text encoder that are left out."""
    digest = hashlib.sha256()
    if folder is not None:
        configs = [folder.config(part) for part in (*folder.parts, "scheduler")]
        shown = [{key: value for key, value in config.items() if not key.startswith("_")} for config in configs]
        digest.update(json.dumps([shown, str(folder.quantization)], sort_keys=True, default=str).encode())
    for path, x in sorted(flatten_dict(jax.device_get(params)).items()):
        digest.update("/".join(path).encode() + np.ascontiguousarray(x).view(np.uint8).tobytes())
    return digest.hexdigest()[:16]
