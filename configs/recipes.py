"""Recipes shared by several configs. A recipe changes a configuration and returns it."""

from pathlib import Path

from ml_collections import ConfigDict


def check(arg: str | None, file: str, *known: str) -> None:
    """Raises ValueError if a configuration does not know its argument, as in configs/small.py:sd15."""
    if arg and arg not in known:
        instead = " or ".join(["leave it out", *known])
        raise ValueError(f"configs/{Path(file).name}:{arg} is unknown: {instead}")


def cosine(config: ConfigDict, *, peak_value: float, warmup_steps: int, end_value: float) -> dict:
    """A cosine after a linear warm-up. It ends with the run, however many `steps` that has, unless given otherwise."""
    return dict(
        schedule="warmup_cosine_decay_schedule",
        init_value=0.0,
        peak_value=peak_value,
        warmup_steps=warmup_steps,
        decay_steps=config.get_ref("steps").identity(),
        end_value=end_value,
    )


def embedded(config: ConfigDict) -> ConfigDict:
    """A student of the embedded miniature teacher, in minutes on two CPU cores."""
    config.steps = 300
    config.batch_size = 16
    config.learning_rate = cosine(config, peak_value=1e-3, warmup_steps=20, end_value=1e-5)
    config.sample.every = 100
    config.validation.every = 50
    config.checkpoint.every = 100
    return config


def embedded_xl(config: ConfigDict) -> ConfigDict:
    """A student of the embedded miniature of Stable Diffusion XL, in minutes on two CPU cores."""
    config.teacher = "miniature_xl"
    return embedded(config)


def embedded_lcm(config: ConfigDict) -> ConfigDict:
    """Few steps for the embedded miniature, in minutes on two CPU cores, with its teacher's guidance of 4."""
    embedded(config)
    config.steps = 600
    config.learning_rate = cosine(config, peak_value=5e-4, warmup_steps=20, end_value=1e-5)
    config.few_step.guidance = (4.0, 4.0)
    config.few_step.ode_steps = 25  # so few steps of training reach from the data to the noise
    config.ema_decay = 0.95
    config.sample.every = config.validation.every = config.checkpoint.every = 200
    return config


def embedded_lcm_lora(config: ConfigDict) -> ConfigDict:
    """The same as a LoRA, with the targets of LCM-LoRA and a quarter of its rank, for a model of small layers."""
    embedded_lcm(config)
    config.steps = 300
    config.learning_rate.peak_value = 2e-3
    config.ema_decay = None
    config.lora.rank = 16
    config.lora.targets = ("lcm",)
    return config


def embedded_phased(config: ConfigDict) -> ConfigDict:
    """Four steps without noise between them for the embedded miniature, in minutes on two CPU cores."""
    embedded_lcm(config)
    config.steps = 1000
    config.few_step.ode_steps = 16  # 4 of the teacher for one of the model
    config.few_step.huber = None
    config.ema_decay = 0.99
    return config


def embedded_finetune(config: ConfigDict) -> ConfigDict:
    """Further training of the embedded miniature, or of a student of it, in minutes on two CPU cores."""
    embedded(config)
    config.learning_rate = cosine(config, peak_value=2e-4, warmup_steps=20, end_value=1e-5)
    return config


def embedded_compose(config: ConfigDict) -> ConfigDict:
    """Two things in one picture, for the embedded miniature or a student of it, in minutes on two CPU cores."""
    embedded(config)
    config.train = ("unet", "text_encoder")
    config.steps = 400
    config.data.collages = 2.0
    config.data.collage_captions = (
        r"(red|orange|yellow|green|blue|purple|brown|pink) \w+|star|(cat|grinning) face"  # of 58 captions
    )
    # As configs/teacher.py: what is where is decided where noise prevails, and guidance needs pictures of no caption.
    config.snr_gamma = 0.1
    config.timestep_sampling = "min_snr"
    config.caption_dropout = 0.1
    config.sample.prompts = ("red apple", "blue heart", "red heart and grinning face", "green circle and pink heart")
    config.sample.every = config.validation.every = config.checkpoint.every = 200
    return config


def embedded_quantized(config: ConfigDict) -> ConfigDict:
    """The distilled student of configs/small.py, rounded, in minutes on two CPU cores."""
    embedded(config)
    config.init = "runs/small"
    config.steps = 100
    config.learning_rate = cosine(config, peak_value=3e-4, warmup_steps=10, end_value=1e-6)
    config.sample.every = config.validation.every = config.checkpoint.every = 50
    return config


def green_cat(config: ConfigDict) -> ConfigDict:
    """The five pictures of a green cat that come with the package, for the embedded miniature or a student of it."""
    config.data.source = "subject"
    config.data.caption = "sks cat face"
    config.train = ("unet", "text_encoder")
    config.steps = 200
    config.validation.every = 50
    config.sample.every = 50
    config.sample.prompts = ("sks cat face", "cat face", "dog face", "red apple", "blue heart", "grinning face")
    config.checkpoint.every = 100
    return config


