"""The UNet of Stable Diffusion 1.x, 2.x and XL, and of every model pruned from them, in functional Linen.

Its configuration is diffusers' `config.json`; its modules have diffusers' names, so that weights convert by one
rule (pretrained/keys.py). Ho et al. 2020, Rombach et al. 2022 (arXiv:2112.10752); diffusers `UNet2DConditionModel`.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from flaxkd.models.attention import DotProductAttention, dot_product_attention
from flaxkd.models.layers import (
    Attention,
    Conv,
    Downsample2D,
    GroupNorm,
    LayerNorm,
    ResnetBlock2D,
    Upsample2D,
    emit,
    flag,
    frozen,
    lower,
    one,
    read_config,
    respell,
)


class Stage(NamedTuple):
    """One block of a path: the facts of which `config.json` holds a dozen spellings."""

    channels: int
    depths: tuple[int | None, ...]  # per layer (a resnet and what follows it): transformer blocks; None: no attention
    heads: int
    resample: bool


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """The fields of diffusers' `unet/config.json` that vary among Stable Diffusion UNets, under their names there.

    `attention_head_dim` is the number of *heads*, in diffusers too (an old misnomer that 40,000 configurations rely
    on). Lists may be nested: `transformer_layers_per_block[block][layer]`.
    """

    sample_size: int | tuple | None = None  # latents along a side, or (rows, columns)
    in_channels: int = 4
    out_channels: int = 4
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    down_block_types: tuple = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
    up_block_types: tuple = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    block_out_channels: tuple = (320, 640, 1280, 1280)
    layers_per_block: int | tuple = 2
    downsample_padding: int = 1
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int | tuple = 1280
    transformer_layers_per_block: int | tuple = 1
    reverse_transformer_layers_per_block: tuple | None = None
    attention_head_dim: int | tuple = 8
    use_linear_projection: bool = False
    upcast_attention: bool = False
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None
    time_cond_proj_dim: int | None = None  # of `guidance_embedding`; None: the guidance is no input

    @staticmethod
    def plain(config: dict[str, Any]) -> dict[str, Any]:
        """The same `config.json` in one spelling, where diffusers reads several as the same network."""
        channels = frozen(config.get("block_out_channels", UNetConfig.block_out_channels))
        default = {"time_embedding_dim": 4 * channels[0]} if isinstance(channels, tuple) and channels else {}
        config = {name: None if name in default and value == default[name] else value for name, value in config.items()}
        return respell(config, SPELLINGS)

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> "UNetConfig":
        """Reads a `config.json`. Raises ValueError naming every field that asks for what this UNet does not do."""
        self = read_config(cls, cls.plain(config), NEUTRAL, what="UNet")
        wrong = []
        kinds = {"down_block_types": _DOWN, "up_block_types": _UP}
        for field, known in kinds.items():
            wrong += [f"{field}: {kind!r} (supported: {', '.join(known)})"
                      for kind in getattr(self, field) if kind not in known]  # fmt: skip
        if self.mid_block_type not in _MID:
            wrong.append(f"mid_block_type = {self.mid_block_type!r} (supported: {', '.join(map(repr, _MID))})")
        if isinstance(self.cross_attention_dim, tuple):
            wrong.append(f"cross_attention_dim = {list(self.cross_attention_dim)} (supported: one number)")
        if self.addition_embed_type not in (None, "text_time"):
            wrong.append(f"addition_embed_type = {self.addition_embed_type!r} (supported: None, 'text_time')")
        blocks = len(self.block_out_channels)
        if not blocks == len(self.down_block_types) == len(self.up_block_types):
            wrong.append(
                f"{blocks} block_out_channels, {len(self.down_block_types)} down_block_types and "
                f"{len(self.up_block_types)} up_block_types (supported: as many of each)"
            )
        per_block = ("attention_head_dim", "layers_per_block", "transformer_layers_per_block")
        reverse = "reverse_transformer_layers_per_block"
        for field in (*per_block, reverse):
            value = getattr(self, field)
            if isinstance(value, tuple) and len(value) != blocks:
                wrong.append(f"{field} has {len(value)} entries for {blocks} blocks")
        nested = any(isinstance(depth, tuple) for depth in each(self.transformer_layers_per_block, blocks))
        if nested and self.reverse_transformer_layers_per_block is None:
            wrong.append("a nested transformer_layers_per_block needs reverse_transformer_layers_per_block too")
        if not wrong:  # else there may be no paths to look at
            layers = each(self.layers_per_block, blocks)
            up_layers = [n + 1 for n in layers[::-1]]
            for field, stages, wanted in ((per_block[-1], self.down, layers), (reverse, self.up, up_layers)):
                wrong += [f"{field}[{i}] has {len(stage.depths)} entries for {n} layers"
                          for i, (stage, n) in enumerate(zip(stages, wanted, strict=True))
                          if len(stage.depths) != n]  # fmt: skip
        if wrong:
            raise ValueError("this UNet config.json asks for what flaxkd does not support:\n  " + "\n  ".join(wrong))
        return self

    @property
    def down(self) -> list[Stage]:
        """The down path from the outer to the inner block."""
        n = len(self.block_out_channels)
        layers = each(self.layers_per_block, n)
        depths = each(self.transformer_layers_per_block, n)
        return [
            Stage(self.block_out_channels[i], _depths(self.down_block_types[i], depths[i], layers[i]),
                  each(self.attention_head_dim, n)[i], resample=i < n - 1)
            for i in range(n)
        ]  # fmt: skip

    @property
    def mid(self) -> Stage | None:
        """The mid block: a resnet, then an attention and a resnet for each entry of `depths`."""
        if self.mid_block_type is None:
            return None
        n = len(self.block_out_channels)
        depth = each(self.transformer_layers_per_block, n)[-1]
        depth = depth[0] if isinstance(depth, tuple) else depth
        depths = (depth,) if self.mid_block_type == "UNetMidBlock2DCrossAttn" else ()
        return Stage(self.block_out_channels[-1], depths, each(self.attention_head_dim, n)[-1], resample=False)

    @property
    def up(self) -> list[Stage]:
        """The up path from the inner to the outer block, each with one layer more than its twin on the way down."""
        n = len(self.block_out_channels)
        layers = each(self.layers_per_block, n)[::-1]
        depths = self.reverse_transformer_layers_per_block or each(self.transformer_layers_per_block, n)[::-1]
        return [
            Stage(self.block_out_channels[::-1][i], _depths(self.up_block_types[i], depths[i], layers[i] + 1),
                  each(self.attention_head_dim, n)[::-1][i], resample=i < n - 1)
            for i in range(n)
        ]  # fmt: skip


_DOWN = ("CrossAttnDownBlock2D", "DownBlock2D")
_MID = ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None)
_UP = ("CrossAttnUpBlock2D", "UpBlock2D")


def _without_old_prefix(kinds):
    """Types of blocks without "UNetRes", which names from before diffusers 0.2 begin with."""
    return [str(kind).removeprefix("UNetRes") for kind in kinds] if isinstance(kinds, list | tuple) else kinds


SPELLINGS = {
    "act_fn": lower,
    "attention_head_dim": one,
    "cross_attention_dim": one,
    "down_block_types": _without_old_prefix,
    "flip_sin_to_cos": flag,
    "only_cross_attention": one,
    "sample_size": one,
    "up_block_types": _without_old_prefix,
    "upcast_attention": flag,
    "use_linear_projection": flag,
}

# Fields of diffusers' config.json that change nothing here at these values, and are refused at any other. Those with
# None are of the training alone, or of kinds of blocks that this UNet does not have.
NEUTRAL = {
    "act_fn": ("silu", "swish"),
    "addition_embed_type_num_heads": None,
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "class_embeddings_concat": (False,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "dropout": None,
    "cross_attention_norm": None,
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "mid_block_only_cross_attention": None,
    "mid_block_scale_factor": (1,),
    "num_attention_heads": (None,),
    "num_class_embeds": (None,),
    "only_cross_attention": (False,),
    "resnet_skip_time_act": None,
    "resnet_out_scale_factor": None,
    "resnet_time_scale_shift": ("default",),
    "time_embedding_act_fn": (None,),
    "time_embedding_dim": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
}


def each(value, n: int) -> tuple:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,) * n


def _depths(block_type: str, depth, layers: int) -> tuple[int | None, ...]:
    return each(depth, layers)[:layers] if block_type.startswith("CrossAttn") else (None,) * layers


def timestep_embedding(timesteps, channels: int, *, flip_sin_to_cos: bool, freq_shift: float) -> jax.Array:
    """Sinusoids of `timesteps` [b], float32[b, channels] (Vaswani et al. 2017; diffusers `get_timestep_embedding`)."""
    half = channels // 2
    frequencies = jnp.exp(-jnp.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / (half - freq_shift))
    angles = timesteps.astype(jnp.float32)[:, None] * frequencies[None]
    waves = [jnp.cos(angles), jnp.sin(angles)] if flip_sin_to_cos else [jnp.sin(angles), jnp.cos(angles)]
    return jnp.concatenate(waves, axis=-1)


def guidance_embedding(guidance, channels: int) -> jax.Array:
    """Sinusoids of a guidance [b], 1 for none: float32[b, channels] (diffusers `get_guidance_scale_embedding`)."""
    w = jnp.asarray(guidance, jnp.float32) - 1
    return timestep_embedding(1000 * w, channels, flip_sin_to_cos=False, freq_shift=1)


class TimestepEmbedding(nn.Module):
    """Two layers, float[b, c] -> float[b, channels]."""

    channels: int
    dtype: jnp.dtype = jnp.float32
    cond_proj_dim: int | None = None

    @nn.compact
    def __call__(self, x, condition=None):
        if self.cond_proj_dim is not None:  # without a condition, its zeros add nothing
            condition = jnp.zeros((x.shape[0], self.cond_proj_dim)) if condition is None else condition
            project = nn.Dense(x.shape[-1], use_bias=False, dtype=self.dtype, name="cond_proj")
            x = x + project(condition.astype(self.dtype))
        x = nn.silu(nn.Dense(self.channels, dtype=self.dtype, name="linear_1")(x))
        return nn.Dense(self.channels, dtype=self.dtype, name="linear_2")(x)


class GEGLU(nn.Module):
    """value * gelu(gate), with the exact GELU: the tanh form that Flax defaults to costs 4e-4 of parity."""

    channels: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        value, gate = jnp.split(nn.Dense(2 * self.channels, dtype=self.dtype, name="proj")(x), 2, axis=-1)
        return value * nn.gelu(gate, approximate=False)


class FeedForward(nn.Module):
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        channels = x.shape[-1]
        x = GEGLU(4 * channels, self.dtype, name="net.0")(x)
        return emit(self, nn.Dense(channels, dtype=self.dtype, name="net.2")(x))


class BasicTransformerBlock(nn.Module):
    """x + self-attention, + cross-attention to the text, + feed-forward, each after a norm: float[b, n, c]."""

    heads: int
    upcast: bool
    dtype: jnp.dtype = jnp.float32
    attend: DotProductAttention = dot_product_attention

    @nn.compact
    def __call__(self, x, encoder_hidden_states):
        norm = lambda name: LayerNorm(dtype=self.dtype, name=name)
        attention = lambda name: Attention(self.heads, False, self.upcast, self.dtype, self.attend, name=name)
        x = x + attention("attn1")(norm("norm1")(x))
        x = x + attention("attn2")(norm("norm2")(x), encoder_hidden_states)
        x = x + FeedForward(self.dtype, name="ff")(norm("norm3")(x))
        return emit(self, x)


class Transformer2DModel(nn.Module):
    """x + proj_out(blocks(proj_in(norm(x)))), float[b, h, w, c]. Without blocks the projections remain."""

    depth: int
    heads: int
    config: UNetConfig
    dtype: jnp.dtype = jnp.float32
    attend: DotProductAttention = dot_product_attention
    remat: bool = False  # of every transformer block

    @nn.compact
    def __call__(self, x, encoder_hidden_states):
        b, h, w, c = x.shape
        linear = self.config.use_linear_projection

        def project(y, name):
            if linear:  # a hook in PyTorch sees [b, h w, c] here, and [b, c, h, w] there
                y = nn.Dense(c, dtype=self.dtype, name=name)(y.reshape(b, h * w, c))
            else:
                y = Conv(c, 1, dtype=self.dtype, name=name)(y.reshape(b, h, w, c))
            return emit(self, y, name)

        y = GroupNorm(self.config.norm_num_groups, 1e-6, dtype=self.dtype, name="norm")(x)
        y = project(y, "proj_in").reshape(b, h * w, c)
        for i in range(self.depth):
            block = nn.remat(BasicTransformerBlock) if self.remat else BasicTransformerBlock
            name = f"transformer_blocks.{i}"
            block = block(self.heads, self.config.upcast_attention, self.dtype, self.attend, name=name)
            y = block(y, encoder_hidden_states)
        return emit(self, x + project(y, "proj_out").reshape(b, h, w, c))


class DownBlock(nn.Module):
    """Layers, then a downsampler. Returns (output, skips): the output of every layer and of the downsampler."""

    stage: Stage
    config: UNetConfig
    dtype: jnp.dtype = jnp.float32
    attend: DotProductAttention = dot_product_attention
    remat: bool = False  # of every resnet and transformer block

    @nn.compact
    def __call__(self, x, temb, encoder_hidden_states):
        skips = []
        for i, depth in enumerate(self.stage.depths):
            x = layer(self, i, depth, x, temb, encoder_hidden_states)
            skips.append(x)
        if self.stage.resample:
            x = Downsample2D(self.config.downsample_padding, self.dtype, name="downsamplers.0")(x)
            skips.append(x)
        return emit(self, x), skips


class MidBlock(nn.Module):
    """A resnet, then an attention and a resnet for each entry of `stage.depths`."""

    stage: Stage
    config: UNetConfig
    dtype: jnp.dtype = jnp.float32
    attend: DotProductAttention = dot_product_attention
    remat: bool = False  # of every resnet and transformer block

    @nn.compact
    def __call__(self, x, temb, encoder_hidden_states):
        x = resnet(self, 0)(x, temb)
        for i, depth in enumerate(self.stage.depths):
            x = attention(self, i, depth)(x, encoder_hidden_states)
            x = resnet(self, i + 1)(x, temb)
        return emit(self, x)


class UpBlock(nn.Module):
    """Layers that each take one skip, then an upsampler to the shape (h, w) of the skip that comes next."""

    stage: Stage
    config: UNetConfig
    dtype: jnp.dtype = jnp.float32
    attend: DotProductAttention = dot_product_attention
    remat: bool = False  # of every resnet and transformer block

    @nn.compact
    def __call__(self, x, temb, encoder_hidden_states, skips, shape):
        for i, depth in enumerate(self.stage.depths):
            x = jnp.concatenate([x, skips[-1 - i]], axis=-1)
            x = layer(self, i, depth, x, temb, encoder_hidden_states)
        if self.stage.resample:
            x = Upsample2D(self.dtype, name="upsamplers.0")(x, shape)
        return emit(self, x)


def resnet(block, i: int) -> ResnetBlock2D:
    c, kind = block.config, nn.remat(ResnetBlock2D) if block.remat else ResnetBlock2D
    return kind(block.stage.channels, c.norm_num_groups, c.norm_eps, block.dtype, name=f"resnets.{i}")


def attention(block, i: int, depth: int) -> Transformer2DModel:
    settings = block.config, block.dtype, block.attend, block.remat
    return Transformer2DModel(depth, block.stage.heads, *settings, name=f"attentions.{i}")


def layer(block, i: int, depth: int, x, temb, encoder_hidden_states):
    """Layer i of a block: a resnet, then an attention if there is one."""
    x = resnet(block, i)(x, temb)
    return x if depth is None else attention(block, i, depth)(x, encoder_hidden_states)


# What is recomputed in the backward pass: nothing, down, mid and up blocks, or the smaller modules inside of them.
REMAT = (False, True, "blocks", "transformer_blocks")


class UNet2DCondition(nn.Module):
    """Predicts the noise (or v) in `sample`.

    sample: float[b, h, w, in_channels], noisy latents. timesteps: int or float[b]. beside: float[b, h, w, c], the last
    of these channels, where a UNet sees more than noisy latents; None: `sample` has them all.
    encoder_hidden_states: float[b, l, cross_attention_dim]. For SDXL also text_embeds float[b, e] and time_ids [b, 6].
    timestep_cond: float[b, time_cond_proj_dim], a `guidance_embedding`, where the guidance is an input; None: without.
    Returns float[b, h, w, out_channels] in `dtype`. With `mutable=["features"]`, also what every block, layer and
    attention made (see `layers.features`). Parameters are float32 at initialisation; `dtype` is that of the compute.
    `remat` recomputes each block in the backward pass instead of keeping its inside: True or "blocks", a down, mid or
    up block; "transformer_blocks", a transformer block or resnet. Captured features stay exact.
    `attend` is the arithmetic of attention, which is the same in every form that it takes.
    """

    config: UNetConfig
    dtype: jnp.dtype = jnp.float32
    remat: bool | str = False  # one of REMAT
    attend: DotProductAttention = dot_product_attention

    def __post_init__(self):
        if self.remat not in REMAT:
            raise ValueError(f"remat = {self.remat!r} is unknown (known: {', '.join(map(repr, REMAT))})")
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        sample,
        timesteps,
        encoder_hidden_states,
        text_embeds=None,
        time_ids=None,
        timestep_cond=None,
        beside=None,
    ):
        c, inner = self.config, self.remat == "transformer_blocks"
        down_block, mid_block, up_block = (
            (nn.remat(block, static_argnums=static) if self.remat and not inner else block)
            for block, static in ((DownBlock, ()), (MidBlock, ()), (UpBlock, (5,)))
        )
        sinusoids = dict(flip_sin_to_cos=c.flip_sin_to_cos, freq_shift=c.freq_shift)
        width = c.block_out_channels[0]
        temb = timestep_embedding(timesteps, width, **sinusoids).astype(self.dtype)
        time_embedding = TimestepEmbedding(4 * width, self.dtype, c.time_cond_proj_dim, name="time_embedding")
        temb = time_embedding(temb, timestep_cond)
        if c.addition_embed_type == "text_time":
            sizes = timestep_embedding(time_ids.reshape(-1), c.addition_time_embed_dim, **sinusoids)
            added = jnp.concatenate([text_embeds, sizes.reshape(sample.shape[0], -1)], axis=-1).astype(self.dtype)
            temb = temb + TimestepEmbedding(4 * width, self.dtype, name="add_embedding")(added)
        encoder_hidden_states = encoder_hidden_states.astype(self.dtype)

        sample = sample if beside is None else jnp.concatenate([sample, beside.astype(sample.dtype)], axis=-1)
        x = Conv(width, dtype=self.dtype, name="conv_in")(sample.astype(self.dtype))
        skips = [x]
        for i, stage in enumerate(c.down):
            block = down_block(stage, c, self.dtype, self.attend, inner, name=f"down_blocks.{i}")
            x, new = block(x, temb, encoder_hidden_states)
            skips += new
        if c.mid is not None:
            block = mid_block(c.mid, c, self.dtype, self.attend, inner, name="mid_block")
            x = block(x, temb, encoder_hidden_states)
        for i, stage in enumerate(c.up):
            n = len(stage.depths)
            skips, taken = skips[:-n], skips[-n:]
            shape = skips[-1].shape[1:3] if stage.resample else None
            block = up_block(stage, c, self.dtype, self.attend, inner, name=f"up_blocks.{i}")
            x = block(x, temb, encoder_hidden_states, taken, shape)

        x = nn.silu(GroupNorm(c.norm_num_groups, c.norm_eps, dtype=self.dtype, name="conv_norm_out")(x))
        return emit(self, Conv(c.out_channels, dtype=self.dtype, name="conv_out")(x))
