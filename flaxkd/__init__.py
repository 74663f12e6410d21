"""Knowledge distillation of Stable Diffusion UNets in JAX and Flax.

To follow a run, read five files: configs/small.py, tasks/distill.py (what is trained), training/step.py (the
train step), training/checkpoint.py (nothing is lost), export/workdir.py (the student as a pipeline folder); train.py
runs them in order. The tables are students/table.py, pretrained/families.py, tasks/__init__.py and
diffusion/samplers.py. CONTRIBUTING.md says how to add a row.

Shape letters: b batch, h w rows and columns of latents, H W of images, c channels, l text tokens, d text width.
Arrays are NHWC. Names are diffusers': latents, noise_pred, timesteps, encoder_hidden_states.
"""


def __getattr__(name: str):
    """`from flaxkd import Pipeline`, imported on first use: `import flaxkd` alone imports neither JAX nor a model."""
    if name == "Pipeline":
        from flaxkd.drawing.pipeline import Pipeline

        return Pipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