def embedded_dreambooth(config: ConfigDict) -> ConfigDict:
    """The green cat and the miniature's own cats, in minutes on two CPU cores."""
    green_cat(config)
    config.prior.prompt = "cat face"
    config.prior.pictures = 40
    config.batch_size = 8  # 4 of the subject, 4 of the class
    config.learning_rate = dict(schedule="constant_schedule", value=1e-4)
    return config


def embedded_dreambooth_lora(config: ConfigDict) -> ConfigDict:
    """The same as a LoRA, at ten times the learning rate."""
    embedded_dreambooth(config)
    config.lora.rank = 4
    config.optimizer.weight_decay = 0.0
    config.learning_rate.value = 1e-3
    return config


def embedded_lora(config: ConfigDict) -> ConfigDict:
    """The green cat as a LoRA, in minutes on two CPU cores."""
    green_cat(config)
    config.lora.rank = 4
    config.batch_size = 4
    config.optimizer.weight_decay = 0.0
    config.learning_rate = dict(schedule="constant_schedule", value=2e-3)
    return config


def embedded_repair(config: ConfigDict) -> ConfigDict:
    """A LoRA of the embedded miniature, for a student of it, by its output alone: see docs/lora.md."""
    embedded(config)
    config.steps = 600
    config.batch_size = 8
    config.weight.noise = config.weight.feature = 0.0
    config.learning_rate = cosine(config, peak_value=3e-3, warmup_steps=20, end_value=1e-5)
    config.optimizer.weight_decay = 0.0
    return config


def segmind_lora(config: ConfigDict) -> ConfigDict:
    """Segmind's LoRA on its students: rank 4, alpha 32, queries and values of both networks, batches of 1 at 1e-4."""
    photographs(config)
    config.teacher = "segmind/small-sd"
    config.train = ("unet", "text_encoder")
    config.lora.rank = 4
    config.lora.alpha = 32.0
    config.lora.targets = ("to_q", "to_v")
    config.lora.text_encoder.targets = ("q_proj", "v_proj")
    config.batch_size = 1
    config.learning_rate = dict(schedule="constant_schedule", value=1e-4)
    return config


def lcm(config: ConfigDict) -> ConfigDict:
    """diffusers' train_lcm_distill_sd_wds.py as its README runs it: 1,000 steps of 12 images at 1e-6.

    LCM's own SD 1.5 took 4,000 steps at 768 px, 32 hours of an A100."""
    config.teacher = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    config.steps = 1000
    config.batch_size = 12
    config.learning_rate = dict(schedule="warmup_constant_schedule", init_value=0.0, peak_value=1e-6, warmup_steps=500)
    config.few_step.target = "average"
    config.few_step.embedded = True
    config.ema_decay = 0.95
    return photographs(config)


def lcm_lora(config: ConfigDict) -> ConfigDict:
    """diffusers' train_lcm_distill_lora_sd_wds.py as its README runs it: rank 64 (LCM-LoRA, arXiv:2311.05556), 1e-4."""
    lcm(config)
    config.learning_rate.peak_value = 1e-4
    config.few_step.target = "online"
    config.few_step.embedded = False
    config.ema_decay = None
    config.lora.rank = 64
    config.lora.targets = ("lcm",)
    return config


def quantized(config: ConfigDict) -> ConfigDict:
    """Segmind's recipe for a twentieth of its steps. Nobody has published one: it has not been run at full size."""
    segmind(config, steps=5_000)
    config.init = "segmind/small-sd"
    return config


def segmind(config: ConfigDict, steps: int) -> ConfigDict:
    """Segmind's distill-sd with Stable Diffusion 1.5: Realistic Vision 4.0 as the teacher, 512 px, weights 1/0.5/0.5.

    The learning rate was published twice: 1e-5 with a cosine in the README, 1e-4 constant on the model cards. This
    is the README's; the cards' is `--config.learning_rate.peak_value=1e-4 --config.learning_rate.end_value=1e-4`.
    """
    config.teacher = "SG161222/Realistic_Vision_V4.0"
    config.steps = steps
    config.batch_size = 128  # 32 x 4 accumulation steps on the card
    config.learning_rate = cosine(config, peak_value=1e-5, warmup_steps=500, end_value=0.0)
    config.weight.output = 0.5
    config.weight.feature = 0.5
    config.normalize_features = False
    return photographs(config)


