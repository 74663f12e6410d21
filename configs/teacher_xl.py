"""The embedded teacher of Stable Diffusion XL's kind: UNet and second text encoder, trained from scratch on OpenMoji.

    python -m flaxkd.train --config configs/teacher_xl.py

It has SDXL's stages and depths, so that the students of SDXL can be cut from it as they are. Autoencoder, tokenizer and
first text encoder are those of the other embedded teacher, which `config.blank` takes from there. That teacher was
trained on afterwards, text encoder too: the folder has the text encoder of its time.

The weights in the package are 4,000 steps of it, about 100 minutes of two CPU cores that did other work beside it. The
folder `flaxkd/assets/teacher_xl` is the export in float16, without the parts that its model_index.json names under
`_shared`.
"""

from configs import recipes, teacher

ARCHITECTURE = dict(
    unet=dict(
        sample_size=16,  # latents
        in_channels=4,
        out_channels=4,
        block_out_channels=[
            32,
            64,
            56,
        ],  # narrow inside, where 60 of the 70 blocks are: the package is small
        layers_per_block=2,
        norm_num_groups=8,
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        transformer_layers_per_block=[1, 2, 10],
        use_linear_projection=True,
        cross_attention_dim=128 + 64,
        attention_head_dim=[2, 4, 4],  # heads
        addition_embed_type="text_time",
        addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=6 * 16 + 64,
    ),
    vae="teacher",
    text_encoder="teacher",
    text_encoder_2=dict(
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=32,  # tokens
        hidden_act="gelu",
        projection_dim=64,
    ),
    scheduler=dict(
        _class_name="EulerDiscreteScheduler",
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        steps_offset=1,
        timestep_spacing="leading",
        prediction_type="epsilon",
    ),
    vocab_size="teacher",
)


def get_config(arg=None):
    recipes.check(arg, __file__)
    config = teacher.get_config()
    config.teacher = None
    config.blank = ARCHITECTURE
    config.train = ("unet", "text_encoder_2")
    return config
