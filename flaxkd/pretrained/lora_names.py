"""Names of the tensors of LoRA files: every dialect -> (part, module, what the tensor is), and back for two of them.

    dialect         a key, of the module down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q
    PEFT            unet.MODULE.lora_A.weight
    diffusers       unet.MODULE.lora.down.weight; text_encoder.MODULE.lora_linear_layer.down.weight
    old diffusers   unet....attn1.processor.to_q_lora.down.weight
    kohya           lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight
    ... of SDXL     lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q.lora_down.weight: the names of ldm.py

Each key is read on its own, since files mix them. Names do not tell a student from its teacher.
"""

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from flaxkd.pretrained import ldm

Path = tuple[str, ...]


class Name(NamedTuple):
    """What a key says. role: a value of ENDS."""

    part: str
    module: Path
    role: str
    dialect: str


# {beginning of a key: the part}, the longest first. What follows "lora_" has underscores in place of dots.
BEGINNINGS = {
    "base_model.model.unet.": "unet",
    "unet.base_model.model.": "unet",  # of diffusers' script for LCM-LoRA, which diffusers itself does not load
    "text_encoder_2.": "text_encoder_2",
    "text_encoder.": "text_encoder",
    "unet.": "unet",
    "base_model.model.": "unet",  # of peft itself
    "lora_unet_": "unet",
    "lycoris_": "unet",
    "lora_te2_": "text_encoder_2",
    "lora_te1_": "text_encoder",
    "lora_te_": "text_encoder",
    "": "unet",
}

