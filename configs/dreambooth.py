"""DreamBooth with prior preservation (Ruiz et al. 2023, arXiv:2208.12242): a few pictures of one subject.

    python -m flaxkd.train --config configs/dreambooth.py                                   a green cat, on a laptop
    python -m flaxkd.train --config configs/dreambooth.py:lora                              ... as a LoRA
    python -m flaxkd.train --config configs/dreambooth.py:bksdm --config.data.source=DIR    BK-SDM's settings
    python -m flaxkd.train --config configs/dreambooth.py:bksdm_lora --config.data.source=DIR    ... as a LoRA

Your own subject: data.source, data.caption ("a sks dog") and prior.prompt ("a dog"; None: no prior preservation).
`--config.teacher` is any pipeline, student or finished run. docs/finetuning.md has results.
"""

from configs import default, recipes


def get_config(arg=None):
    made = {"lora": recipes.embedded_dreambooth_lora}
    made |= {"bksdm": recipes.bksdm_dreambooth, "bksdm_lora": recipes.bksdm_lora}
    recipes.check(arg, __file__, *made)
    config = default.get_config()
    config.task = "finetune"
    config.student = None
    return made.get(arg, recipes.embedded_dreambooth)(config)
