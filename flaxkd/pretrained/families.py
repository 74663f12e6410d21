"""THE TABLE of families: the kinds of pipelines flaxkd knows, their parts, and what conditions their UNet.

A family is a row of `FAMILIES`; `of` finds the row of a folder. Nothing else tells one kind of pipeline from another.
`ARCHITECTURES` are published members of the families: configurations without weights, for `flaxkd.plan` and the tables
of students.
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from flaxkd.models import unet, vae
from flaxkd.models.clip import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
from flaxkd.models.layers import FEATURES, features
from flaxkd.models.unet import UNet2DCondition, UNetConfig
from flaxkd.models.vae import AutoencoderKL, VAEConfig
from flaxkd.pretrained import ldm

Inputs = list[jax.ShapeDtypeStruct]


class Part(NamedTuple):
    """A network of a pipeline folder: PART/config.json and PART/STEM.safetensors."""

    module: type[nn.Module]
    config: type  # its configuration dataclass
    library: str  # has the class that loads it in PyTorch, as in model_index.json
    class_name: str
    stem: str
    inputs: Callable[[Any], Inputs]  # configuration -> the smallest arguments of a call
    neutral: Mapping | None = None  # further fields of its config.json, see `read_config`; None: any


def _unet_inputs(c: UNetConfig) -> Inputs:
    size = 2 ** (len(c.block_out_channels) - 1)
    inputs = [_of(1, size, size, c.in_channels), _of(1), _of(1, 1, c.cross_attention_dim)]
    if c.addition_embed_type == "text_time":
        pooled = c.projection_class_embeddings_input_dim - 6 * c.addition_time_embed_dim
        inputs += [_of(1, pooled), _of(1, 6)]
    return inputs


def _of(*shape: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


STEM = "diffusion_pytorch_model"
PARTS = {
    "unet": Part(UNet2DCondition, UNetConfig, "diffusers", "UNet2DConditionModel", STEM, _unet_inputs,
                 unet.NEUTRAL),
    "vae": Part(AutoencoderKL, VAEConfig, "diffusers", "AutoencoderKL", STEM,
                lambda c: [_of(1, c.factor, c.factor, c.in_channels)], vae.NEUTRAL),
    "text_encoder": Part(CLIPTextModel, CLIPTextConfig, "transformers", "CLIPTextModel", "model",
                         lambda c: [_of(1, 1, dtype=jnp.int32)]),
    "text_encoder_2": Part(CLIPTextModelWithProjection, CLIPTextConfig, "transformers", "CLIPTextModelWithProjection",
                           "model", lambda c: [_of(1, 1, dtype=jnp.int32)]),
}  # fmt: skip


def build(part: str, config: dict, dtype=jnp.float32, **kwargs) -> nn.Module:
    """The module of a part (a name in PARTS) with this config.json. dtype: of the compute.

    Raises ValueError that names the settings flaxkd does not support."""
    row = PARTS[part]
    return row.module(row.config.from_dict(config), dtype=dtype, **kwargs)


def plain(part: str, config: dict, file: str) -> dict:
    """A config.json in one spelling, without fields that diffusers does not know and ignores: a warning names them.

    Raises ValueError for the configuration of another class, or of weights in few bits."""
    row = PARTS[part]
    kind = config.get("_class_name", row.class_name)
    if isinstance(kind, str) and kind.removeprefix("Flax") != row.class_name:
        raise ValueError(f"{file} is of the class {kind}: the {part} that flaxkd knows is {row.class_name}")
    config = row.config.plain(config)
    if row.neutral is None:
        return config
    if config.get("quantization_config"):
        raise ValueError(f"{file} is of weights in few bits, and flaxkd reads floats: take what they were")
    known = {*row.neutral, *(field.name for field in dataclasses.fields(row.config))}
    unknown = [name for name in config if name not in known and not name.startswith("_")]
    if any(config[name] for name in unknown):
        warnings.warn(
            f"{file} has fields that diffusers does not know; they are ignored: {', '.join(unknown)}", stacklevel=2
        )
    return {name: value for name, value in config.items() if name not in unknown}


def shapes(part: str, config: dict) -> dict:
    """The parameters of a part with this config.json: nested dict of float32 jax.ShapeDtypeStruct, without compute.

    Raises ValueError for a network that cannot be built, also because its sizes do not fit each other."""
    return jax.tree.map(lambda x: x, _shapes(part, PARTS[part].config.from_dict(config)))


@functools.lru_cache(maxsize=16)  # tracing a UNet takes seconds
def _shapes(part: str, config) -> dict:
    row = PARTS[part]
    key = jax.eval_shape(lambda: jax.random.key(0))
    try:
        return jax.eval_shape(row.module(config).init, key, *row.inputs(config))["params"]
    except Exception as error:  # sizes that do not fit each other fail in a layer, as errors of many kinds
        raise ValueError(f"no {part} can be built with this config.json: {error or type(error).__name__}") from error


def count(part: str, config: dict) -> int:
    """The number of parameters of a part with this config.json."""
    return sum(x.size for x in jax.tree.leaves(shapes(part, config)))


# What a token id says of a missing prompt, in every place of its row. The states of such a row are zeros.
MISSING = -1


def text_states(modules: Mapping, params: Mapping, inputs: Mapping) -> dict:
    """{"encoder_hidden_states": float[b, l, d]}: a text encoder's last states for input_ids int32[b, l]. Traceable."""
    states = modules["text_encoder"].apply({"params": params["text_encoder"]}, inputs["input_ids"])
    return {"encoder_hidden_states": states} | _beside(inputs)


