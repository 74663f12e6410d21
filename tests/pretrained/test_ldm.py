"""The names of the original code: facts about them, and both directions of the rule."""

import numpy as np
import pytest

from flaxkd.pretrained import ldm
from tests.pretrained import full_size


def inside(part: str, there: dict) -> dict:
    prefix = next(p for p in ldm.PREFIXES[part] if next(iter(there)).startswith(p))
    return {key.removeprefix(prefix): x for key, x in there.items()}


NUMBERS = {  # of input_blocks and output_blocks
    (None, False): (12, 12), (None, True): (12, 12),
    ("sd_small", False): (8, 8), ("sd_small", True): ([0, 1, 3, 4, 6, 7, 9, 10], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]),
    ("sd_tiny", False): (6, 6), ("sd_tiny", True): ([0, 1, 3, 4, 6, 7], [0, 1, 2, 3, 4, 5, 6, 7]),
}  # fmt: skip


@pytest.mark.parametrize(("student", "gaps"), NUMBERS)
def test_a_unet_of_full_size_goes_there_and_back(student, gaps):
    _, ours = full_size.unet("sd15", student)
    there = ldm.to_ldm("unet", ours, gaps=gaps)
    assert len(there) == len(ours) and (student or len(ours) == 686)
    numbers = [ldm.numbers(there, f"model.diffusion_model.{name}.") for name in ("input_blocks", "output_blocks")]
    assert numbers == [list(range(x)) if isinstance(x, int) else x for x in NUMBERS[student, gaps]]
    assert full_size.shapes(ldm.to_diffusers("unet", inside("unet", there))) == full_size.shapes(ours)


def test_names_of_the_original_code():
    """As in v1-5-pruned.safetensors and in files that stable-diffusion.cpp builds its tiny UNet from."""
    written = lambda student, gaps: ldm.to_ldm("unet", full_size.unet("sd15", student)[1], gaps=gaps)
    whole, tiny, gaps = written(None, False), written("sd_tiny", False), written("sd_tiny", True)
    prefix = "model.diffusion_model."
    assert whole[f"{prefix}input_blocks.4.0.skip_connection.weight"].shape == (640, 320, 1, 1)
    assert whole[f"{prefix}input_blocks.9.0.op.weight"].shape == (1280, 1280, 3, 3)
    assert whole[f"{prefix}middle_block.1.proj_in.weight"].shape == (1280, 1280, 1, 1)
    assert whole[f"{prefix}output_blocks.2.1.conv.weight"].shape == (1280, 1280, 3, 3)
    assert whole[f"{prefix}output_blocks.8.2.conv.weight"].shape == (640, 640, 3, 3)
    assert whole[f"{prefix}output_blocks.11.0.skip_connection.weight"].shape == (320, 640, 1, 1)
    assert f"{prefix}output_blocks.2.2.conv.weight" not in whole
    assert f"{prefix}output_blocks.1.2.conv.weight" in tiny  # after its attention
    assert {f"{prefix}output_blocks.2.1.conv.weight", f"{prefix}output_blocks.5.2.conv.weight"} <= gaps.keys()
    assert not [key for key in tiny if "middle_block" in key]


def test_the_autoencoder_and_the_text_encoder_of_full_size():
    vae = full_size.tensors("vae", "sd15")
    there = ldm.to_ldm("vae", vae)
    assert len(there) == 248 and there["first_stage_model.decoder.up.3.block.0.conv1.weight"].shape == (512, 512, 3, 3)
    assert there["first_stage_model.decoder.up.0.block.0.nin_shortcut.weight"].shape == (128, 256, 1, 1)
    assert there["first_stage_model.encoder.mid.attn_1.q.weight"].shape == (512, 512, 1, 1)
    assert there["first_stage_model.encoder.down.2.downsample.conv.weight"].shape == (512, 512, 3, 3)
    assert full_size.shapes(ldm.to_diffusers("vae", inside("vae", there))) == full_size.shapes(vae)
    text = full_size.tensors("text_encoder", "sd21")
    there = ldm.to_ldm("text_encoder", text, prefix=ldm.OPEN_CLIP)
    assert len(there) == 280
    assert full_size.shapes(ldm.to_diffusers("text_encoder", inside("text_encoder", there))) == full_size.shapes(text)
    assert there["cond_stage_model.model.transformer.resblocks.22.attn.in_proj_weight"].shape == (3072, 1024)
    assert there["cond_stage_model.model.positional_embedding"].shape == (77, 1024)


