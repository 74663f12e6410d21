"""The CLIP text encoders of Stable Diffusion (transformers `CLIPTextModel`, `CLIPTextModelWithProjection`), in
functional Linen.

Radford et al. 2021 (arXiv:2103.00020). SD 1.x uses CLIP ViT-L/14's text model, SD 2.x OpenCLIP ViT-H's without its
last layer, which is a matter of `num_hidden_layers` in `text_encoder/config.json`. SDXL uses ViT-L/14's and, with its
projection, OpenCLIP ViT-bigG's.
"""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from flaxkd.models.attention import dot_product_attention
from flaxkd.models.layers import LayerNorm, emit, read_config


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig:
    """The fields of transformers' `text_encoder/config.json` that matter here, with its defaults."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int = 512  # of an encoder with a projection
    eos_token_id: int | None = 49407  # 2 in old files, whose end of text is the largest id
    skipped: int = 0  # not of transformers: layers between the states that condition a UNet and the usual ones

    @staticmethod
    def plain(config: dict[str, Any]) -> dict[str, Any]:
        """The same `config.json`; of a whole CLIP's, the part of its text encoder."""
        return dict(config["text_config"]) if isinstance(config.get("text_config"), dict) else dict(config)

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> "CLIPTextConfig":
        """Reads a `config.json`, whose many fields for training and generation are not of interest.

        Raises ValueError if it is not of CLIP, or if the activation is not one of `ACTIVATIONS`."""
        self = read_config(cls, cls.plain(config), None, what="text encoder")
        if (kind := config.get("model_type", "clip")) not in ("clip", "clip_text_model"):
            raise ValueError(f"this text encoder config.json is of a {kind}: flaxkd knows CLIP")
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(
                f"this text encoder config.json asks for what flaxkd does not support:\n  hidden_act = "
                f"{self.hidden_act!r} (supported: {', '.join(ACTIVATIONS)})"
            )
        return self


ACTIVATIONS = {
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
    "gelu": functools.partial(nn.gelu, approximate=False),
}


class CLIPAttention(nn.Module):
    """Causal multi-head self-attention, float[b, l, d]."""

    config: CLIPTextConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        b, length, width = x.shape
        dense = lambda name: nn.Dense(width, dtype=self.dtype, name=name)
        split = lambda y: y.reshape(b, length, self.config.num_attention_heads, -1)
        query, key, value = (split(dense(name)(x)) for name in ("q_proj", "k_proj", "v_proj"))
        causal = jnp.tril(jnp.ones((length, length), bool))
        y = dot_product_attention(query, key, value, mask=causal)
        return emit(self, dense("out_proj")(y.reshape(x.shape)))


class CLIPMLP(nn.Module):
    config: CLIPTextConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        y = nn.Dense(self.config.intermediate_size, dtype=self.dtype, name="fc1")(x)
        return nn.Dense(x.shape[-1], dtype=self.dtype, name="fc2")(ACTIVATIONS[self.config.hidden_act](y))


class CLIPEncoderLayer(nn.Module):
    config: CLIPTextConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        norm = lambda name: LayerNorm(self.config.layer_norm_eps, dtype=self.dtype, name=name)
        x = x + CLIPAttention(self.config, self.dtype, name="self_attn")(norm("layer_norm1")(x))
        x = x + CLIPMLP(self.config, self.dtype, name="mlp")(norm("layer_norm2")(x))
        return emit(self, x)


class CLIPTextEmbeddings(nn.Module):
    config: CLIPTextConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, input_ids):
        c = self.config
        embed = lambda rows, name: nn.Embed(
            rows, c.hidden_size, dtype=self.dtype, embedding_init=nn.initializers.normal(0.02), name=name
        )
        tokens = embed(c.vocab_size, "token_embedding")(input_ids)
        return tokens + embed(c.max_position_embeddings, "position_embedding")(jnp.arange(input_ids.shape[1]))


class CLIPEncoder(nn.Module):
    config: CLIPTextConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        for i in range(self.config.num_hidden_layers):
            x = CLIPEncoderLayer(self.config, self.dtype, name=f"layers.{i}")(x)
        return x


class CLIPTextTransformer(nn.Module):
    config: CLIPTextConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, input_ids):
        x = CLIPTextEmbeddings(self.config, self.dtype, name="embeddings")(input_ids)
        x = CLIPEncoder(self.config, self.dtype, name="encoder")(x)
        return LayerNorm(self.config.layer_norm_eps, dtype=self.dtype, name="final_layer_norm")(x)


class CLIPTextModel(nn.Module):
    """input_ids int32[b, l], l at most `max_position_embeddings` -> last_hidden_state float[b, l, hidden_size]."""

    config: CLIPTextConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, input_ids):
        return emit(self, CLIPTextTransformer(self.config, self.dtype, name="text_model")(input_ids))


class CLIPTextModelWithProjection(nn.Module):
    """input_ids int32[b, l], l at most `max_position_embeddings` -> text_embeds float[b, projection_dim].

    The projection of the last hidden state, after the final norm, at the end of the text. Source: transformers'
    `CLIPTextModelWithProjection`."""

    config: CLIPTextConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, input_ids):
        states = CLIPTextTransformer(self.config, self.dtype, name="text_model")(input_ids)
        pooled = states[jnp.arange(states.shape[0]), end_of_text(input_ids, self.config.eos_token_id)]
        project = nn.Dense(self.config.projection_dim, use_bias=False, dtype=self.dtype, name="text_projection")
        return emit(self, project(pooled))


def end_of_text(input_ids, eos_token_id: int | None):
    """The position int32[b] of the first end of text in input_ids int32[b, l].

    OLD_EOS, in files from before transformers 4.30: the largest id, as CLIP itself has it."""
    if eos_token_id in (OLD_EOS, None):
        return jnp.argmax(input_ids, axis=-1)
    return jnp.argmax(input_ids == eos_token_id, axis=-1)


OLD_EOS = 2
