"""BK-SDM-Small: 482,346,884 parameters at SD 1.4. Segmind's SD-Small is another network (`configs/small.py`).

BK-SDM's own recipe, for TPU or GPU, on a folder of pictures with metadata.jsonl:

    python -m flaxkd.train --config configs/bk_small.py --config.data.source=DIR
"""

from configs import default, recipes


def get_config(arg=None):
    recipes.check(arg, __file__)
    config = default.get_config()
    config.student = "bk_small"
    return recipes.bksdm(config)
