"""Segmind's SD-Small: 579,384,964 parameters at SD 1.5, 67 % of the teacher's.

The name clashes: this network is BK-SDM-*Base*; BK-SDM-Small lacks the mid block and is `configs/bk_small.py`.

    python -m flaxkd.train --config configs/small.py           the embedded miniature teacher, on a laptop
    python -m flaxkd.train --config configs/small.py:sd15 --config.data.source=DIR    Segmind's recipe, for TPU or GPU

With the latter, `--config.teacher=DIR|HUB_ID` takes any other teacher.
"""

from configs import default, recipes


def get_config(arg=None):
    recipes.check(arg, __file__, "sd15")
    config = default.get_config()
    config.student = "sd_small"
    config.pairing = "segmind"
    return recipes.segmind(config, steps=100_000) if arg else recipes.embedded(config)
