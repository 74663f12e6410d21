"""Two things in one picture: a model is trained further on its pictures and on collages of them, captioned "A and B".

    python -m flaxkd.train --config configs/compose.py --config.teacher=runs/small     a student, on a laptop
    python -m flaxkd.train --config configs/compose.py --config.teacher=DIR --config.data.source=DIR

docs/composing.md has what it gains. There is no teacher: that of a student draws one thing, too.
"""

from configs import default, recipes


def get_config(arg=None):
    recipes.check(arg, __file__)
    config = default.get_config()
    config.task = "finetune"
    config.student = None
    return recipes.embedded_compose(config)