@pytest.mark.parametrize("student", [None, "ssd_1b", "koala_700m"])
def test_a_unet_of_sdxl_goes_there_and_back(student):
    """Names as in sd_xl_base_1.0.safetensors; a student's are counted consecutively."""
    _, ours = full_size.unet("sdxl", student)
    there = ldm.to_ldm("unet", ours)
    assert len(there) == len(ours) == {None: 1680, "ssd_1b": 944, "koala_700m": 584}[student]
    numbers = [len(ldm.numbers(there, f"model.diffusion_model.{name}.")) for name in ("input_blocks", "output_blocks")]
    assert numbers == ([6, 6] if student == "koala_700m" else [9, 9])
    assert full_size.shapes(ldm.to_diffusers("unet", inside("unet", there))) == full_size.shapes(ours)
    prefix, last = "model.diffusion_model.", {None: 9, "ssd_1b": 3, "koala_700m": 4}[student]
    assert there[f"{prefix}label_emb.0.0.weight"].shape == (1280, 2816)
    deepest = f"{prefix}input_blocks.{5 if student == 'koala_700m' else 7}.1.transformer_blocks."
    assert ldm.numbers(there, deepest)[-1] == last
    middle = {key.split(".")[3] for key in there if "middle_block" in key}
    assert middle == {None: {"0", "1", "2"}, "ssd_1b": {"0"}, "koala_700m": set()}[student]


def test_the_second_text_encoder_of_sdxl():
    text = full_size.tensors("text_encoder_2", "sdxl")
    there = ldm.to_ldm("text_encoder_2", text)
    prefix = "conditioner.embedders.1.model."
    assert there[f"{prefix}text_projection"].shape == (1280, 1280) and len(there) == 12 * 32 + 5
    assert full_size.shapes(ldm.to_diffusers("text_encoder_2", inside("text_encoder_2", there))) == full_size.shapes(
        text
    )
    there = ldm.to_ldm("text_encoder_2", {"text_projection.weight": np.arange(6).reshape(2, 3)})
    assert there[f"{prefix}text_projection"].tolist() == [[0, 3], [1, 4], [2, 5]]
    first = ldm.to_ldm("text_encoder", {"text_model.final_layer_norm.bias": text}, prefix=ldm.SDXL_CLIP)
    assert [*first] == ["conditioner.embedders.0.transformer.text_model.final_layer_norm.bias"]


def test_queries_keys_and_values_are_rows_in_this_order():
    stem = "text_model.encoder.layers.0.self_attn"
    parts = {f"{stem}.{name}.weight": np.full((2, 2), i) for i, name in enumerate(("q_proj", "k_proj", "v_proj"))}
    parts |= {f"{stem}.{name}.bias": np.full(2, i) for i, name in enumerate(("q_proj", "k_proj", "v_proj"))}
    there = ldm.to_ldm("text_encoder", parts, prefix=ldm.OPEN_CLIP)
    assert there.keys() == {
        f"cond_stage_model.model.transformer.resblocks.0.attn.in_proj_{x}" for x in ("weight", "bias")
    }
    assert next(iter(there.values()))[:, 0].tolist() == [0, 0, 1, 1, 2, 2]
    back = ldm.to_diffusers("text_encoder", inside("text_encoder", there))
    assert all(np.array_equal(back[key], parts[key]) for key in parts) and back.keys() == parts.keys()


def test_a_tensor_without_a_name_is_named():
    with pytest.raises(ValueError, match=r"class_embedding\.linear_1\.weight has no name"):
        ldm.to_ldm("unet", {"conv_in.weight": np.zeros(1), "class_embedding.linear_1.weight": np.zeros(1)})