def two_text_states(modules: Mapping, params: Mapping, inputs: Mapping) -> dict:
    """What conditions the UNet of Stable Diffusion XL (diffusers' StableDiffusionXLPipeline.encode_prompt). Traceable.

    inputs: input_ids, input_ids_2: int32[b, l], a row of MISSING for a missing prompt; time_ids: int32[b, 6].
    Returns encoder_hidden_states: float[b, l, d + d2], the input of the last layer of both encoders, without a final
    norm; text_embeds: float[b, e], the second one's projection; time_ids as they are."""
    states, pooled = [], None
    for part, field in SDXL_CAPTIONS.items():
        ids, encoder = inputs[field], modules[part]
        variables = {"params": params[part]}
        pooled, captured = encoder.apply(variables, jnp.maximum(ids, 0), mutable=[FEATURES])
        layer = encoder.config.num_hidden_layers - 2 - encoder.config.skipped
        states.append(features(captured)[f"text_model.encoder.layers.{layer}"])
    present = ids[:, :1] != MISSING
    states = jnp.where(present[..., None], jnp.concatenate(states, axis=-1), 0)
    return {
        "encoder_hidden_states": states,
        "text_embeds": jnp.where(present, pooled, 0),
        "time_ids": inputs["time_ids"],
    } | _beside(inputs)


def _beside(inputs: Mapping) -> dict:
    """What the UNet sees beside the noisy latents, if it sees anything there."""
    return {"beside": inputs["beside"]} if "beside" in inputs else {}


class Architecture(NamedTuple):
    """A published member of a family: the configurations of its parts, and the hub ids of matching weights."""

    title: str
    family: str  # a name in FAMILIES
    configs: Mapping[str, dict]  # {part or "scheduler": its configuration}
    hub_ids: tuple[str, ...]

    @property
    def unet(self) -> dict:
        return self.configs["unet"]


