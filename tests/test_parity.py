"""Every output and every captured feature equals PyTorch's: diffusers' UNet and autoencoder, transformers' CLIP."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import perturb

from flaxkd import keys, pretrained, students
from flaxkd.models.layers import FEATURES, features
from flaxkd.models.unet import UNetConfig

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

TOLERANCE = 2e-5  # of a signal scaled to unit root mean square; never to be relaxed

SD1 = dict(
    sample_size=8,
    block_out_channels=[32, 64, 64, 64],
    layers_per_block=2,
    attention_head_dim=4,
    cross_attention_dim=24,
    down_block_types=["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    norm_num_groups=8,
)
SD2 = SD1 | dict(attention_head_dim=[1, 2, 4, 4], use_linear_projection=True, upcast_attention=True)
SDXL = SD2 | dict(
    block_out_channels=[32, 64, 64],
    attention_head_dim=[1, 2, 4],
    down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    transformer_layers_per_block=[1, 2, 3],
    addition_embed_type="text_time",
    addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=6 * 8 + 16,
    upcast_attention=False,
)
SSD1B = SDXL | dict(
    transformer_layers_per_block=[[0, 0], [2, 2], [3, 3]],
    reverse_transformer_layers_per_block=[[3, 3, 4], [2, 1, 1], [1, 1, 1]],
    mid_block_type="UNetMidBlock2D",
)
KOALA = SDXL | dict(layers_per_block=1)


def cut(student, teacher):
    return students.config(students.get(student), teacher)


# Few, since each is compiled: together they cover teacher and students with the options of SD 1, 2 and XL.
CASES = {
    "sd1 at an odd size": (SD1, 10),
    "sd2": (SD2, 8),
    "sd1 sd_small": (cut("sd_small", SD1), 8),
    "sd2 bk_small": (cut("bk_small", SD2), 8),
    "sd1 sd_tiny": (cut("sd_tiny", SD1), 8),
    "ssd-1b": (SSD1B, 8),
    "koala": (KOALA, 8),
}


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def params_of(module, model, part):
    tensors = {key: value.numpy() for key, value in model.state_dict().items()}
    return keys.from_tensors(tensors, pretrained.shapes(module, part), part)


def assert_close(ours, theirs, name):
    """theirs: NCHW of a convolution, or [b, h w, c] of a transformer."""
    theirs = theirs.detach().numpy()
    if theirs.ndim == 4:
        theirs = theirs.transpose(0, 2, 3, 1)
    assert ours.shape == theirs.shape, name
    scale = np.sqrt(np.mean(theirs**2))
    assert scale > 1e-3, f"{name} is nearly zero, so that anything would pass"
    np.testing.assert_allclose(ours / scale, theirs / scale, rtol=0, atol=TOLERANCE, err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_unet(case):
    config, size = CASES[case]
    model = perturb(diffusers.UNet2DConditionModel(**config), 0)
    hooked = {}
    for name, child in model.named_modules():
        child.register_forward_hook(
            lambda _, __, out, name=name: hooked.update({name: out[0] if isinstance(out, tuple) else out})
        )
    sample, timesteps, text = normal(0, 2, size, size, 4), np.array([3, 700]), normal(1, 2, 5, 24)
    added = {}
    if config.get("addition_embed_type"):
        added = {"text_embeds": normal(2, 2, 16), "time_ids": np.arange(12, dtype=np.float32).reshape(2, 6)}
    with torch.no_grad():
        expected = model(
            torch.tensor(sample.transpose(0, 3, 1, 2)),
            torch.tensor(timesteps),
            torch.tensor(text),
            added_cond_kwargs={name: torch.tensor(x) for name, x in added.items()},
        ).sample

    unet = pretrained.build("unet", config)
    variables = {"params": params_of(unet, model, "unet")}
    apply = jax.jit(lambda v, *inputs: unet.apply(v, *inputs, mutable=[FEATURES]))
    noise_pred, captured = apply(variables, sample, timesteps, text, *added.values())
    assert_close(noise_pred, expected, "output")
    captured = features(captured)
    captured.pop("")  # the output itself
    assert captured.keys() <= hooked.keys()
    for name, value in captured.items():
        theirs = hooked[name]
        theirs = theirs.sample if hasattr(theirs, "sample") else theirs
        assert_close(value, theirs, name)
    blocks = {name for name, _ in model.named_modules() if name.count(".") == 1 and "_blocks." in name}
    layers = {n for n, _ in model.named_modules() if n.split(".")[-2:-1] in (["resnets"], ["attentions"])}
    ends = ("attn1", "attn2", "ff", "proj_in", "proj_out")
    inner = {name for name, _ in model.named_modules() if name.endswith(ends)}
    assert blocks | layers | inner <= captured.keys()


def test_remat_changes_neither_output_nor_features_nor_gradient():
    config = SD1 | dict(
        block_out_channels=[8, 16],
        down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
        up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"],
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
    )
    inputs = normal(0, 1, 8, 8, 4), np.array([3]), normal(1, 1, 5, 24)
    results = []
    for remat in (False, True):
        unet = pretrained.build("unet", config, remat=remat)
        rng = np.random.default_rng(0)
        like = pretrained.shapes(unet, "unet")
        params = jax.tree.map(lambda x, rng=rng: rng.standard_normal(x.shape).astype(np.float32) / 4, like)

        def loss(params, unet=unet):
            out, captured = unet.apply({"params": params}, *inputs, mutable=[FEATURES])
            captured = features(captured)
            return jnp.mean(out**2) + jnp.mean(captured["down_blocks.1"] ** 2), captured

        results.append(jax.jit(jax.value_and_grad(loss, has_aux=True))(params))
    plain, again = results
    assert plain[0][1].keys() == again[0][1].keys()
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * float(jnp.abs(a).max()) + 1e-12)


def test_bfloat16_compute_is_near_float32():
    config = cut("sd_tiny", SD1)
    model = perturb(diffusers.UNet2DConditionModel(**config), 0)
    unet = pretrained.build("unet", config)
    variables = {"params": params_of(unet, model, "unet")}
    inputs = normal(0, 1, 8, 8, 4), np.array([3]), normal(1, 1, 5, 24)
    exact, half = (jax.jit(u.apply)(variables, *inputs) for u in (unet, unet.clone(dtype=jnp.bfloat16)))
    assert half.dtype == jnp.bfloat16
    error = np.sqrt(np.mean((exact - half.astype(np.float32)) ** 2) / np.mean(exact**2))
    assert 0 < error < 0.05


def test_autoencoder():
    config = dict(
        block_out_channels=[8, 16, 16],
        layers_per_block=2,
        norm_num_groups=4,
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
    )
    model = perturb(diffusers.AutoencoderKL(**config), 0)
    vae = pretrained.build("vae", config)
    params = params_of(vae, model, "vae")
    images, latents = normal(0, 2, 32, 32, 3), normal(1, 2, 8, 8, 4)
    nchw = lambda x: torch.tensor(x.transpose(0, 3, 1, 2))
    with torch.no_grad():
        posterior = model.encode(nchw(images)).latent_dist
        moments, decoded = (
            torch.cat([posterior.mean, posterior.logvar], 1),
            model.decode(nchw(latents)).sample,
        )
    assert_close(vae.apply({"params": params}, images, method="encode"), moments, "moments")
    assert_close(vae.apply({"params": params}, latents, method="decode"), decoded, "images")


@pytest.mark.parametrize("hidden_act", ["quick_gelu", "gelu"])
def test_text_encoder(hidden_act):
    from transformers import CLIPTextConfig, CLIPTextModel

    config = dict(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=12, hidden_act=hidden_act, bos_token_id=48, eos_token_id=49,
    )  # fmt: skip
    model = perturb(CLIPTextModel(CLIPTextConfig(**config)), 0)
    ids = np.random.default_rng(0).integers(0, 50, (3, 12))
    with torch.no_grad():
        expected = model(torch.tensor(ids)).last_hidden_state
    text_encoder = pretrained.build("text_encoder", config)
    params = params_of(text_encoder, model, "text_encoder")
    assert_close(text_encoder.apply({"params": params}, ids.astype(np.int32)), expected, "last_hidden_state")


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(class_embed_type="timestep"), r"class_embed_type = 'timestep' \(supported: None\)"),
        (dict(new_field=3), r"new_field = 3 \(unknown field\)"),
        (dict(down_block_types=["AttnDownBlock2D"] * 4), "down_block_types: 'AttnDownBlock2D'"),
        (dict(attention_head_dim=[1, 2]), "attention_head_dim has 2 entries for 4 blocks"),
        (dict(transformer_layers_per_block=[[1, 1]] * 4), "needs reverse_transformer_layers_per_block"),
    ],
)
def test_a_config_that_asks_for_more_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        UNetConfig.from_dict(SD1 | change)
