"""Knowledge distillation of Stable Diffusion UNets in JAX and Flax.

To follow a run, read five files: configs/small.py, tasks/distill.py (what is trained), training/step.py (the
train step), training/checkpoint.py (nothing is lost), export/workdir.py (the student as a pipeline folder); train.py
runs them in order. The tables are students/table.py, pretrained/families.py, tasks/__init__.py and
diffusion/samplers.py. CONTRIBUTING.md says how to add a row.

Shape letters: b batch, h w rows and columns of latents, H W of images, c channels, l text tokens, d text width.
Arrays are NHWC. Names are diffusers': latents, noise_pred, timesteps, encoder_hidden_states.
"""

import os
import signal
import sys

__version__ = "0.1.0"


def _interrupted(*_) -> None:
    os.write(2, b"\ninterrupted\n")
    os._exit(130)


# Ctrl-C while `python -m flaxkd.COMMAND` still imports: nothing has begun, and a traceback would say nothing. The
# command itself then brings Python's own handler back (machine/command.py:reported).
_started = sys.orig_argv[sys.orig_argv.index("-m") + 1 :][:1] if "-m" in sys.orig_argv else []
if _started and _started[0].split(".")[0] in ("flaxkd", "convert"):
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # and is not ignored, as under nohup
        signal.signal(signal.SIGINT, _interrupted)


def __getattr__(name: str):
    """`from flaxkd import Pipeline`, imported on first use: `import flaxkd` alone imports neither JAX nor a model."""
    if name == "Pipeline":
        from flaxkd.drawing.pipeline import Pipeline

        return Pipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
