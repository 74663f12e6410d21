"""BK-SDM-Small by its own recipe, for TPU or GPU. Segmind's SD-Small is another: configs/small.py.

python -m flaxkd.train --config configs/bk_small.py --config.data.source=DIR
"""

from configs import default, recipes


def get_config(arg=None):
    config = default.get_config()
    config.student = "bk_small"
    return recipes.bksdm(config)
