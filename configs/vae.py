"""The autoencoder of the embedded teacher, trained from scratch on OpenMoji: the start of the miniature pipeline.

    python -m flaxkd.train --config configs/vae.py

About half an hour on two CPU cores. `configs/teacher.py` then trains the rest of the resulting folder.
"""

from configs import default, recipes

ARCHITECTURE = dict(
    unet=dict(
        sample_size=16,  # latents
        in_channels=4,
        out_channels=4,
        block_out_channels=[32, 64, 128, 128],
        layers_per_block=2,
        norm_num_groups=8,  # 32 would mean one channel each at the outer width, and erase the mean: the color
        down_block_types=["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        cross_attention_dim=128,
        attention_head_dim=[2, 4, 4, 4],  # heads
    ),
    vae=dict(
        sample_size=64,  # pixels
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=[16, 32, 64],
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        scaling_factor=1.0,  # measured at the end of training
    ),
    text_encoder=dict(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=32,  # tokens
        hidden_act="quick_gelu",
        projection_dim=128,
    ),
    scheduler=dict(
        _class_name="DPMSolverMultistepScheduler",
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        skip_prk_steps=True,
        set_alpha_to_one=False,
        steps_offset=1,
        clip_sample=False,
        prediction_type="epsilon",
    ),
    vocab_size=2048,
)


def get_config(arg=None):
    recipes.check(arg, __file__)
    config = default.get_config()
    config.blank = ARCHITECTURE
    config.student = None
    config.train = ("vae",)
    config.steps = 3600
    config.batch_size = 8
    config.learning_rate = recipes.cosine(config, peak_value=1.2e-3, warmup_steps=100, end_value=1e-5)
    config.optimizer = dict(name="adamw", b1=0.9, b2=0.99, weight_decay=1e-4)
    config.checkpoint.every = 600
    config.validation.every = 600
    config.sample.every = 600
    return config
