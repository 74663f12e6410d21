"""Segmind's SSD-1B: 1,331,334,404 parameters, 52 % of SDXL's.

The transformer blocks it keeps are an estimate from its weights: `python -m flaxkd.students`.

    python -m flaxkd.train --config configs/ssd_1b.py          the embedded miniature of SDXL, on a laptop
    python -m flaxkd.train --config configs/ssd_1b.py:sdxl --config.data.source=DIR    Segmind's recipe, for TPU or GPU

With the latter, `--config.teacher=DIR|HUB_ID` takes another SDXL.
"""

from configs import default, recipes


def get_config(arg=None):
    recipes.check(arg, __file__, "sdxl")
    config = default.get_config()
    config.student = "ssd_1b"
    config.pairing = "segmind_sdxl"
    return recipes.segmind_sdxl(config) if arg else recipes.embedded_xl(config)
