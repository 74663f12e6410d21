"""Knowledge distillation of Stable Diffusion UNets in JAX and Flax.

In reading order: `train` (the order of things), `students` (the table), `distill` (the loss), `step` (the train
step), `models` (UNet, autoencoder, text encoder), `keys` and `pretrained` (diffusers' files), `data` and `latents`
(pictures to batches), `samplers` and `sampling` (drawing), `checkpoint` and `export` (what a run leaves), `pipeline`
(drawing from Python) and `generate` (from the command line).

Shape letters: b batch, h w rows and columns of latents, H W of images, c channels, l text tokens, d text width.
Arrays are NHWC. Names are diffusers': latents, noise_pred, timesteps, encoder_hidden_states.
"""


def __getattr__(name: str):
    """`from flaxkd import Pipeline`, read at its first use: `import flaxkd` alone imports neither JAX nor a model."""
    if name == "Pipeline":
        from flaxkd.drawing.pipeline import Pipeline

        return Pipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
