"""The work of works.py in PyTorch, for `flaxkd.bench --against torch`: what users of diffusers run today.

The training step follows Segmind's distill-sd: forward hooks on whole blocks, a sum of mean squared errors,
`clip_grad_norm_` and AdamW; under autocast if the compute is not float32. No other file of flaxkd imports diffusers,
and only evaluate/scores.py also imports torch. Both packages are in the extra `test`.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from flaxkd import students
from flaxkd.bench.works import Prepared, Subject
from flaxkd.evaluate.scores import device
from flaxkd.pretrained import keys, save

EAGER, COMPILED = "torch eager", "torch.compile"


class Networks(NamedTuple):
    """Torch modules with the weights of a subject. teacher: None if the subject is the teacher."""

    unet: object
    teacher: object | None
    pipeline: object  # diffusers' StableDiffusionPipeline, with `unet`


def check(config) -> None:
    """Raises ValueError for settings that distill-sd lacks, and ModuleNotFoundError without torch or diffusers."""
    try:
        import diffusers  # noqa: F401
        import torch  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f'{error.name} is not installed: pip install -e ".[test]"') from error
    wrong = {
        "ema_decay": bool(config.ema_decay),
        "accumulate": config.accumulate != 1,
        "remat": config.remat,
        "snr_gamma": config.snr_gamma is not None,
        "noise_offset": bool(config.noise_offset),
        "caption_dropout": bool(config.caption_dropout),
        "task": bool(config.task),
        "train": tuple(config.train) != ("unet",),
        "optimizer.name": config.optimizer.name != "adamw",
    }
    if found := [key for key, bad in wrong.items() if bad]:
        raise ValueError(
            f"the training step in PyTorch does not support the configuration's setting of {', '.join(found)}"
        )


def prepare(subject: Subject, work: str, by: str) -> Prepared:
    """One of `works.WORKS` by EAGER or COMPILED, run once. Torch does not report FLOPs or its whole memory."""
    begin = time.perf_counter()
    make = {"denoise": _denoise, "image": _image, "train": _train}[work]
    call = make(subject, _networks(subject), by == COMPILED)
    call()
    return Prepared(call, time.perf_counter() - begin)


def _networks(subject: Subject) -> Networks:
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
    from diffusers.utils import logging
    from transformers.utils import logging as of_transformers

    logging.disable_progress_bar()  # of loading; the benchmark has its own
    of_transformers.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        path = subject.folder.path
        if subject.folder.readers:  # a single file, or another autoencoder
            path = save(Path(scratch) / "pipeline", source=subject.folder, parts={})
        pipeline = StableDiffusionPipeline.from_pretrained(path, low_cpu_mem_usage=False).to(device())
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    for part in (pipeline.vae, pipeline.text_encoder):
        part.requires_grad_(False).eval()
    unet = _unet(subject.unet_config, subject.unet)
    teacher = None
    if subject.config.student:
        teacher_config = subject.folder.config("unet")
        teacher = _unet(teacher_config, subject.task.frozen["teacher"]).requires_grad_(False)
    pipeline.register_modules(unet=unet)
    return Networks(unet, teacher, pipeline)


def _unet(config: dict, params: dict):
    import torch
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_config(config)
    tensors = {key: torch.from_numpy(np.array(x, np.float32)) for key, x in keys.to_tensors(params).items()}
    unet.load_state_dict(tensors)
    return unet.to(device()).eval()  # no dropout in either; distill-sd leaves its teacher in training mode


def _tensors(subject: Subject, *arrays: np.ndarray) -> list:
    """The arrays as tensors on the device. Those of four axes go from NHWC to NCHW."""
    import torch

    moved = [np.moveaxis(x, -1, 1) if x.ndim == 4 else x for x in arrays]
    return [torch.from_numpy(np.array(x, order="C")).to(device()) for x in moved]


def _torch_dtype(subject: Subject):
    import torch

    return getattr(torch, subject.dtype.name)


def _wait() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _denoise(subject: Subject, networks: Networks, compiled: bool) -> Callable:
    import torch

    dtype = _torch_dtype(subject)
    unet = networks.unet if dtype == torch.float32 else networks.unet.to(dtype)
    unet = torch.compile(unet) if compiled else unet
    noisy_latents, timesteps, states = _tensors(subject, *subject.inputs)
    noisy_latents, states = noisy_latents.to(dtype), states.to(dtype)

    @torch.no_grad()
    def call():
        noise_pred = unet(noisy_latents, timesteps, encoder_hidden_states=states).sample
        _wait()
        return noise_pred

    return call


def _image(subject: Subject, networks: Networks, compiled: bool) -> Callable:
    import torch

    dtype, pipeline = _torch_dtype(subject), networks.pipeline
    pipeline = pipeline if dtype == torch.float32 else pipeline.to(dtype)
    if compiled:  # the parts that take the time, as in diffusers' documentation
        pipeline.unet = torch.compile(pipeline.unet)
        pipeline.vae.decode = torch.compile(pipeline.vae.decode)
    return lambda: (
        pipeline(subject.prompts, num_inference_steps=subject.steps, guidance_scale=subject.folder.guidance).images
    )


def loss(subject: Subject, networks: Networks, compiled: bool = False) -> Callable:
    """(noisy_latents, timesteps, input_ids, target: tensors) -> {"loss", "loss_noise", ...}, as `losses.kd_loss`."""
    import torch
    from torch.nn import functional

    weight = subject.config.weight
    pairs, seen = (), {"student": {}, "teacher": {}}
    if networks.teacher is not None:
        pairs = students.feature_pairs(students.get(subject.config.student), subject.config.pairing)

    def hook(unet, whose: str, names: set[str]):
        def keep(name):
            def save(module, inputs, output):
                seen[whose][name] = output[0] if isinstance(output, tuple) else output

            return save

        for name, module in unet.named_modules():
            if name in names:
                module.register_forward_hook(keep(name))

    hook(networks.unet, "student", {student for student, _ in pairs})
    unet, teacher = networks.unet, networks.teacher
    if teacher is not None:
        hook(teacher, "teacher", {of for _, of in pairs})
    if compiled:
        unet, teacher = torch.compile(unet), teacher and torch.compile(teacher)
    mse = lambda a, b: functional.mse_loss(a.float(), b.float(), reduction="mean")

    def losses(noisy_latents, timesteps, input_ids, target) -> dict:
        with torch.no_grad():
            states = networks.pipeline.text_encoder(input_ids)[0]
        noise_pred = unet(noisy_latents, timesteps, encoder_hidden_states=states).sample
        found = {"loss_noise": mse(noise_pred, target)}
        if teacher is None:
            return {"loss": found["loss_noise"], **found}
        with torch.no_grad():
            wanted = teacher(noisy_latents, timesteps, encoder_hidden_states=states).sample
        found["loss_output"] = mse(noise_pred, wanted)
        terms = ((seen["student"][s], seen["teacher"][t]) for s, t in pairs)
        if subject.config.normalize_features:  # absent in distill-sd
            terms = (mse(a, b) / b.float().square().mean() for a, b in terms)
        else:
            terms = (mse(a, b) for a, b in terms)
        found["loss_feature"] = sum(terms)
        total = (
            weight.noise * found["loss_noise"]
            + weight.output * found["loss_output"]
            + weight.feature * found["loss_feature"]
        )
        return {"loss": total, **found}

    return losses


def _train(subject: Subject, networks: Networks, compiled: bool) -> Callable:
    import torch
    from diffusers import DDPMScheduler

    config, pipeline = subject.config, networks.pipeline
    losses = loss(subject, networks, compiled)
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    kind = config.prediction_type or scheduler.config.prediction_type
    o = config.optimizer
    parameters = list(networks.unet.train().parameters())
    optimizer = torch.optim.AdamW(
        parameters, lr=1e-5, betas=(o.b1, o.b2), eps=o.get("eps", 1e-8), weight_decay=o.weight_decay
    )
    moments, input_ids = _tensors(subject, subject.batch["moments"], subject.batch["input_ids"])
    mean, log_variance = moments.chunk(2, dim=1)
    mixed = torch.autocast(device(), _torch_dtype(subject), enabled=subject.dtype != np.float32)

    def call() -> float:
        deviation = torch.exp(0.5 * log_variance.clamp(-30, 20))
        latents = (mean + deviation * torch.randn_like(mean)) * pipeline.vae.config.scaling_factor
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (len(latents),), device=latents.device)
        noisy_latents = scheduler.add_noise(latents, noise, timesteps)
        epsilon = kind == "epsilon"
        target = noise if epsilon else scheduler.get_velocity(latents, noise, timesteps)
        with mixed:
            total = losses(noisy_latents, timesteps, input_ids, target)["loss"]
        total.backward()
        if config.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        _wait()
        return float(total.detach())

    return call
