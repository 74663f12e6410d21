"""Every output and every captured feature equals PyTorch's: diffusers' UNet and autoencoder, transformers' CLIP."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxkd import pretrained, students
from flaxkd.models.layers import FEATURES, features
from flaxkd.models.unet import guidance_embedding
from flaxkd.pretrained import keys
from tests.models.test_unet import SD1
from tests.parity.references import perturb

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

TOLERANCE = 2e-5  # of a signal scaled to unit root mean square; never to be relaxed

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
    transformer_layers_per_block=[0, [2, 1], [2, 3]],
    reverse_transformer_layers_per_block=[[3, 1, 2], [2, 1, 1], 1],
    mid_block_type="UNetMidBlock2D",
)
KOALA = SDXL | dict(layers_per_block=1, mid_block_type=None)
KOALA1B = SDXL | dict(layers_per_block=1, transformer_layers_per_block=[0, 1, 2])
VEGA = SDXL | dict(transformer_layers_per_block=[1, 1, 2], mid_block_type="UNetMidBlock2D")
HOLLOW = SDXL | dict(  # attentions without transformer blocks
    layers_per_block=[1, 2, 1],
    transformer_layers_per_block=[1, [0, 1], 0],
    reverse_transformer_layers_per_block=[[1, 0], [0, 1, 1], 1],
)
TWO_STAGES = SD2 | dict(  # for what has to be compiled whole
    block_out_channels=[8, 16],
    attention_head_dim=[1, 2],
    layers_per_block=1,
    down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
    mid_block_type="UNetMidBlock2D",
    up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"],
    norm_num_groups=4,
)


def cut(student, teacher):
    return students.config(students.get(student), teacher)


# (config, rows and columns of the latents). Run operation by operation, as most of those recur: the first case
# takes 16 s and a student 2 s on 2 cores, where compiling each as a whole takes 10 and 5 s.
CASES = {
    "sd1": (SD1, 16),
    "sd2": (SD2, 16),
    **{f"sd1 {name}": (cut(name, SD1), 16) for name in ("sd_small", "bk_small", "sd_tiny")},
    **{f"sd2 {name}": (cut(name, SD2), 16) for name in ("sd_small", "bk_small", "sd_tiny")},
    "sdxl": (SDXL, 16),
    "ssd-1b": (SSD1B, 16),
    "koala": (KOALA, 16),
    "koala-1b": (KOALA1B, 16),
    "vega": (VEGA, 16),
    "attentions without transformer blocks": (HOLLOW, 16),
    "guidance as an input": (SD1 | dict(time_cond_proj_dim=32), 16),
}

# The classes in diffusers of which every instance in a UNet has its output captured.
BLOCKS = ("DownBlock2D", "UNetMidBlock2D", "UNetMidBlock2DCrossAttn", "UpBlock2D")
BLOCKS += ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D")
LAYERS = ("ResnetBlock2D", "Transformer2DModel", "Downsample2D", "Upsample2D")
INNER = ("BasicTransformerBlock", "Attention", "FeedForward")


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def params_of(module, model, part):
    tensors = {key: value.numpy() for key, value in model.state_dict().items()}
    return keys.from_tensors(tensors, pretrained.families._shapes(part, module.config), part)


def assert_close(ours, theirs, name):
    """theirs: NCHW of a convolution, or [b, h w, c] of a transformer."""
    theirs = theirs.detach().numpy()
    if theirs.ndim == 4:
        theirs = theirs.transpose(0, 2, 3, 1)
    assert ours.shape == theirs.shape, name
    scale = np.sqrt(np.mean(theirs**2))
    assert scale > 1e-3, f"{name} is nearly zero, so that anything would pass"
    np.testing.assert_allclose(ours / scale, theirs / scale, rtol=0, atol=TOLERANCE, err_msg=name)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)  # `perturb` adds to the biases that torch draws


def hook(model):
    """{module name: output} of every module, filled at the next call; of a tuple the first element."""
    outputs = {}

    def keep(name, out):
        out = getattr(out, "sample", out)
        outputs[name] = out[0] if isinstance(out, tuple) else out

    for name, child in model.named_modules():
        child.register_forward_hook(lambda _, __, out, name=name: keep(name, out))
    return outputs


def assert_features_close(captured, hooked):
    assert captured.keys() <= hooked.keys()
    for name, value in captured.items():
        assert_close(value, hooked[name], name)


def nchw(x):
    return torch.tensor(x.transpose(0, 3, 1, 2))


def unet_and_torch(config, size, **kwargs):
    """Our UNet with its variables and inputs, the torch model's output for them, and what its hooks saw."""
    model = perturb(diffusers.UNet2DConditionModel(**config), 0)
    hooked = hook(model)
    sample, timesteps, text = normal(0, 2, size, size, 4), np.array([3, 700]), normal(1, 2, 5, 24)
    added = {}
    if config.get("addition_embed_type"):
        added = {"text_embeds": normal(2, 2, 16), "time_ids": np.arange(12, dtype=np.float32).reshape(2, 6)}
    scales = config.get("time_cond_proj_dim") and embedded([1.0, 7.5], config["time_cond_proj_dim"])
    with torch.no_grad():
        expected = model(
            nchw(sample),
            torch.tensor(timesteps),
            torch.tensor(text),
            added_cond_kwargs={name: torch.tensor(x) for name, x in added.items()},
            timestep_cond=scales,
        ).sample
    unet = pretrained.build("unet", config, **kwargs)
    variables = {"params": params_of(unet, model, "unet")}
    ours = () if scales is None else (None, None, scales.numpy())
    return unet, variables, (sample, timesteps, text, *added.values(), *ours), model, expected, hooked


