"""Files that diffusers and transformers write, and what stands in for the large networks of scores."""

from pathlib import Path

import pytest

from tests.parity.references import clip_tokenizer, perturb
from tests.tiny import CAPTIONS, SCHEDULER, TEXT, TEXT_2, UNET, UNET_XL, VAE


@pytest.fixture(scope="session")
def diffusers_pipeline(tmp_path_factory) -> Path:
    """A pipeline folder as diffusers writes it: random weights, 8x8 latents, 32x32 pixels. Read only."""
    import torch
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)  # `perturb` adds to biases that torch itself draws
    tokenizer = clip_tokenizer(CAPTIONS, max_length=16)
    n = len(tokenizer)
    ends = dict(bos_token_id=n - 2, eos_token_id=n - 1, pad_token_id=n - 1)
    text = CLIPTextConfig(vocab_size=n, max_position_embeddings=16, **TEXT, **ends)
    folder = tmp_path_factory.mktemp("diffusers") / "pipeline"
    StableDiffusionPipeline(
        unet=perturb(UNet2DConditionModel(**UNET), 0),
        vae=perturb(AutoencoderKL(**VAE), 1),
        text_encoder=perturb(CLIPTextModel(text), 2),
        tokenizer=tokenizer,
        scheduler=PNDMScheduler(**SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.fixture(scope="session")
def diffusers_xl(tmp_path_factory) -> Path:
    """A folder of Stable Diffusion XL as diffusers writes it; the second tokenizer pads with "!". Read only."""
    return save_xl(tmp_path_factory.mktemp("diffusers") / "xl", UNET_XL)


@pytest.fixture(scope="session")
def deep_xl(tmp_path_factory) -> Path:
    """The same with the depths of the real one. Read only."""
    depths = {"transformer_layers_per_block": (1, 2, 10)}
    return save_xl(tmp_path_factory.mktemp("diffusers") / "deep", UNET_XL | depths)


def save_xl(folder: Path, unet: dict) -> Path:
    import torch
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    tokenizer, other = (clip_tokenizer(CAPTIONS, max_length=16) for _ in range(2))
    other.pad_token = "!"
    n = len(tokenizer)
    ends = dict(bos_token_id=n - 2, eos_token_id=n - 1, pad_token_id=n - 1)
    text, text_2 = (
        CLIPTextConfig(vocab_size=n, max_position_embeddings=16, **sizes, **ends) for sizes in (TEXT, TEXT_2)
    )
    schedule = {name: value for name, value in SCHEDULER.items() if name != "skip_prk_steps"}
    StableDiffusionXLPipeline(
        unet=perturb(UNet2DConditionModel(**unet), 0),
        vae=perturb(AutoencoderKL(**VAE | {"scaling_factor": 0.13025}), 1),
        text_encoder=perturb(CLIPTextModel(text), 2),
        text_encoder_2=perturb(CLIPTextModelWithProjection(text_2), 3),
        tokenizer=tokenizer,
        tokenizer_2=other,
        scheduler=EulerDiscreteScheduler(timestep_spacing="leading", **schedule),
        add_watermarker=False,
    ).save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory) -> Path:
    """A CLIP of transformers with random weights, as `save_pretrained` writes it."""
    import torch
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    tokenizer = clip_tokenizer(CAPTIONS, max_length=16)
    n = len(tokenizer)
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    ends = dict(bos_token_id=n - 2, eos_token_id=n - 1, pad_token_id=n - 1)
    config = CLIPConfig(
        text_config=dict(vocab_size=n, max_position_embeddings=16, **sizes, **ends),
        vision_config=dict(image_size=32, patch_size=8, **sizes),
        projection_dim=8,
    )
    torch.manual_seed(0)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    folder = tmp_path_factory.mktemp("clip")
    CLIPModel(config).save_pretrained(folder)
    CLIPProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture
def inception():
    """Stands in for InceptionV3: means of colours in place of features and logits."""
    import torch

    class Inception(torch.nn.Module):
        def forward(self, images):
            assert images.dtype == torch.uint8 and images.shape[1:] == (3, 32, 32)
            cells = images.float().unfold(2, 16, 16).unfold(3, 16, 16).mean((-1, -2)).flatten(1)
            return cells, cells / 20

    return Inception()
