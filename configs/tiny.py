"""Segmind's SD-Tiny, the same network as BK-SDM-Tiny: 323,384,964 parameters at SD 1.5, 38 % of the teacher's.

The two differ in the compared features; the other is `configs/bk_tiny.py`.

    python -m flaxkd.train --config configs/tiny.py            the embedded miniature teacher, on a laptop
    python -m flaxkd.train --config configs/tiny.py:sd15 --config.data.source=DIR    Segmind's recipe, for TPU or GPU

With the latter, `--config.teacher=DIR|HUB_ID` takes any other teacher.
"""

from configs import default, recipes


def get_config(arg=None):
    recipes.check(arg, __file__, "sd15")
    config = default.get_config()
    config.student = "sd_tiny"
    config.pairing = "segmind"
    return recipes.segmind(config, steps=125_000) if arg else recipes.embedded(config)
