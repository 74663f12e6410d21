"""A model of four steps: a consistency model, LCM (Luo et al. 2023, arXiv:2310.04378). docs/few_steps.md has results.

    python -m flaxkd.train --config configs/lcm.py                                    the miniature, on a laptop
    python -m flaxkd.train --config configs/lcm.py --config.init=runs/small           its distilled student
    python -m flaxkd.train --config configs/lcm.py:lora                               the miniature, as a LoRA
    python -m flaxkd.train --config configs/lcm.py:sd15 --config.data.source=DIR      Stable Diffusion 1.5
    python -m flaxkd.train --config configs/lcm.py:sd15_lora --config.data.source=DIR      ... as a LoRA

The teacher of the ODE is the whole model in all of them; `init` is the UNet that learns.
"""

from configs import default, recipes


def get_config(arg=None):
    made = {"lora": recipes.embedded_lcm_lora, "sd15": recipes.lcm, "sd15_lora": recipes.lcm_lora}
    recipes.check(arg, __file__, *made)
    config = default.get_config()
    config.task = "few_step"
    config.student = None
    config.optimizer.weight_decay = 0.0
    return made.get(arg, recipes.embedded_lcm)(config)
