"""How like a subject are drawn pictures? DINO and CLIP-I, as in DreamBooth (Ruiz et al. 2023, arXiv:2208.12242, 4.1).

Both are mean cosines of embeddings over all pairs of a drawn and a real picture: of DINO's ViT-S/16, which tells two
dogs apart, and of CLIP's, which tells a dog from a cat. CLIP-T, the cosine to the prompt, is the CLIP score of
scores.py. torch is used within functions alone, as there.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flaxkd.evaluate import scores
from flaxkd.machine import progress

DINO = "facebook/dino-vits16"


def load_dino(model: str) -> tuple[Any, Any]:
    """(ViT, image processor) of transformers, from a folder or a hub id. Raises like `scores.load_clip`."""
    import transformers

    try:
        vit = transformers.AutoModel.from_pretrained(model).eval()
        return vit, transformers.AutoImageProcessor.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"DINO cannot be loaded from {model}: {str(error).strip().partition(chr(10))[0]}\nWithout a network: run "
            f"`hf download {model} --local-dir DIR` on another machine, copy DIR here, and pass --dino DIR"
        ) from error


class Subject(NamedTuple):
    """Its pictures and the networks, opened before anything is drawn."""

    pictures: list[Path]
    dino: tuple[Any, Any]
    clip: tuple[Any, Any]


def open_subject(folder: Path, dino: str, clip: tuple[Any, Any]) -> Subject:
    """clip: from `scores.load_clip`. Raises like `load_dino` and `scores.pictures_in`."""
    return Subject(scores.pictures_in(folder), load_dino(dino), clip)


def embeddings(
    paths: Sequence[Path], read: Callable, network: tuple[Any, Any], embed: Callable, batch_size: int, desc: str
) -> np.ndarray:
    """float64[n, d] of unit length. embed: (model, pixel values) -> [b, d]. read: path -> uint8[H, W, 3]."""
    import torch

    (model, processor), where, found = network, scores.device(), []
    model = model.to(where)
    with progress.Bar(len(paths), desc, " pictures") as bar:
        for start in range(0, len(paths), batch_size):
            images = [read(path) for path in paths[start : start + batch_size]]
            pixels = processor(images=images, return_tensors="pt")["pixel_values"].to(where)
            with torch.inference_mode():
                found.append(torch.nn.functional.normalize(embed(model, pixels).double(), dim=-1).cpu().numpy())
            bar.update(len(images))
    return np.concatenate(found)


def score(subject: Subject, paths: Sequence[Path], read: Callable, batch_size: int, name: str) -> dict[str, float]:
    """{"dino", "clip_i"} of drawn pictures."""
    of_dino = lambda vit, pixels: vit(pixels).last_hidden_state[:, 0]
    of_clip = lambda clip, pixels: clip.visual_projection(clip.vision_model(pixels).pooler_output)
    clip = subject.clip[0], subject.clip[1].image_processor
    row = {}
    for key, network, embed in (("dino", subject.dino, of_dino), ("clip_i", clip, of_clip)):
        drawn = embeddings(paths, read, network, embed, batch_size, f"{key}, {name}")
        real = embeddings(subject.pictures, read, network, embed, batch_size, f"{key}, subject")
        row[key] = float(drawn.mean(0) @ real.mean(0))  # the mean over all pairs
    return row
