"""A model of four steps that draws what its teacher draws from the same noise. docs/few_steps.md has results.

    python -m flaxkd.train --config configs/phased.py                               the miniature, on a laptop
    python -m flaxkd.train --config configs/phased.py --config.init=runs/small      its distilled student

The teacher's own way from noise to picture is cut into phases, and the UNet learns to take each in one step of DDIM.
`init` is the UNet that learns.
"""

from configs import default, recipes


def get_config(arg=None):
    recipes.check(arg, __file__)
    config = default.get_config()
    config.task = "phased"
    config.student = None
    config.optimizer.weight_decay = 0.0
    return recipes.embedded_phased(config)
