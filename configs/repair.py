"""The teacher's LoRA on a distilled student, which learns the rest without a picture of the concept.

    python -m flaxkd.train --config configs/repair.py --config.lora.init=FILE --config.init=runs/small

The student must have been distilled from the model that the file is for; `--config.student` and `--config.teacher` are
that run's. The teacher with the LoRA merged teaches, the student's own weights stay. docs/lora.md has results.
"""

from configs import default, recipes


def get_config(arg=None):
    recipes.check(arg, __file__)
    config = default.get_config()
    config.task = "distill"
    config.student = "sd_small"
    config.init = "runs/small"
    return recipes.embedded_repair(config)
