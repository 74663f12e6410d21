"""One rule between diffusers' names of tensors and those of LDM, the original code of Stable Diffusion (CompVis).

    diffusers, part by part                        LDM, one file: single_file.py
    unet:         down_blocks.0.resnets.1.conv1    model.diffusion_model.input_blocks.2.0.in_layers.2
    vae:          encoder.mid_block.resnets.0      first_stage_model.encoder.mid.block_1
    text_encoder: text_model.encoder.layers.0      cond_stage_model.transformer.text_model.encoder.layers.0   (SD 1.x)
                                                   cond_stage_model.model.transformer.resblocks.0             (SD 2.x)
                                                   conditioner.embedders.0.transformer.text_model...          (SDXL)
    text_encoder_2                                 conditioner.embedders.1.model.transformer.resblocks.0      (SDXL)

Names are pairs of beginnings, as `_unet`, `_vae` and `_open_clip` list them for a network of given blocks; the longest
one that fits is replaced. `to_ldm` and `to_diffusers` follow the same pairs. Some tensors are also stored in another
form: OpenCLIP's q, k and v are one matrix, its projection is transposed, and the autoencoder's attention is made of 1x1
convolutions.

LDM counts the layers of all blocks in one sequence. A student has fewer, and there are two ways to count them:
consecutively, which is what the original code does with fewer layers (ComfyUI, diffusers), and as they are counted in
the whole UNet, with gaps (`gaps`; stable-diffusion.cpp, diffusers' script for the way back). Both are read.
"""

import itertools
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

Pairs = dict[str, str]  # {beginning of diffusers' names: of LDM's}
Tensors = dict[str, np.ndarray]

WHOLE = (2, 3)  # layers of a down and an up block of the whole UNet
# Beginnings of the names of text encoders. Those of OpenCLIP, and they alone, end with "model.".
CLIP, OPEN_CLIP = "cond_stage_model.transformer.", "cond_stage_model.model."
SDXL_CLIP, SDXL_OPEN_CLIP = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
# {part: beginnings of its names in a file}. The first is written, of a text encoder that of its family. The last of the
# text encoder is SD 2.x saved by sgm.
PREFIXES = {
    "unet": ("model.diffusion_model.",),
    "vae": ("first_stage_model.", "vae."),
    "text_encoder": (CLIP, OPEN_CLIP, SDXL_CLIP, "conditioner.embedders.0.model."),
    "text_encoder_2": (SDXL_OPEN_CLIP,),
}

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",  # of SDXL
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.attentions.0": "middle_block.1",
    **{f"mid_block.resnets.{i}.{ours}": f"middle_block.{2 * i}.{theirs}"
       for i in (0, 1) for ours, theirs in RESNET.items()},
}  # fmt: skip
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}  # of the autoencoder
VAE = {
    "quant_conv": "quant_conv",
    "post_quant_conv": "post_quant_conv",
    **{f"{half}.{ours}": f"{half}.{theirs}"
       for half in ("encoder", "decoder")
       for ours, theirs in {
           "conv_in": "conv_in",
           "conv_norm_out": "norm_out",
           "conv_out": "conv_out",
           "mid_block.resnets.0": "mid.block_1",
           "mid_block.resnets.1": "mid.block_2",
           **{f"mid_block.attentions.0.{a}": f"mid.attn_1.{b}" for a, b in ATTENTION.items()},
       }.items()},
}  # fmt: skip
OPENCLIP = {
    "text_model.embeddings.token_embedding": "token_embedding",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm": "ln_final",
    "text_projection.weight": "text_projection",
}
OPENCLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
QKV = ("q_proj", "k_proj", "v_proj")  # rows of OpenCLIP's one matrix, in this order


class Blocks(NamedTuple):
    """The blocks of a UNet, as its names tell: layers of each down and up block, whether an up block has attention."""

    down: tuple[int, ...]
    up: tuple[int, ...]
    attention: tuple[bool, ...]


# Of Stable Diffusion 1.x and 2.x, and XL.
WHOLE_UNETS = (
    Blocks((2,) * 4, (3,) * 4, (False, True, True, True)),
    Blocks((2,) * 3, (3,) * 3, (True, True, False)),
)


