"""Every key of a configuration, with its unit and where its value comes from. Other configs change a few.

A key is overridden on the command line with `--config.key=value`; one that is not here fails with a suggestion.
`placeholder(type)` is None until it is given a value.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config(arg: str | None = None) -> ConfigDict:
    config = ConfigDict()

    # What is trained.
    config.teacher = placeholder(str)  # pipeline folder, or hub id owner/name; None: the embedded miniature
    config.student = "sd_small"  # a row of `python -m flaxkd.students`; None: the teacher itself is trained
    config.train = ("unet",)  # parts that learn: ("unet",), ("unet", "text_encoder") or ("vae",)
    config.init = (
        "teacher"  # "teacher": weights as cut from it or as found; "random": the UNet starts from scratch
    )
    config.blank = None  # architecture of a new pipeline to train from scratch, in place of `teacher`
    config.seed = 0  # of noise, timesteps, order of the data and everything else

    # The loss: weight.noise * loss_noise + weight.output * loss_output + weight.feature * loss_feature.
    config.weight = ConfigDict(
        dict(noise=1.0, output=1.0, feature=1.0)
    )  # BK-SDM 1/1/1, Segmind's README 1/0.5/0.5
    config.pairing = "segmind"  # features compared: "segmind" (9 or 6 pairs) or "bksdm" (8 or 6)
    config.normalize_features = False  # divide each pair by the teacher's mean square (LAPTOP-Diff)
    config.prediction_type = placeholder(
        str
    )  # "epsilon" or "v_prediction"; None: as the teacher's scheduler says
    config.snr_gamma = placeholder(
        float
    )  # Min-SNR weighting of loss_noise, 5.0 in its paper; None: as both originals
    config.noise_offset = (
        0.0  # standard deviation of a constant added to the noise per channel (0.1 is usual)
    )
    config.caption_dropout = (
        0.0  # share of captions replaced by ""; 0.1 for training with guidance from scratch
    )
    config.kl_weight = 2e-3  # of ("vae",) alone

    # The optimizer: names and arguments of optax.
    config.steps = 1000  # optimizer steps
    config.batch_size = 32  # images per optimizer step, over all devices and accumulation steps
    config.accumulate = 1  # parts that a batch is split into, one after the other, to save memory
    config.optimizer = ConfigDict(
        dict(name="adamw", b1=0.9, b2=0.999, eps=1e-8, weight_decay=1e-2)
    )  # both originals
    config.learning_rate = ConfigDict(dict(schedule="constant_schedule", value=5e-5))  # BK-SDM
    config.max_grad_norm = 1.0  # global norm, both originals; None: no clipping
    config.ema_decay = placeholder(
        float
    )  # moving average of the weights, e.g. 0.9999; BK-SDM found no difference

    # The machine.
    config.dtype = placeholder(str)  # of the compute; None: "bfloat16" on accelerators, "float32" on CPU
    config.remat = False  # recompute each block in the backward pass: less memory, a third more compute
    config.mesh = ConfigDict(dict(data=-1, fsdp=1))  # devices; -1: all that are left
    config.cpu_devices = (
        1  # a CPU counts as so many devices; 2 on 2 cores trains 1.2 to 1.6 times faster, but XLA's
    )
    # collectives may then wait for each other forever (seen once in an hour; NPROC=6 in the environment helps)
    config.compilation_cache = "~/.cache/flaxkd/jax"  # of compiled programs, so that a restart begins at once

    # The data.
    config.data = ConfigDict(
        dict(
            source="openmoji",  # or a folder of images with metadata.jsonl (file_name, text)
            resolution=64,  # pixels; 512 for SD 1.x and 2.1-base, 768 for 2.1
            variants=placeholder(str),  # a pattern; of captions that differ in it alone, an epoch draws one
            random_flip=False,  # mirror half of the pictures; wrong for text and flags
        )
    )

    # What is shown and saved, in optimizer steps; these may be changed when a run resumes.
    config.log_every = 10
    config.validation = ConfigDict(
        dict(every=100, examples=64)
    )  # held-out captions, fixed noise and timesteps
    config.sample = ConfigDict(
        dict(
            every=500,
            prompts=(
                "red apple",
                "grinning face",
                "flag: Japan",
                "blue heart",
                "dog face",
                "police car light",
            ),
            sampler="dpmsolver++",  # or "ddim", "pndm", "euler"
            steps=25,
            guidance=4.0,  # classifier-free guidance; 7.5 is usual for SD 1.x
        )
    )
    config.checkpoint = ConfigDict(dict(every=500, keep=3))
    return config
