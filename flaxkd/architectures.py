"""Published teachers as architectures without weights: what planning a run needs of a hub id that is not at hand."""

import json
from pathlib import Path
from typing import NamedTuple

from flaxkd import blank, pretrained, students

# vae/, scheduler/ and text_encoder/config.json of stable-diffusion-v1-5 and stable-diffusion-2-1 on the hub.
VAE = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "out_channels": 3,
    "sample_size": 512,
    "scaling_factor": 0.18215,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
EPSILON = {
    "_class_name": "PNDMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}
CLIP_L = {
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-5,
    "max_position_embeddings": 77,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "vocab_size": 49408,
}
OPENCLIP_H = CLIP_L | {
    "hidden_act": "gelu",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 23,
}


class Architecture(NamedTuple):
    """The configurations of a pipeline's parts, and the hub ids of weights that have them."""

    unet: dict
    text_encoder: dict
    scheduler: dict
    hub_ids: tuple[str, ...]
    vae: dict = VAE


ARCHITECTURES = {
    "sd15": Architecture(
        students.SD15,
        CLIP_L,
        EPSILON,
        (
            "SG161222/Realistic_Vision_V4.0",
            "CompVis/stable-diffusion-v1-4",
            "runwayml/stable-diffusion-v1-5",
            "stable-diffusion-v1-5/stable-diffusion-v1-5",
        ),
    ),
    "sd21_base": Architecture(
        students.SD21 | {"sample_size": 64, "upcast_attention": False},
        OPENCLIP_H,
        EPSILON,
        ("stabilityai/stable-diffusion-2-1-base", "stabilityai/stable-diffusion-2-base"),
    ),
    "sd21": Architecture(
        students.SD21,
        OPENCLIP_H,
        EPSILON | {"prediction_type": "v_prediction"},
        ("stabilityai/stable-diffusion-2-1",),
    ),
}


def find(teacher: str | None) -> Architecture | None:
    """The architecture of that name or hub id, or None if it is in no row."""
    rows = ARCHITECTURES.items()
    return next((row for name, row in rows if teacher == name or teacher in row.hub_ids), None)


def write(architecture: Architecture, out: Path) -> Path:
    """A pipeline folder without weights: the configurations, and a tokenizer of the same length; returns `out`."""
    for part, name in pretrained.CONFIGS.items():
        (out / part).mkdir(parents=True, exist_ok=True)
        (out / part / name).write_text(json.dumps(getattr(architecture, part), indent=2) + "\n")
    length = architecture.text_encoder["max_position_embeddings"]
    blank.train_tokenizer(
        ["a picture"], 520, length, out / "tokenizer"
    )  # which words it knows is of no account
    return out