def to_ldm(part: str, tensors: Tensors, *, prefix: str | None = None, gaps: bool = False) -> Tensors:
    """The tensors {diffusers' key: array} of a part under LDM's names, with the prefix of the part.

    prefix: one of PREFIXES, which tells the names and forms of a text encoder; None: the first. gaps: how the layers of
    a UNet are counted, see above. Raises ValueError for a key that LDM has no name for."""
    prefix = prefix or PREFIXES[part][0]
    if part.startswith("text_encoder") and not is_open_clip(prefix):
        return {prefix + key: array for key, array in tensors.items()}
    names, there, _ = SCHEMES[part]
    tensors = there(tensors)
    pairs = names(tensors, gaps)
    return {prefix + _renamed(key, pairs): array for key, array in tensors.items()}


def is_open_clip(prefix: str) -> bool:
    """Whether a text encoder is OpenCLIP's. Its captions are then padded with "!"."""
    return prefix.endswith("model.")


def to_diffusers(part: str, tensors: Tensors) -> Tensors:
    """The inverse of `to_ldm`, for tensors without the prefix of their part, in either way of counting.

    A key without a name in diffusers stays as it is, and so do names that are diffusers' already."""
    ours = {"unet": "conv_in.weight", "vae": "encoder.conv_norm_out.weight"}.get(part)
    if ours in tensors or any(key.startswith(("text_model.", "embeddings.", "encoder.layers.")) for key in tensors):
        return dict(tensors)
    names, _, back = SCHEMES[part]
    pairs = {theirs: ours for ours, theirs in names(tensors).items()}
    return back({_renamed(key, pairs, missing=key): array for key, array in tensors.items()})


def _renamed(key: str, pairs: Pairs, missing: str | None = None) -> str:
    for end in [len(key), *(i for i in range(len(key) - 1, 0, -1) if key[i] == ".")]:
        if key[:end] in pairs:
            return pairs[key[:end]] + key[end:]
    if missing is None:
        raise ValueError(f"{key} has no name in a single file of Stable Diffusion 1.x, 2.x and XL")
    return missing


# -- The pairs of a network, from the names of its tensors in either scheme --------------------------------------------


def _unet(keys: Iterable[str], gaps: bool = False) -> Pairs:
    keys = set(keys)
    return unet_pairs(blocks(keys), gaps) if "conv_in.weight" in keys else unet_pairs(*_ldm_blocks(keys))


def unet_pairs(here: Blocks, gaps: bool = False) -> Pairs:
    """The pairs of a UNet of these blocks. gaps: how LDM counts its layers, see above."""
    pairs, n = dict(UNET), 0
    for block, layers in enumerate(here.down):
        for i in range(layers):
            pairs |= _layer(f"down_blocks.{block}", i, f"input_blocks.{n + i + 1}")
        n += 1 + (WHOLE[0] if gaps else layers)
        pairs[f"down_blocks.{block}.downsamplers.0.conv"] = f"input_blocks.{n}.0.op"
    n = 0
    for block, (layers, attention) in enumerate(zip(here.up, here.attention, strict=True)):
        for i in range(layers):
            pairs |= _layer(f"up_blocks.{block}", i, f"output_blocks.{n + i}")
        n += WHOLE[1] if gaps else layers
        after = (block > 0 if gaps else attention) + 1  # with gaps: as in the whole UNet, whose first has no attention
        pairs[f"up_blocks.{block}.upsamplers.0.conv"] = f"output_blocks.{n - 1}.{after}.conv"
    return pairs


def _layer(block: str, i: int, slot: str) -> Pairs:
    resnet = {f"{block}.resnets.{i}.{ours}": f"{slot}.0.{theirs}" for ours, theirs in RESNET.items()}
    return resnet | {f"{block}.attentions.{i}": f"{slot}.1"}


def blocks(keys: Iterable[str]) -> Blocks:
    """The blocks of a UNet by diffusers' names."""
    keys = set(keys)
    layers = lambda block: len(numbers(keys, f"{block}.resnets."))
    down = tuple(layers(f"down_blocks.{i}") for i in numbers(keys, "down_blocks."))
    ups = [f"up_blocks.{i}" for i in numbers(keys, "up_blocks.")]
    return Blocks(down, tuple(map(layers, ups)), tuple(f"{up}.attentions.0.norm.weight" in keys for up in ups))


def _ldm_blocks(keys: set[str]) -> tuple[Blocks, bool]:
    """From LDM's names; and whether their numbers have gaps. A block ends with its downsampler or upsampler."""
    slots = numbers(keys, "input_blocks.")
    ends = [f"input_blocks.{n}.0.op.weight" in keys for n in slots]
    down = tuple(sum(not end for end in block) for block in _cut(ends[1:], ends[1:]))
    ups = [f"output_blocks.{n}" for n in numbers(keys, "output_blocks.")]
    ends = [any(f"{up}.{k}.conv.weight" in keys for k in (1, 2)) for up in ups]
    cut = _cut(ups, ends)
    up = tuple(sum(f"{slot}.0.in_layers.0.weight" in keys for slot in block) for block in cut)
    attention = tuple(any(f"{slot}.1.norm.weight" in keys for slot in block) for block in cut)
    return Blocks(down, up, attention), slots != list(range(len(slots)))


