"""A LoRA (Hu et al. 2021, arXiv:2106.09685): small adapters beside a model, or a student, that stays as it is.

    python -m flaxkd.train --config configs/lora.py                                        a subject, on a laptop
    python -m flaxkd.train --config configs/lora.py --config.teacher=runs/small            on a distilled student
    python -m flaxkd.train --config configs/lora.py:segmind --config.data.source=DIR       Segmind's settings

Any task may train adapters: `--config.lora.rank=16`. docs/lora.md has results, and how a student learns the LoRA of its
teacher: configs/repair.py.
"""

from configs import default, recipes


def get_config(arg=None):
    recipes.check(arg, __file__, "segmind")
    config = default.get_config()
    config.task = "finetune"
    config.student = None
    return recipes.segmind_lora(config) if arg else recipes.embedded_lora(config)
