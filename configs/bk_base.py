"""BK-SDM-Base by its own recipe, for TPU or GPU

python -m flaxkd.train --config configs/bk_base.py --config.data.source=DIR
"""

from configs import default, recipes


def get_config(arg=None):
    config = default.get_config()
    config.student = "bk_base"
    return recipes.bksdm(config)
