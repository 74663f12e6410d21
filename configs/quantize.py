"""Quantization-aware distillation: a distilled student learns to compute in 4 bits. docs/quantization.md has results.

    python -m flaxkd.train --config configs/quantize.py                           the miniature's, of configs/small.py
    python -m flaxkd.train --config configs/quantize.py --config.quantize=w8a8
    python -m flaxkd.train --config configs/quantize.py:sd15 --config.init=DIR --config.data.source=DIR

With `--config.quantize=None` it trains the same student in full precision for as long, to compare with.
"""

from configs import default, recipes


def get_config(arg=None):
    recipes.check(arg, __file__, "sd15")
    config = default.get_config()
    config.student = "sd_small"
    config.quantize = "w4"
    return recipes.quantized(config) if arg else recipes.embedded_quantized(config)
