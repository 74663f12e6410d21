"""KOALA-700M: 782,822,724 parameters, 30 % of SDXL's.

Published are its numbers of layers and transformer blocks; which blocks it keeps is our choice.

    python -m flaxkd.train --config configs/koala_700m.py          the embedded miniature of SDXL, on a laptop
    python -m flaxkd.train --config configs/koala_700m.py:sdxl --config.data.source=DIR    KOALA's recipe, for TPU, GPU

With the latter, `--config.teacher=DIR|HUB_ID` takes another SDXL.
"""

from configs import default, recipes


def get_config(arg=None):
    recipes.check(arg, __file__, "sdxl")
    config = default.get_config()
    config.student = "koala_700m"
    config.pairing = "koala"
    return recipes.koala(config) if arg else recipes.embedded_xl(config)
