"""Every key of a configuration, with its unit and the source of its value. Other configs change a few.

`--config.key=value` overrides a key on the command line; an unknown key fails with a suggestion. `placeholder(type)` is
None until it gets a value; `--config.key=None` gives None back. flaxkd/training/settings.py says what each may be.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import recipes


def get_config(arg: str | None = None) -> ConfigDict:
    recipes.check(arg, __file__)
    config = ConfigDict()

    # What is trained.
    # pipeline folder, single-file checkpoint, hub id owner/name, or finished run; "miniature_xl": the embedded one of
    # SDXL; None: the embedded miniature
    config.teacher = placeholder(str)
    config.vae = placeholder(str)  # another autoencoder than the teacher's own: folder, file or hub id
    # layers left out at the end of its text encoder, in training and in the exported pipeline; diffusers' clip_skip:
    # 1 is the last layer, what other programs call clip skip 2
    config.clip_skip = 0
    config.student = "sd_small"  # a row of `python -m flaxkd.students`, or FILE.json; None: the teacher itself
    # or a share of the teacher's parameters, 0.65: a published student of that size, else one whose layers the teacher
    # chooses at the start; with student = None alone
    config.keep = placeholder(float)
    # a row of flaxkd/tasks/__init__.py, or your own "module:function"; None: the row for the parts below
    config.task = placeholder(str)
    config.train = ("unet",)  # trained parts: ("unet",), ("unet", "text_encoder") or ("vae",)
    # its weights, cut for a student; "random": the UNet starts from scratch; or a pipeline folder, workdir or hub id
    # with the UNet to begin with, such as a distilled student
    config.init = "teacher"
    # architecture of a new pipeline to train from scratch; what is "teacher" in it comes from `teacher`
    config.blank = None
    config.seed = 0  # of noise, timesteps, data order and everything else

    # The loss: weight.noise * loss_noise + weight.output * loss_output + weight.feature * loss_feature.
    config.weight = ConfigDict()  # BK-SDM 1/1/1, Segmind's README 1/0.5/0.5
    config.weight.noise = 1.0
    config.weight.output = 1.0
    config.weight.feature = 1.0
    # features compared: "segmind" (9 or 6 pairs) or "bksdm" (8 or 6); of SDXL "segmind_sdxl" (26) or "koala" (30 or 21)
    config.pairing = "segmind"
    # divide each pair by the teacher's mean square (LAPTOP-Diff); neither original does; docs/ablation.md says why.
    # The mean is over a batch, or over each part of `accumulate`: loss_feature is larger with small parts.
    # "token": compare positions scaled to unit length (PPCL)
    config.normalize_features = True
    # "epsilon" or "v_prediction"; None: as in the teacher's scheduler
    config.prediction_type = placeholder(str)
    # Min-SNR weighting of loss_noise, 5.0 in its paper; None: off, as in both originals
    config.snr_gamma = placeholder(float)
    # "min_snr" samples timesteps in proportion to those weights, for all terms, in place of weighting loss_noise
    config.timestep_sampling = "uniform"
    # standard deviation of a constant added to the noise per channel (0.1 is usual)
    config.noise_offset = 0.0
    # standard deviation of noise added to what the UNet sees and not to its target (0.1 is advised by its paper)
    config.input_perturbation = 0.0
    # share of captions replaced by "", or zeros for SDXL; 0.1 to train from scratch for guidance
    config.caption_dropout = 0.0
    config.kl_weight = 2e-3  # for train = ("vae",) alone
    # the UNet that is trained computes with rounded numbers, as it will where it runs: "w8" (weights of 8 bits), "w8a8"
    # (activations too), "w4" or "fp8"; None: full precision, as the teacher always has. docs/quantization.md
    config.quantize = placeholder(str)
    # ends of the names of its layers that stay in full precision: few weights, and much of the error
    config.full_precision = ("conv_in", "conv_out", r"time_embedding\.linear_\d", "time_emb_proj")

    # For models of few steps: task = "few_step", a consistency model (LCM), or "phased". The values are those of
    # diffusers' scripts for LCM.
    config.few_step = ConfigDict()
    # Of "phased" alone: the steps that the model learns to draw in, and on how many of the teacher's pictures
    config.few_step.phases = 4
    config.few_step.ways = 2048
    config.few_step.target = "online"  # the network itself, without gradient, or "average": that of ema_decay, 0.95
    config.few_step.ode_steps = 50  # of the teacher's ODE; a consistency model knows no other timesteps
    # of the teacher, sampled between the two for each example; those scripts call it w, which is one less
    config.few_step.guidance = (6.0, 16.0)
    # the guidance is an input of the UNet, chosen at drawing; otherwise it is learnt, and drawn with 1
    config.few_step.embedded = False
    config.few_step.huber = 1e-3  # where the Huber loss turns from squares to distances; None: squares alone

    # LoRA: with a rank, small adapters learn beside the kernels of `train`, which stay. Any task may.
    config.lora = ConfigDict()
    config.lora.rank = placeholder(int)  # 4 is usual for a style or a subject, 64 for few steps; None: no adapters
    config.lora.alpha = placeholder(float)  # an adapter is scaled by alpha / rank; None: by 1, as in diffusers
    # rows of flaxkd/weights/lora.py: "attention", "feed_forward" (kohya's), "convolutions", "all"; or ends of names
    config.lora.targets = ("attention",)
    # a LoRA file to go on from, FILE or FILE:SCALE. For a student it is its teacher's: the teacher wears it, and the
    # student's own, which begins with what fits, learns to do the same
    config.lora.init = placeholder(str)
    config.lora.text_encoder = ConfigDict()  # of the text encoders in `train`; None: as above
    config.lora.text_encoder.rank = placeholder(int)
    config.lora.text_encoder.alpha = placeholder(float)
    config.lora.text_encoder.targets = None

    # Prior preservation (DreamBooth): every other example of a batch is a picture of the subject's class, so that the
    # model keeps it. loss = loss_instance + prior.weight * loss_prior
    config.prior = ConfigDict()
    config.prior.prompt = placeholder(str)  # that of the class, "a dog"; None: without
    config.prior.weight = 1.0
    # drawn by the model itself before training, with its own sampler and guidance; 0: `folder` has pictures of yours
    config.prior.pictures = 200
    config.prior.folder = placeholder(str)  # where they are kept, for further runs; None: WORKDIR/class

    # The optimizer: names and arguments are those of optax.
    config.steps = 1000  # optimizer steps; a run in the same workdir may get more of them later
    config.batch_size = 32  # images per optimizer step, over all devices and accumulation steps
    config.accumulate = 1  # splits a batch into this many pieces, one after another, to save memory
    # AdamW of both originals, and BK-SDM's learning rate. Another function of optax takes other arguments: give its
    # group whole, --config.learning_rate="{'schedule': 'linear_schedule', 'init_value': 1e-4, ...}"
    config.optimizer = ConfigDict(dict(name="adamw", b1=0.9, b2=0.999, eps=1e-8, weight_decay=1e-2))
    config.learning_rate = ConfigDict(dict(schedule="constant_schedule", value=5e-5))
    config.text_encoder_rate = 1.0  # their learning rate, in shares of the UNet's
    config.max_grad_norm = 1.0  # global norm, as in both originals; None: no clipping
    # A step is skipped and counted if its loss or gradient is not finite, or if its loss is `spike` times the usual one
    # (None: no limit). After `in_a_row` skipped steps in a row the run stops. Both may change when it resumes.
    config.bad_steps = ConfigDict(dict(spike=20.0, in_a_row=10))
    # moving average of the weights, e.g. 0.9999; BK-SDM found no difference
    config.ema_decay = placeholder(float)

    # The machine.
    config.dtype = placeholder(str)  # of the compute, "bfloat16" (on accelerators) or "float32" (on a CPU)
    # recompute in the backward pass: less memory, a third more compute for what is trained. True or "blocks": down, mid
    # and up blocks, each as a whole; "transformer_blocks": these and resnets one by one, for SDXL's deep blocks
    config.remat = False
    # of long self-attention: "plain", "blocked", "splash" (TPU) or "cudnn" (GPU); None: chosen for the device
    config.attention = placeholder(str)
    config.mesh = ConfigDict(dict(data=-1, fsdp=1))  # devices; -1: all the others
    # A CPU counts as this many devices, to rehearse a mesh: 2 on 2 cores train slower (docs/log.md). XLA's collectives
    # may then wait for each other forever (once in 2,500 steps; with NPROC=8 in the environment not in 4,500).
    config.cpu_devices = 1
    config.compilation_cache = "~/.cache/flaxkd/jax"  # of compiled programs: a restart begins at once

    # The data.
    config.data = ConfigDict()
    # or a folder or zip of pictures with captions in metadata.jsonl (file_name, text) or beside them, or a cache made
    # by `python -m flaxkd.cache`; "subject": five pictures of a green cat, for configs/dreambooth.py
    config.data.source = "openmoji"
    config.data.caption_column = placeholder(str)  # of the metadata; None: text, caption or prompt
    config.data.image_column = placeholder(str)  # of the metadata; None: file_name, file, path, ...
    # of all pictures of a folder: "a sks dog". Then none is held out: validation has the same ones, at fixed noise
    config.data.caption = placeholder(str)
    config.data.background = "white"  # color behind transparent pixels
    config.data.resolution = 64  # pixels; 512 for SD 1.x and 2.1-base, 768 for 2.1, 1024 for SDXL
    # None: squares. Sizes ((height, width), ...) in pixels, or the preset "sdxl": the nine of SDXL, scaled to the
    # resolution. Each picture is cropped to the one of the nearest aspect ratio; a batch has one size, which is a
    # compiled program of its own
    config.data.buckets = None
    # a pattern; an epoch uses one of the captions that differ in its matches alone
    config.data.variants = placeholder(str)
    config.data.random_flip = False  # mirror half of the pictures; wrong for text and flags
    # so many collages as pictures are added, 0.5: half as many. A collage is two pictures in one, "A and B", from which
    # a model learns to draw two things; docs/composing.md
    config.data.collages = 0.0
    # a pattern: they are of pictures whose whole captions match it, "red car|blue bus|...", and every other one
    # that is added is such a picture as it is; None: of all
    config.data.collage_captions = placeholder(str)

    # What is shown and saved, in optimizer steps: every so many and after the last one; 0 for never. These keys may
    # change when a run resumes.
    config.log_every = 10
    # held-out captions, fixed noise and timesteps; no examples, no validation
    config.validation = ConfigDict(dict(every=100, examples=64))
    config.sample = ConfigDict()
    config.sample.every = 500
    config.sample.prompts = (  # (): no pictures
        "red apple",
        "grinning face",
        "blue heart",
        "flag: Peru",
        "woman firefighter",
        "cat face",
    )
    # of `python -m flaxkd.generate --sampler`; None: the teacher's own
    config.sample.sampler = placeholder(str)
    config.sample.steps = placeholder(int)  # of the sampler; None: those usual for it
    # of classifier-free guidance, kept in the export as the student's own; None: the teacher's own, else its pipeline's
    config.sample.guidance = placeholder(float)
    # Keeps the newest `keep` (None: all). With 0 for `every`, the last step and a stopped run are still saved.
    config.checkpoint = ConfigDict(dict(every=500, keep=3))
    config.checkpoint.keep_every = placeholder(int)  # keeps those at multiples of this many steps for good; 0: none
    return config