def bksdm(config: ConfigDict) -> ConfigDict:
    """BK-SDM (Kim et al. 2023, arXiv:2305.15798): Stable Diffusion 1.4, 512 px, weights 1/1/1, 50K steps of 256."""
    config.teacher = "CompVis/stable-diffusion-v1-4"
    config.pairing = "bksdm"
    config.normalize_features = False
    config.steps = 50_000
    config.batch_size = 256  # 64 x 4 accumulation steps
    config.learning_rate = dict(schedule="constant_schedule", value=5e-5)
    config.ema_decay = 0.9999
    config.data.random_flip = True
    return photographs(config)


def segmind_sdxl(config: ConfigDict) -> ConfigDict:
    """Segmind's SSD-1B, by its card and distill_sdxl.py (segmind/SSD-1B@3bf633b): weights 1/0.5/0.5, 251K steps of 128.

    The learning rate is the card's; the script's default is 1e-4. SDXL 1.0 was the first of three teachers there, then
    came its fine-tunes ZavyChromaXL and JuggernautXL: `--config.teacher=OWNER/NAME`. Both students draw at guidance 9.
    """
    config.steps = 251_000
    config.learning_rate = dict(schedule="warmup_constant_schedule", init_value=0.0, peak_value=1e-5, warmup_steps=500)
    config.weight.output = 0.5
    config.weight.feature = 0.5
    config.normalize_features = False
    config.sample.guidance = 9.0
    return sdxl(config)


def koala(config: ConfigDict) -> ConfigDict:
    """KOALA (Lee et al. 2023, arXiv:2312.04005): self-attention is compared. 500K steps of 128, as KOALA-Lightning's.

    Neither code nor weights of the loss are published. The three are BK-SDM's 1/1/1. Each of the 30 or 21 terms is
    divided by the teacher's mean square: as they are, so many would drown the other two losses.
    """
    config.steps = 500_000
    config.learning_rate = dict(schedule="constant_schedule", value=1e-5)
    config.sample.guidance = 7.5
    return sdxl(config)


def sdxl(config: ConfigDict) -> ConfigDict:
    """Stable Diffusion XL 1.0 as the teacher, in squares of 1024 px."""
    photographs(config)
    config.teacher = "stabilityai/stable-diffusion-xl-base-1.0"
    config.batch_size = 128  # 32 x 4 accumulation steps of Segmind; 8 x 4 on 4 devices of KOALA-Lightning
    config.data.resolution = 1024
    return config


def portrait(config: ConfigDict) -> ConfigDict:
    """Segmind's portraits: SD-Tiny on 7K pictures drawn by Realistic Vision 4.0, 768 px, 131,000 steps of 128 at 1e-4.

    By the card of segmind/portrait-finetuned; the pictures were not published."""
    photographs(config)
    config.teacher = "segmind/tiny-sd"
    config.steps = 131_000
    config.batch_size = 128  # 32 x 4 accumulation steps
    config.learning_rate = dict(schedule="constant_schedule", value=1e-4)
    config.data.resolution = 768
    return config


def bksdm_dreambooth(config: ConfigDict) -> ConfigDict:
    """BK-SDM's DreamBooth (scripts/finetune_full.sh): BK-SDM-Base, 800 steps of one picture and one of its class.

    Its rate is 1e-6 and its prompts are those of a dog, as in google/dreambooth's dog: give your own."""
    photographs(config)
    config.teacher = "nota-ai/bk-sdm-base"
    config.train = ("unet", "text_encoder")
    config.data.caption = "a sks11df dog"
    config.prior.prompt = "a dog"
    config.steps = 800
    config.batch_size = 2  # one of either
    config.learning_rate = dict(schedule="constant_schedule", value=1e-6)
    config.remat = True
    config.seed = 1234
    config.log_every = 10
    config.validation.every = 100
    config.validation.examples = 16
    config.sample.every = 100
    config.sample.prompts = ("a sks11df dog in the jungle", "a dog in the jungle")
    config.checkpoint.every = 200
    return config


def bksdm_lora(config: ConfigDict) -> ConfigDict:
    """BK-SDM's DreamBooth as a LoRA (scripts/finetune_lora.sh): 1e-4, rank 16, alpha 27 and of the text encoder 17."""
    bksdm_dreambooth(config)
    config.learning_rate.value = 1e-4
    config.lora.rank = 16
    config.lora.alpha = 27.0
    config.lora.text_encoder.alpha = 17.0
    return config


def photographs(config: ConfigDict) -> ConfigDict:
    """The settings shared by runs of real size."""
    config.data.source = "data"  # your own folder of images with metadata.jsonl: --config.data.source=DIR
    config.data.resolution = 512
    config.log_every = 50
    config.validation.every = 1000
    config.checkpoint.every = 1000
    config.sample.every = 5000
    config.sample.prompts = (
        "a golden vase with different flowers",
        "a photograph of a red bicycle leaning on a wall",
        "portrait of an old man with a grey beard",
        "a small house by a lake, mountains behind it",
    )
    return config
