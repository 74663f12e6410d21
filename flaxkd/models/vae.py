"""The autoencoder of Stable Diffusion (diffusers `AutoencoderKL`): images to latents and back, in functional Linen.

Rombach et al. 2022 (arXiv:2112.10752), section 3.1. Module names are diffusers' names, its configuration is
diffusers' `vae/config.json`, layout is NHWC.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from flaxkd.models.attention import dot_product_attention
from flaxkd.models.layers import (
    Conv,
    Downsample2D,
    GroupNorm,
    ResnetBlock2D,
    Upsample2D,
    lower,
    one,
    read_config,
    respell,
)

EPS = 1e-6  # of every norm in the autoencoder; the UNet's resnets have 1e-5


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """The fields of diffusers' `vae/config.json` that vary. `factor` is how many pixels a latent is wide."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple = (128, 256, 512, 512)
    layers_per_block: int = 1
    norm_num_groups: int = 32
    sample_size: int | tuple | None = 32
    scaling_factor: float = 0.18215

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> "VAEConfig":
        """Reads a `config.json`. Raises ValueError naming every field that asks for what is not supported."""
        return read_config(cls, cls.plain(config), NEUTRAL, what="autoencoder")

    @staticmethod
    def plain(config: dict[str, Any]) -> dict[str, Any]:
        """The same `config.json` in one spelling."""
        return respell(config, {"sample_size": one, "act_fn": lower})

    @property
    def factor(self) -> int:
        return 2 ** (len(self.block_out_channels) - 1)


NEUTRAL = {
    "act_fn": ("silu", "swish"),
    "down_block_types": None,  # one kind exists, repeated
    "up_block_types": None,
    "force_upcast": None,  # a wish of the pipeline, not of the weights
    "latents_mean": (None,),
    "latents_std": (None,),
    "mid_block_add_attention": (True,),
    "shift_factor": (None, 0.0),
    "use_post_quant_conv": (True,),
    "use_quant_conv": (True,),
}


class VAEAttention(nn.Module):
    """x + self-attention over all positions, one head, float[b, h, w, c]."""

    groups: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        b, h, w, c = x.shape
        y = GroupNorm(self.groups, EPS, dtype=self.dtype, name="group_norm")(x).reshape(b, h * w, c)
        dense = lambda name: nn.Dense(c, dtype=self.dtype, name=name)
        query, key, value = (dense(name)(y)[:, :, None] for name in ("to_q", "to_k", "to_v"))
        y = dot_product_attention(query, key, value)[:, :, 0]
        return x + dense("to_out.0")(y).reshape(x.shape)


class UNetMidBlock2D(nn.Module):
    groups: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        resnet = lambda i: ResnetBlock2D(x.shape[-1], self.groups, EPS, self.dtype, name=f"resnets.{i}")
        x = resnet(0)(x)
        x = VAEAttention(self.groups, self.dtype, name="attentions.0")(x)
        return resnet(1)(x)


class Block(nn.Module):
    """Resnets, then a change of resolution: "down", "up" or None."""

    channels: int
    layers: int
    groups: int
    resample: str | None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        for i in range(self.layers):
            x = ResnetBlock2D(self.channels, self.groups, EPS, self.dtype, name=f"resnets.{i}")(x)
        if self.resample == "down":
            x = Downsample2D(0, self.dtype, name="downsamplers.0")(x)
        if self.resample == "up":
            x = Upsample2D(self.dtype, name="upsamplers.0")(x)
        return x


class Encoder(nn.Module):
    config: VAEConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        c, channels = self.config, self.config.block_out_channels
        x = Conv(channels[0], dtype=self.dtype, name="conv_in")(x)
        for i, width in enumerate(channels):
            resample = "down" if i < len(channels) - 1 else None
            block = Block(width, c.layers_per_block, c.norm_num_groups, resample, self.dtype, name=f"down_blocks.{i}")
            x = block(x)
        x = UNetMidBlock2D(c.norm_num_groups, self.dtype, name="mid_block")(x)
        x = nn.silu(GroupNorm(c.norm_num_groups, EPS, dtype=self.dtype, name="conv_norm_out")(x))
        return Conv(2 * c.latent_channels, dtype=self.dtype, name="conv_out")(x)


class Decoder(nn.Module):
    config: VAEConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        c, channels = self.config, self.config.block_out_channels[::-1]
        x = Conv(channels[0], dtype=self.dtype, name="conv_in")(x)
        x = UNetMidBlock2D(c.norm_num_groups, self.dtype, name="mid_block")(x)
        for i, width in enumerate(channels):
            resample = "up" if i < len(channels) - 1 else None
            block = Block(width, c.layers_per_block + 1, c.norm_num_groups, resample, self.dtype, name=f"up_blocks.{i}")
            x = block(x)
        x = nn.silu(GroupNorm(c.norm_num_groups, EPS, dtype=self.dtype, name="conv_norm_out")(x))
        return Conv(c.out_channels, dtype=self.dtype, name="conv_out")(x)


class AutoencoderKL(nn.Module):
    """Images float[b, H, W, 3] in [-1, 1] to the moments of their latents, and latents back to images.

    encode: -> moments float32[b, H/factor, W/factor, 2 latent_channels], mean and log-variance (clipped to
    [-30, 20]) of the posterior, *before* `scaling_factor`: see `sample_latents`. decode: latents float[b, h, w, 4],
    divided by `scaling_factor` already -> images float[b, H, W, 3]. Use as
    `vae.apply({"params": p}, x, method="encode")`.
    """

    config: VAEConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        c = self.config
        self.encoder = Encoder(c, self.dtype)
        self.decoder = Decoder(c, self.dtype)
        self.quant_conv = Conv(2 * c.latent_channels, 1, dtype=self.dtype)
        self.post_quant_conv = Conv(c.latent_channels, 1, dtype=self.dtype)

    def encode(self, images):
        moments = self.quant_conv(self.encoder(images.astype(self.dtype))).astype(jnp.float32)
        mean, logvar = jnp.split(moments, 2, axis=-1)
        return jnp.concatenate([mean, jnp.clip(logvar, -30.0, 20.0)], axis=-1)

    def decode(self, latents):
        return self.decoder(self.post_quant_conv(latents.astype(self.dtype)))

    def __call__(self, images):
        """The reconstruction from the posterior's mean."""
        return self.decode(jnp.split(self.encode(images), 2, axis=-1)[0])


def sample_latents(noise: jax.Array, moments: jax.Array, scaling_factor: float) -> jax.Array:
    """Latents float32[b, h, w, c] of moments [b, h, w, 2c], scaled to about unit variance for the UNet.

    noise: float32[b, h, w, c], unit Gaussian, which chooses the sample of the posterior."""
    mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
    return (mean + jnp.exp(0.5 * logvar) * noise) * scaling_factor