def _cut(items: list, ends: list[bool]) -> list[list]:
    """The items in lists, each of which ends where `ends` is true."""
    block = [0, *itertools.accumulate(ends)]
    return [[items[i] for i in group] for _, group in itertools.groupby(range(len(items)), block.__getitem__)]


def _vae(keys: Iterable[str], gaps: bool = False) -> Pairs:
    keys, pairs = set(keys), dict(VAE)
    levels = max(len(numbers(keys, f"encoder.{down}.")) for down in ("down_blocks", "down"))
    layers = 1 + max(len(numbers(keys, f"encoder.{down}")) for down in ("down_blocks.0.resnets.", "down.0.block."))
    for level in range(levels):
        sides = (f"encoder.down_blocks.{level}", f"encoder.down.{level}", "down")
        # LDM counts the decoder's levels from the pictures to the latents, diffusers the other way.
        for ours, theirs, way in (sides, (f"decoder.up_blocks.{levels - 1 - level}", f"decoder.up.{level}", "up")):
            pairs[f"{ours}.{way}samplers.0.conv"] = f"{theirs}.{way}sample.conv"
            pairs |= {f"{ours}.resnets.{i}": f"{theirs}.block.{i}" for i in range(layers)}
    resnets = [(ours, theirs) for ours, theirs in pairs.items() if "block" in theirs]
    return pairs | {f"{ours}.conv_shortcut": f"{theirs}.nin_shortcut" for ours, theirs in resnets}


def _open_clip(keys: Iterable[str], gaps: bool = False) -> Pairs:
    keys, pairs = set(keys), dict(OPENCLIP)
    for i in numbers(keys, "text_model.encoder.layers.") or numbers(keys, "transformer.resblocks."):
        ours, theirs = f"text_model.encoder.layers.{i}", f"transformer.resblocks.{i}"
        pairs |= {f"{ours}.{a}": f"{theirs}.{b}" for a, b in OPENCLIP_LAYER.items()}
        pairs |= {f"{ours}.self_attn.in_proj.{leaf}": f"{theirs}.attn.in_proj_{leaf}" for leaf in ("weight", "bias")}
    return pairs


def numbers(keys: Iterable[str], prefix: str) -> list[int]:
    """The different numbers that follow a prefix in the keys, in order."""
    rest = (key[len(prefix) :].partition(".")[0] for key in keys if key.startswith(prefix))
    return sorted({int(number) for number in rest if number.isdigit()})


# -- Other forms: 1x1 convolutions of the autoencoder's attention, OpenCLIP's one matrix of queries, keys and values --


def _convolved(tensors: Tensors) -> Tensors:
    return {key: x[..., None, None] if "attentions" in key and x.ndim == 2 else x for key, x in tensors.items()}


def _linear(tensors: Tensors) -> Tensors:
    square = lambda key, x: "attentions" in key and x.ndim > 2 and set(x.shape[2:]) == {1}
    return {key: x.reshape(x.shape[:2]) if square(key, x) else x for key, x in tensors.items()}


def _fused(tensors: Mapping[str, np.ndarray]) -> Tensors:
    fused = {key: _turned(key, x) for key, x in tensors.items() if not any(f".{name}." in key for name in QKV)}
    for key in tensors:
        if f".{QKV[0]}." in key:
            parts = [tensors[key.replace(QKV[0], name)] for name in QKV]
            fused[key.replace(QKV[0], "in_proj")] = np.concatenate(parts)
    return fused


def _split(tensors: Mapping[str, np.ndarray]) -> Tensors:
    split = {}
    for key, x in tensors.items():
        if ".in_proj." in key and x.ndim:
            rows = len(x) // len(QKV)
            split |= {key.replace("in_proj", name): x[i * rows : (i + 1) * rows] for i, name in enumerate(QKV)}
        else:
            split[key] = _turned(key, x)
    return split


def _turned(key: str, x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x.T) if key == "text_projection.weight" else x


# {part: (the pairs of its names, tensors in diffusers' forms -> in LDM's, and back)}
SCHEMES = {
    "unet": (_unet, dict, dict),
    "vae": (_vae, _convolved, _linear),
    "text_encoder": (_open_clip, _fused, _split),
    "text_encoder_2": (_open_clip, _fused, _split),
}
