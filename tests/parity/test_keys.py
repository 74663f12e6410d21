"""One rule between two naming schemes, tried on every tensor of the full-size models: shapes, no memory."""

import pytest
from flax.traverse_util import flatten_dict

from flaxkd import pretrained
from flaxkd.pretrained import keys
from tests.pretrained.test_keys import hollow

torch = pytest.importorskip("torch")

VAE = dict(
    block_out_channels=(128, 256, 512, 512),
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    layers_per_block=2,
)


def reference(name: str):
    """A full-size model of PyTorch on the meta device, and its part of a pipeline."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    sd15_text = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    sd21_text = CLIPTextConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16)
    sd21 = dict(cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True)
    make = {
        "unet sd15": lambda: UNet2DConditionModel(cross_attention_dim=768),
        "unet sd21": lambda: UNet2DConditionModel(**sd21),
        "vae": lambda: AutoencoderKL(**VAE),
        "text_encoder sd15": lambda: CLIPTextModel(sd15_text),
        "text_encoder sd21": lambda: CLIPTextModel(sd21_text),
    }[name]
    with torch.device("meta"):
        return make(), name.split()[0]


TENSORS = {
    "unet sd15": 686,
    "unet sd21": 686,
    "vae": 248,
    "text_encoder sd15": 196,
    "text_encoder sd21": 372,
}


@pytest.mark.parametrize("name, tensors", TENSORS.items())
def test_the_rule_is_a_bijection_on_full_size_models(name, tensors):
    model, part = reference(name)
    config = model.config.to_dict() if part == "text_encoder" else dict(model.config)
    like = pretrained.shapes(part, config)
    prefix = "text_model." if part == "text_encoder" else ""
    state = {prefix + key: hollow(tensor.shape) for key, tensor in model.state_dict().items()}
    assert len(state) == tensors

    there = {key: keys.to_flax(key, array) for key, array in state.items()}
    assert {path: array.shape for path, array in there.values()} == {
        path: leaf.shape for path, leaf in flatten_dict(like).items()
    }
    for key, (path, array) in there.items():
        back, again = keys.to_diffusers(path, array)
        assert (back, again.shape) == (key, state[key].shape)