# {end of a key: (what the tensor is, the dialect)}
ENDS = {
    "lora_A.weight": ("A", "PEFT"),
    "lora_B.weight": ("B", "PEFT"),
    "lora_A.default.weight": ("A", "PEFT"),
    "lora_B.default.weight": ("B", "PEFT"),
    "lora_magnitude_vector.default.weight": ("magnitude", "DoRA"),
    "lora_magnitude_vector.weight": ("magnitude", "DoRA"),
    "lora_magnitude_vector": ("magnitude", "DoRA"),
    "lora.down.weight": ("A", "diffusers"),
    "lora.up.weight": ("B", "diffusers"),
    "lora_linear_layer.down.weight": ("A", "diffusers"),
    "lora_linear_layer.up.weight": ("B", "diffusers"),
    "old_lora.down.weight": ("A", "old diffusers"),
    "old_lora.up.weight": ("B", "old diffusers"),
    "lora_down.weight": ("A", "kohya"),
    "lora_up.weight": ("B", "kohya"),
    "lora_mid.weight": ("mid", "LoCon"),
    "alpha": ("alpha", ""),
    "dora_scale": ("magnitude", "DoRA"),
    **{f"hada_{x}": (f"hada_{x}", "LoHa") for x in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f"lokr_{x}": (f"lokr_{x}", "LoKr") for x in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
}

# {end of a key: the kind of file}, of those that are no product of small matrices.
REFUSED = {
    "on_input": "IA3",
    "oft_blocks": "OFT",
    "oft_diag": "OFT",
    "oft_R.weight": "OFT",
    "boft_R": "BOFT",
    "a1.weight": "GLoRA",
    "b1.weight": "GLoRA",
    "diff": "whole differences (diff)",
    "diff_b": "whole differences (diff)",
    "w_norm": "norms (w_norm)",
    "b_norm": "norms (w_norm)",
}

# Names with underscores of their own, the longest first; every other underscore of kohya's was a dot.
_OWN = (
    *("time_embedding", "add_embedding", "linear_1", "linear_2", "down_blocks", "up_blocks", "mid_block"),
    *("transformer_blocks", "time_emb_proj", "conv_shortcut", "conv_in", "conv_out", "proj_in", "proj_out"),
    *("to_out", "to_q", "to_k", "to_v", "text_model", "text_projection", "self_attn"),
    *("q_proj", "k_proj", "v_proj", "out_proj"),
    *("input_blocks", "middle_block", "output_blocks", "in_layers", "out_layers", "emb_layers", "skip_connection"),
    *("time_embed", "label_emb"),
)
_WORD = re.compile(rf"(?:{'|'.join(sorted(_OWN, key=len, reverse=True))})(?![a-z0-9])|[a-z0-9]+")

_OLD = re.compile(r"\.(processor\.)?to_(q|k|v|out)_lora\.")

# {beginning of LDM's names: of diffusers'} of whole UNets. Three stages count as the first three of four do.
_LDM = {theirs: ours for blocks in ldm.WHOLE_UNETS for ours, theirs in ldm.unet_pairs(blocks).items()}


class Written(NamedTuple):
    """How a dialect writes its keys. of_two: beginnings that differ where the pipeline has two text encoders."""

    beginnings: Mapping[str, str]  # of parts
    between: str  # names
    ends: Mapping[str, str]  # of roles
    of_two: Mapping[str, str] = MappingProxyType({})


# {dialect: how it is written}, of the two that are.
WRITTEN = {
    "peft": Written(
        {part: f"{part}." for part in ("unet", "text_encoder", "text_encoder_2")},
        ".",
        {"A": "lora_A.weight", "B": "lora_B.weight"},
    ),
    "kohya": Written(
        {"unet": "lora_unet_", "text_encoder": "lora_te_", "text_encoder_2": "lora_te2_"},
        "_",
        {"A": "lora_down.weight", "B": "lora_up.weight", "alpha": "alpha"},
        {"text_encoder": "lora_te1_"},
    ),
}


def parse(key: str) -> Name | None:
    """What a key of a LoRA file says; None if it is in no dialect. Raises ValueError for those of REFUSED."""
    key = _OLD.sub(_modern, key)
    module, end = _cut(key, ENDS)
    if end is None:
        module, end = _cut(key, REFUSED)
        if end is not None:
            raise ValueError(f"{key} is of {REFUSED[end]}: flaxkd reads LoRA, LoCon, DoRA, LoHa and LoKr")
        return None
    beginning = next(each for each in BEGINNINGS if module.startswith(each))
    part, module = BEGINNINGS[beginning], module.removeprefix(beginning)
    if beginning.endswith("_"):
        module = ".".join(_WORD.findall(module))
    if part == "unet":
        module = _diffusers(module)
    elif not module.startswith(("text_model.", "text_projection")):  # transformers 5 has no such level
        module = f"text_model.{module}"
    role, dialect = ENDS[end]
    return Name(part, tuple(re.split(r"\.(?!\d)", module)), role, dialect)


def key(dialect: str, part: str, module: Path, role: str, two_encoders: bool = False) -> str:
    """The key of a tensor in a dialect of WRITTEN. two_encoders: of the pipeline, which kohya's names tell."""
    row = WRITTEN[dialect]
    beginning = {**row.beginnings, **(row.of_two if two_encoders else {})}[part]
    return f"{beginning}{'.'.join(module).replace('.', row.between)}.{row.ends[role]}"


def _modern(match: re.Match) -> str:
    processor, name = match.groups()
    of_unet = {"out": "to_out.0"}.get(name, f"to_{name}")
    return f".{of_unet if processor else f'{name}_proj'}.old_lora."


def _cut(key: str, ends: dict) -> tuple[str, str | None]:
    """(the key without its end, the end), None if it has none of these."""
    end = next((end for end in sorted(ends, key=len, reverse=True) if key.endswith(f".{end}")), None)
    return (key, None) if end is None else (key[: -len(end) - 1], end)


def _diffusers(module: str) -> str:
    """The name of a module of the whole UNet, if it is one of LDM's."""
    words = module.split(".")
    for n in range(len(words), 0, -1):
        if (begin := ".".join(words[:n])) in _LDM:
            return ".".join([_LDM[begin], *words[n:]])
    return module
