"""Segmind's Vega: 745,225,604 parameters, 29 % of SDXL's.

Published are its numbers of layers and transformer blocks. Loss, steps and learning rate are SSD-1B's here.

    python -m flaxkd.train --config configs/vega.py          the embedded miniature of SDXL, on a laptop
    python -m flaxkd.train --config configs/vega.py:sdxl --config.data.source=DIR    SSD-1B's recipe, for TPU or GPU

With the latter, `--config.teacher=DIR|HUB_ID` takes another SDXL.
"""

from configs import default, recipes


def get_config(arg=None):
    recipes.check(arg, __file__, "sdxl")
    config = default.get_config()
    config.student = "vega"
    config.pairing = "segmind_sdxl"
    return recipes.segmind_sdxl(config) if arg else recipes.embedded_xl(config)
