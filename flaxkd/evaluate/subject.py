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
    return scores.pretrained("DINO", model, "AutoModel", "AutoImageProcessor")


class Subject(NamedTuple):
    """Its pictures and the networks, opened before anything is drawn."""

    pictures: list[Path]
    networks: dict[str, tuple]  # {"dino", "clip_i": (network and processor, (network, pixel values) -> [b, d])}
    means: dict[str, np.ndarray] | None = None  # {the same: mean embedding of the pictures, float64[d]}: `prepared`


def open_subject(folder: Path, dino: str, clip: tuple[Any, Any]) -> Subject:
    """clip: from `scores.load_clip`. Raises like `load_dino` and `scores.pictures_in`."""
    of_dino = lambda vit, pixels: vit(pixels).last_hidden_state[:, 0]
    of_clip = lambda clip, pixels: clip.visual_projection(clip.vision_model(pixels).pooler_output)
    pictures, (model, processor) = scores.pictures_in(folder), clip
    networks = {"dino": (load_dino(dino), of_dino), "clip_i": ((model, processor.image_processor), of_clip)}
    return Subject(pictures, networks)


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


def prepared(subject: Subject, read: Callable, batch_size: int) -> Subject:
    """The subject with the mean embeddings of its own pictures, once for all models."""
    return subject._replace(means=_means(subject, subject.pictures, read, batch_size, "subject"))


def score(subject: Subject, paths: Sequence[Path], read: Callable, batch_size: int, name: str) -> dict[str, float]:
    """{"dino", "clip_i"} of drawn pictures. subject: from `prepared`."""
    drawn = _means(subject, paths, read, batch_size, name)
    return {key: float(mean @ subject.means[key]) for key, mean in drawn.items()}  # the mean over all pairs


def _means(subject: Subject, paths: Sequence[Path], read: Callable, batch_size: int, name: str) -> dict:
    mean = lambda key, how: embeddings(paths, read, *how, batch_size, f"{key}, {name}").mean(0)
    return {key: mean(key, how) for key, how in subject.networks.items()}