@dataclasses.dataclass(frozen=True, eq=False)
class Family:
    """A row: what all pipelines of a kind share."""

    title: str
    pipelines: Mapping[int, str]  # channels that its UNet sees beside the noisy latents: diffusers' class
    captions: Mapping[str, str]  # part that reads the caption: the field of an example with its token ids
    unet: Mapping[str, Any]  # fields of unet/config.json that set it apart; a missing one is False
    condition: Callable[[Mapping, Mapping, Mapping], dict]  # (modules, params, inputs) -> keyword arguments of its UNet
    index: Mapping[str, Any]  # what its model_index.json says besides the parts
    stages: int  # of the UNet
    layers: int  # of a down block; an up block has one more
    shown: str  # its architecture in the tables of students
    single_file: Mapping[str, str]  # {text encoder: the beginning of its names in a single file}
    modelspec: Mapping[str, str]  # prediction_type -> architecture in the header of a single file
    kohya: str  # ss_base_model_version in the header of an adapter
    sizes: bool = False  # whether an example has time_ids: its original size, its crop and its size
    penultimate: bool = False  # whether the states are those before the last layer of the encoders
    upcasts: bool = False  # whether its autoencoder computes in float32 where its config.json asks for it
    guidance: float = 7.5  # diffusers' default for its pipeline
    tag: str = "stable-diffusion"  # of its models on the hub
    code: str = "https://github.com/CompVis/stable-diffusion"  # the original

    @property
    def pipeline(self) -> str:
        """diffusers' class for its folders that draw from text alone."""
        return self.pipelines[0]

    def pipeline_of(self, unet: dict, vae: dict) -> str:
        """diffusers' class for a folder with these config.json."""
        return self.pipelines[beside(unet, vae)]

    @property
    def encoders(self) -> tuple[str, ...]:
        """The parts that read the caption."""
        return tuple(self.captions)

    @property
    def parts(self) -> tuple[str, ...]:
        return ("unet", "vae", *self.encoders)

    def skip(self, config: dict, n: int) -> dict:
        """The config.json of a text encoder whose last n layers are skipped, see `Folder.skip_layers`."""
        layers = CLIPTextConfig.from_dict(config).num_hidden_layers
        return config | ({"skipped": n} if self.penultimate else {"num_hidden_layers": layers - n})


CAPTION = {"text_encoder": "input_ids"}
SDXL_CAPTIONS = {"text_encoder": "input_ids", "text_encoder_2": "input_ids_2"}
TOKENIZERS = {"input_ids": "tokenizer", "input_ids_2": "tokenizer_2"}  # field: the folder of its tokenizer
ZEROS = "force_zeros_for_empty_prompt"  # in model_index.json: whether a missing prompt is zeros, or else ""
_BESIDE_SD = {"requires_safety_checker": False, "feature_extractor": [None, None], "image_encoder": [None, None],
              "safety_checker": [None, None]}  # fmt: skip
_BESIDE_SDXL = {ZEROS: True, "feature_extractor": [None, None], "image_encoder": [None, None]}

# Channels of a UNet beside the noisy latents: the fields of a record that they come from, see data/masks.py.
INPAINTING = 5  # the mask, and the latents of the picture without what is masked
BESIDE = {0: (), INPAINTING: ("masks", "masked_latents")}
_SD = {0: "StableDiffusionPipeline", INPAINTING: "StableDiffusionInpaintPipeline"}
_SDXL = {0: "StableDiffusionXLPipeline", INPAINTING: "StableDiffusionXLInpaintPipeline"}

FAMILIES = {
    "sd1": Family("Stable Diffusion 1.x", _SD, CAPTION,
                  {"use_linear_projection": False, "addition_embed_type": False}, text_states, _BESIDE_SD,
                  stages=4, layers=2, shown="sd15", single_file={"text_encoder": ldm.CLIP},
                  modelspec={"epsilon": "stable-diffusion-v1", "v_prediction": "stable-diffusion-v1"}, kohya="sd_v1"),
    "sd2": Family("Stable Diffusion 2.x", _SD, CAPTION,
                  {"use_linear_projection": True, "addition_embed_type": False}, text_states, _BESIDE_SD,
                  stages=4, layers=2, shown="sd21", single_file={"text_encoder": ldm.OPEN_CLIP},
                  modelspec={"epsilon": "stable-diffusion-v2-512", "v_prediction": "stable-diffusion-v2-768-v"},
                  kohya="sd_v2"),
    "sdxl": Family("Stable Diffusion XL", _SDXL, SDXL_CAPTIONS,
                   {"use_linear_projection": True, "addition_embed_type": True}, two_text_states, _BESIDE_SDXL,
                   stages=3, layers=2, shown="sdxl",
                   single_file={"text_encoder": ldm.SDXL_CLIP, "text_encoder_2": ldm.SDXL_OPEN_CLIP},
                   modelspec={"epsilon": "stable-diffusion-xl-v1-base", "v_prediction": "stable-diffusion-xl-v1-base"},
                   kohya="sdxl_base_v1-0", sizes=True, penultimate=True, upcasts=True, guidance=5.0,
                   tag="stable-diffusion-xl",
                   code="https://github.com/Stability-AI/generative-models"),
}  # fmt: skip


