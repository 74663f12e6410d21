"""A pipeline as one .safetensors by LDM's names, for ComfyUI, A1111's web UI and stable-diffusion.cpp.

Their loaders differ in the students they read; `PROGRAMS` is what their source says. pretrained/ldm.py has the names,
pretrained/single_file.py reads such a file back, with the configurations that are written into its header.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from safetensors.numpy import save_file

from flaxkd.export.workdir import as_drawn
from flaxkd.machine import files
from flaxkd.models.unet import UNetConfig
from flaxkd.pretrained import ARCHITECTURES, Folder, clip_tokenizer, keys, ldm
from flaxkd.pretrained.families import TOKENIZERS
from flaxkd.pretrained.single_file import HEADER, MODELSPEC
from flaxkd.pretrained.writing import cast


class Program(NamedTuple):
    """Who reads such files, how it counts the layers of a UNet with fewer of them, and which UNets it can build."""

    title: str
    gaps: bool  # see pretrained/ldm.py
    builds: Callable[[UNetConfig], bool]


def _depths(c: UNetConfig) -> tuple:
    return tuple(stage.depths for stage in (*c.down, *([c.mid] if c.mid else []), *c.up))


WHOLE = {_depths(UNetConfig.from_dict(row.unet)) for row in ARCHITECTURES.values()}


def _is_whole(c: UNetConfig) -> bool:
    return _depths(c) in WHOLE


def _is_tiny(c: UNetConfig) -> bool:
    return [stage.depths for stage in c.down] == [(1,)] * 3 and c.mid_block_type is None


# Transformer blocks of SSD-1B and of Vega, stage by stage on the way up; their mid block is a resnet.
SDXL_UP = {((4, 4, 10), (2, 1, 1), (0, 0, 0)), ((2, 2, 2), (1, 1, 1), (0, 0, 0))}


def _is_of_segmind(c: UNetConfig) -> bool:
    up = tuple(tuple(depth or 0 for depth in stage.depths) for stage in c.up)
    return c.addition_embed_type is not None and up in SDXL_UP and c.mid is not None and not c.mid.depths


# comfy/supported_models.py: transformer blocks of the layers on the way down of SDXL, SSD-1B, Vega and both KOALAs.
SDXL_DOWN = {(0, 0, 2, 2, 10, 10), (0, 0, 2, 2, 4, 4), (0, 0, 1, 1, 2, 2), (0, 2, 6), (0, 2, 5)}


def _is_known_to_comfyui(c: UNetConfig) -> bool:
    down = tuple(depth or 0 for stage in c.down for depth in stage.depths)
    return c.addition_embed_type is None or down in SDXL_DOWN


PROGRAMS = {
    # comfy/model_detection.py counts blocks and layers; comfy/supported_models.py tells SD by its widths.
    "comfyui": Program("ComfyUI", False, _is_known_to_comfyui),
    # modules/sd_models_config.py: one YAML for each family, which describes the whole UNet.
    "a1111": Program("A1111's web UI", False, _is_whole),
    # src/unet.hpp: the whole UNet, one of three stages with one layer each and no mid block, SSD-1B and Vega.
    "sd.cpp": Program("stable-diffusion.cpp", True, lambda c: _is_whole(c) or _is_tiny(c) or _is_of_segmind(c)),
}
WIDTH, TEXT_WIDTHS = 320, (768, 1024, 2048)  # of the UNets that all of them take for Stable Diffusion 1.x, 2.x and XL


def readers(unet_config: dict, gaps: bool = False) -> list[str]:
    """The rows of PROGRAMS that read a file with this UNet, its layers counted in this way."""
    c = UNetConfig.from_dict(unet_config)
    usual = c.block_out_channels[0] == WIDTH and c.cross_attention_dim in TEXT_WIDTHS
    same = _is_whole(c) or _is_of_segmind(c)  # their layers have the same numbers either way
    return [name for name, p in PROGRAMS.items() if usual and p.builds(c) and (same or p.gaps == gaps)]


def write(file: Path, folder: Folder, *, program: str | None = None, dtype=None) -> list[str]:
    """Writes a pipeline as a single file, and returns the rows of PROGRAMS that read it.

    program: the one that must read it; None: layers are counted consecutively, as most do. dtype: of all tensors;
    None: unchanged. Raises ValueError if that program cannot build the UNet, if `file` has another ending, or if
    parameters and configuration do not fit."""
    file, unet = Path(file), folder.config("unet")
    if file.suffix != ".safetensors":
        raise ValueError(f"{file} must end in .safetensors")
    if file.resolve() == folder.path.resolve():
        raise ValueError(f"writing {file} would replace its source: choose a new name")
    gaps = program is not None and PROGRAMS[program].gaps
    able = readers(unet, gaps)
    if program is not None and program not in able:
        others = ", ".join(PROGRAMS[name].title for name in readers(unet))
        raise ValueError(f"{PROGRAMS[program].title} has no UNet like this one; it is read by: {others or 'none'}")
    written = tensors(folder, gaps, dtype)
    with files.whole(file) as path:
        save_file(written, path, metadata=header(file, folder))
    return able


def tensors(folder: Folder, gaps: bool, dtype=None) -> ldm.Tensors:
    """All tensors of a pipeline by LDM's names, as `ldm.to_ldm` gives them. dtype: None: unchanged.

    A UNet that was trained to be rounded is: no program that reads these files would."""
    written, folder = {}, as_drawn(folder)
    for part in folder.parts:
        found = cast(keys.to_tensors(folder.stored(part)), dtype, part)
        written |= ldm.to_ldm(part, found, prefix=folder.family.single_file.get(part), gaps=gaps)
    return written


def header(file: Path, folder: Folder) -> dict[str, str]:
    """What the head of such a file says: the configurations, for flaxkd, and what user interfaces show."""
    scheduler = folder.config("scheduler")
    prediction = scheduler.get("prediction_type", "epsilon")
    content = {part: folder.config(part) for part in (*folder.parts, "scheduler")}
    content |= _tokenizers(folder)
    spec = {
        "sai_model_spec": "1.0.0",
        "architecture": folder.family.modelspec[prediction],
        "implementation": folder.family.code,
        "title": file.stem,
        "resolution": f"{folder.resolution}x{folder.resolution}",
        "prediction_type": {"v_prediction": "v"}.get(prediction, prediction),
    }
    return {"format": "pt", HEADER: json.dumps(content)} | {f"{MODELSPEC}{name}": x for name, x in spec.items()}


def _tokenizers(folder: Folder) -> dict[str, dict]:
    """The options of `clip_tokenizer.make` for tokenizers other than those that a single file is read with."""
    kept, found = ("pad_token", "model_max_length"), {}
    for part, field in folder.family.captions.items():
        open_clip = ldm.is_open_clip(folder.family.single_file[part])
        tokenizer, usual = folder.tokenizers[field], clip_tokenizer.make(**clip_tokenizer.options(open_clip))
        own = {name: getattr(tokenizer, name) for name in kept}
        if own != {name: getattr(usual, name) for name in kept} or tokenizer.get_vocab() != usual.get_vocab():
            merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
            found[TOKENIZERS[field]] = {"vocab": tokenizer.get_vocab(), "merges": merges} | own
    return found
