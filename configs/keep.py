"""A student of the size that you ask for, as a share of its teacher's parameters.

A published one, if its share is within one percentage point; otherwise the teacher chooses at the start what to keep,
which is written to the workdir: see docs/choosing.md.

    python -m flaxkd.train --config configs/keep.py --config.keep=0.65          the embedded teacher, on a laptop
    python -m flaxkd.train --config configs/keep.py:sd15 --config.keep=0.65 --config.data.source=DIR    for TPU or GPU
"""

from configs import default, recipes


def get_config(arg=None):
    recipes.check(arg, __file__, "sd15")
    config = default.get_config()
    config.student = None
    config.keep = 0.5
    return recipes.segmind(config, steps=100_000) if arg else recipes.embedded(config)
