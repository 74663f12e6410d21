"""BK-SDM-Tiny: 323,384,964 parameters at SD 1.4. The network is the same as Segmind's SD-Tiny (`configs/tiny.py`).

BK-SDM's own recipe, for TPU or GPU, on a folder of pictures with metadata.jsonl:

    python -m flaxkd.train --config configs/bk_tiny.py --config.data.source=DIR
"""

from configs import default, recipes


def get_config(arg=None):
    recipes.check(arg, __file__)
    config = default.get_config()
    config.student = "bk_tiny"
    return recipes.bksdm(config)
