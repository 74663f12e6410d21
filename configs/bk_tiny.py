"""BK-SDM-Tiny by its own recipe, for TPU or GPU

python -m flaxkd.train --config configs/bk_tiny.py --config.data.source=DIR
"""

from configs import default, recipes


def get_config(arg=None):
    config = default.get_config()
    config.student = "bk_tiny"
    return recipes.bksdm(config)
