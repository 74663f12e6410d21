"""Fine-tuning a whole model, or a student, on pictures with captions: no teacher.

    python -m flaxkd.train --config configs/finetune.py --config.teacher=runs/small             a student, on a laptop
    python -m flaxkd.train --config configs/finetune.py:portrait --config.data.source=DIR       Segmind's portraits
    python -m flaxkd.train --config configs/finetune.py --config.teacher=DIR --config.train="('unet','text_encoder')"

docs/finetuning.md has the flags of diffusers' script.
"""

from configs import default, recipes


def get_config(arg=None):
    recipes.check(arg, __file__, "portrait")
    config = default.get_config()
    config.task = "finetune"
    config.student = None
    return recipes.portrait(config) if arg else recipes.embedded_finetune(config)