def embedded(guidance, channels):
    """As the pipelines of diffusers embed a guidance."""
    embed = diffusers.StableDiffusionPipeline.get_guidance_scale_embedding
    return embed(None, torch.tensor(guidance) - 1, channels)


def test_guidance_embedding():
    guidance = [1.0, 4.0, 7.5, 15.9]
    ours = guidance_embedding(guidance, 256)  # angles up to 15,000, in float32
    np.testing.assert_allclose(ours, embedded(guidance, 256).numpy(), atol=5e-3)


def assert_all_close(noise_pred, captured, model, expected, hooked):
    assert_close(noise_pred, expected, "output")
    captured = dict(captured)
    np.testing.assert_array_equal(captured.pop(""), noise_pred)  # the UNet's own
    promised = {
        name
        for name, child in model.named_modules()
        if type(child).__name__ in BLOCKS + LAYERS + INNER or name.endswith(("proj_in", "proj_out"))
    }
    assert captured.keys() == promised
    assert_features_close(captured, hooked)


@pytest.mark.parametrize("case", CASES)
def test_unet(case):
    unet, variables, inputs, *reference = unet_and_torch(*CASES[case])
    noise_pred, captured = unet.apply(variables, *inputs, mutable=[FEATURES])
    assert_all_close(noise_pred, features(captured), *reference)


@pytest.mark.slow
def test_remat_changes_neither_output_nor_features_nor_gradient():
    unet, variables, inputs, *reference = unet_and_torch(TWO_STAGES, 5)  # an odd size: halved to 3, doubled to 5
    results, recomputed = [], []
    for remat in (False, True, "transformer_blocks"):

        def loss(params, remat=remat):
            out, captured = unet.clone(remat=remat).apply({"params": params}, *inputs, mutable=[FEATURES])
            captured = features(captured)
            compared = [captured[name] for name in ("down_blocks.0", "mid_block.resnets.0", "up_blocks.1")]
            return sum(jnp.mean(x**2) for x in (out, *compared)), (out, captured)

        program = jax.jit(jax.value_and_grad(loss, has_aux=True)).trace(variables["params"])
        recomputed.append(str(program.jaxpr).count("remat"))
        results.append(program.lower().compile()(variables["params"]))
        assert_all_close(*results[-1][0][1], *reference)
    assert recomputed[0] == 0 < recomputed[1] < recomputed[2]
    plain, *others = (
        {jax.tree_util.keystr(path): x for path, x in jax.tree.leaves_with_path(result)} for result in results
    )
    for again in others:
        assert plain.keys() == again.keys()
        for name, x in plain.items():
            scale = jnp.abs(x).max()
            assert scale > 0, name
            np.testing.assert_allclose(again[name] / scale, x / scale, rtol=0, atol=TOLERANCE, err_msg=name)


def test_bfloat16_compute_is_near_float32():
    unet, variables, inputs, _, expected, _ = unet_and_torch(TWO_STAGES, 8, dtype=jnp.bfloat16)
    half = jax.jit(unet.apply)(variables, *inputs)
    assert half.dtype == jnp.bfloat16
    exact = expected.numpy().transpose(0, 2, 3, 1)
    error = np.sqrt(np.mean((half.astype(np.float32) - exact) ** 2) / np.mean(exact**2))
    assert 1e-4 < error < 0.05


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
    variables = {"params": params_of(vae, model, "vae")}
    hooked = hook(model)
    images, latents = normal(0, 2, 32, 32, 3), normal(1, 2, 8, 8, 4)
    with torch.no_grad():
        posterior = model.encode(nchw(images)).latent_dist
        moments = torch.cat([posterior.mean, posterior.logvar], 1)
        decoded = model.decode(nchw(latents)).sample
    promised = {name for name, child in model.named_modules() if type(child).__name__ in LAYERS}
    for method, x, expected in (("encode", images, moments), ("decode", latents, decoded)):
        out, captured = vae.apply(variables, x, method=method, mutable=[FEATURES])
        assert_close(out, expected, method)
        captured = features(captured)
        assert captured.keys() == {name for name in promised if name.startswith(method)}
        assert_features_close(captured, hooked)


@pytest.mark.parametrize("hidden_act", ["quick_gelu", "gelu"])
def test_text_encoder(hidden_act):
    from transformers import CLIPTextConfig, CLIPTextModel

    config = dict(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=12, hidden_act=hidden_act, bos_token_id=48, eos_token_id=49,
    )  # fmt: skip
    model = perturb(CLIPTextModel(CLIPTextConfig(**config)), 0)
    hooked = hook(model)
    ids = np.random.default_rng(0).integers(0, 50, (3, 10))
    with torch.no_grad():
        expected = model(torch.tensor(ids)).last_hidden_state
    text_encoder = pretrained.build("text_encoder", config)
    params = params_of(text_encoder, model, "text_encoder")
    out, captured = text_encoder.apply({"params": params}, ids.astype(np.int32), mutable=[FEATURES])
    assert_close(out, expected, "last_hidden_state")
    captured = features(captured)
    np.testing.assert_array_equal(captured.pop(""), out)
    if not any(name.startswith("text_model.") for name in hooked):  # transformers 5 dropped the prefix
        captured = {name.removeprefix("text_model."): x for name, x in captured.items()}
    assert len(captured) == 2 * config["num_hidden_layers"]
    assert_features_close(captured, hooked)
