"""A Stable Diffusion of a megabyte, and one of XL: their configurations and weights."""

import tempfile
from pathlib import Path

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from flaxkd import pretrained
from flaxkd.pretrained import families, fresh

CAPTIONS = ["red apple", "green apple", "grinning face", "flag: Ivory Coast", "it's 12 o'clock"]

UNET = dict(  # attention in one stage alone: half as much to compile. tests/parity/test_models.py has it in three.
    sample_size=8,
    block_out_channels=(8, 16, 16, 16),
    down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    layers_per_block=2,
    norm_num_groups=4,
    attention_head_dim=2,
    cross_attention_dim=16,
)
# The same in a UNet of XL, for tests that compile it and need no more.
INNERMOST = dict(
    down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
)
UNET_XL = dict(
    sample_size=8,
    block_out_channels=(8, 16, 32),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    layers_per_block=2,
    norm_num_groups=4,
    attention_head_dim=(1, 2, 4),
    transformer_layers_per_block=(1, 1, 2),
    use_linear_projection=True,
    cross_attention_dim=16 + 16,
    addition_embed_type="text_time",
    addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=6 * 8 + 12,
)
VAE = dict(
    sample_size=32,
    block_out_channels=(8, 8, 16),
    down_block_types=("DownEncoderBlock2D",) * 3,
    up_block_types=("UpDecoderBlock2D",) * 3,
    layers_per_block=1,
    norm_num_groups=4,
    latent_channels=4,
)
TEXT = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, projection_dim=16)
TEXT_2 = TEXT | dict(num_hidden_layers=3, hidden_act="gelu", projection_dim=12)
SCHEDULER = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1)


def ids(folder, captions: list[str]) -> np.ndarray:
    """The token ids of captions for the first text encoder of a folder: int32[n, l]."""
    return folder.tokenize(captions)["input_ids"]


def weights(shapes: dict, seed: int) -> dict:
    """Random weights of unit scale, such that no two tensors are alike and no norm is the identity."""
    rng, params = np.random.default_rng(seed), {}
    for path, like in sorted(flatten_dict(shapes).items()):
        noise = rng.standard_normal(like.shape, np.float32)
        if path[-1] in ("kernel", "embedding"):
            fan_in = np.prod(like.shape[:-1]) if path[-1] == "kernel" else like.shape[-1]
            params[path] = noise / np.float32(np.sqrt(fan_in))
        else:
            params[path] = np.float32(path[-1] == "scale") + np.float32(0.2) * noise
    return unflatten_dict(params)


LENGTH = {"max_position_embeddings": 16}
SD = {
    "unet": families.SD15 | UNET,
    "vae": families.VAE | VAE,
    "text_encoder": families.CLIP_L | TEXT | LENGTH,
    "scheduler": families.EPSILON | SCHEDULER,
    "vocab_size": 550,
}
XL = SD | {
    "unet": families.SDXL | UNET_XL,
    "vae": families.ARCHITECTURES["sdxl"].configs["vae"] | VAE,
    "text_encoder_2": families.OPENCLIP_BIGG | TEXT_2 | LENGTH,
    "scheduler": families.EULER | {"beta_start": 0.00085},
}


def write(out: Path, architecture: dict = SD) -> Path:
    """Writes the pipeline folder, with every key that those on the hub have. architecture: SD or XL."""
    with tempfile.TemporaryDirectory() as scratch:
        source = fresh.write(Path(scratch) / "pipeline", architecture, CAPTIONS, seed=0)
        parts = {
            part: (source.config(part), weights(source.shapes(part), seed)) for seed, part in enumerate(source.parts)
        }
        return pretrained.save(out, source=source, parts=parts)