def of(index: dict, unet: dict, vae: dict) -> Family | None:
    """The row of a pipeline, from its model_index.json, unet/config.json and vae/config.json; None if unknown."""
    if beside(unet, vae) not in BESIDE:
        return None
    kind, found = class_name(index), networks(index)
    encoders = tuple(name for name in found if name.startswith("text_encoder"))
    for family in FAMILIES.values():
        same = all(bool(unet.get(name, False)) == value for name, value in family.unet.items())
        # A pipeline for images (Img2Img, ...) has the same parts, and a name that starts like the usual one. A pipeline
        # with another name and the same parts differs in its loop of sampling alone.
        called = kind.startswith(family.pipeline.removesuffix("Pipeline"))
        if called and encoders in ((), family.encoders) and same:
            return family
        if same and found == {part: PARTS[part].class_name for part in family.parts}:
            return family
    return None


def beside(unet: dict, vae: dict) -> int:
    """The channels that a UNet takes beside the noisy latents, from unet/config.json and vae/config.json."""
    return unet.get("in_channels", 4) - vae.get("latent_channels", 4)


def class_name(index: dict) -> str:
    """The class of a pipeline in its model_index.json; of somebody's own, [module, class] there, the class."""
    kind = index.get("_class_name") or ""
    return str(kind[-1] if isinstance(kind, list) and kind else kind).removeprefix("Flax")


def networks(index: dict) -> dict[str, str]:
    """{part: its class} of the networks in a model_index.json, without those that judge a finished picture."""
    beside = ("scheduler", "tokenizer", "feature_extractor", "safety_checker")
    pairs = {name: entry for name, entry in index.items() if isinstance(entry, list) and not name.startswith("_")}
    named = {name: entry[-1] for name, entry in pairs.items() if len(entry) == 2 and entry[-1]}
    return {name: str(kind).removeprefix("Flax") for name, kind in named.items() if not name.startswith(beside)}


# vae/, scheduler/, text_encoder/ and unet/config.json of stable-diffusion-v1-5 and stable-diffusion-2-1 on the hub.
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
SD15 = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}
SD21 = {
    **SD15,
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "only_cross_attention": False,
    "sample_size": 96,
    "upcast_attention": True,
    "use_linear_projection": True,
}
SD21_BASE = SD21 | {"sample_size": 64, "upcast_attention": False}

SDXL = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "use_linear_projection": True,
}
OPENCLIP_BIGG = CLIP_L | {
    "hidden_act": "gelu",
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "projection_dim": 1280,
}
EULER = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "steps_offset": 1,
    "timestep_spacing": "leading",
}

ARCHITECTURES = {
    "sd15": Architecture(
        "Stable Diffusion 1.5", "sd1", {"unet": SD15, "text_encoder": CLIP_L, "scheduler": EPSILON, "vae": VAE},
        ("SG161222/Realistic_Vision_V4.0", "CompVis/stable-diffusion-v1-4", "runwayml/stable-diffusion-v1-5",
         "stable-diffusion-v1-5/stable-diffusion-v1-5")),
    "sd21_base": Architecture(
        "Stable Diffusion 2.1 base", "sd2",
        {"unet": SD21_BASE, "text_encoder": OPENCLIP_H, "scheduler": EPSILON, "vae": VAE},
        ("stabilityai/stable-diffusion-2-1-base", "stabilityai/stable-diffusion-2-base")),
    "sd21": Architecture(
        "Stable Diffusion 2.1", "sd2",
        {"unet": SD21, "text_encoder": OPENCLIP_H, "scheduler": EPSILON | {"prediction_type": "v_prediction"},
         "vae": VAE},
        ("stabilityai/stable-diffusion-2-1",)),
    "sdxl": Architecture(
        "Stable Diffusion XL 1.0", "sdxl",
        {"unet": SDXL, "text_encoder": CLIP_L, "text_encoder_2": OPENCLIP_BIGG, "scheduler": EULER,
         "vae": VAE | {"force_upcast": True, "sample_size": 1024, "scaling_factor": 0.13025}},
        ("stabilityai/stable-diffusion-xl-base-1.0",)),
}  # fmt: skip


def published(teacher: str | None) -> Architecture | None:
    """The architecture with that name or hub id; None if unknown."""
    rows = ARCHITECTURES.items()
    return next((row for name, row in rows if teacher == name or teacher in row.hub_ids), None)
