"""The embedded teacher: UNet and text encoder, trained from scratch on OpenMoji, after `configs/vae.py`.

    python -m flaxkd.train --config configs/vae.py && python -m flaxkd.train --config configs/teacher.py

About an hour on two CPU cores, resumable. The weights in the package come from four runs, described in their model
card, and not from this one run from scratch. The last was this recipe with
`--config.teacher=flaxkd/assets/teacher --config.steps=12500 --config.learning_rate.peak_value=8e-4`. In 96 minutes, it
raised the share of 128 pictures with their own original among the 5 nearest of 512 from 66 to 99 %.
"""

from configs import default, recipes


def get_config(arg=None):
    recipes.check(arg, __file__)
    config = default.get_config()
    config.teacher = "runs/vae/diffusers"
    config.student = None
    config.train = ("unet", "text_encoder")
    config.steps = 8000
    config.batch_size = 16
    # 1,886 of the 4,263 training captions are skin tones of another: an epoch would repeat as many pictures.
    config.data.variants = r"[:,]? (?:medium-)?(?:light|medium|dark) skin tone"
    config.learning_rate = recipes.cosine(config, peak_value=1e-3, warmup_steps=200, end_value=1e-5)
    config.optimizer = dict(name="adamw", b1=0.9, b2=0.99, eps=1e-8, weight_decay=1e-2)
    # Layout and color are decided where noise prevails. The rest is easy at this size, and is sampled less often.
    config.snr_gamma = 0.1
    config.timestep_sampling = "min_snr"
    config.caption_dropout = 0.1
    config.ema_decay = 0.999
    config.log_every = 50
    config.validation.every = 1000
    config.sample.every = 1000
    config.sample.guidance = 4.0
    config.checkpoint.every = 500
    return config
