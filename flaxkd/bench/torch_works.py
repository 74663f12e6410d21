"""The work of works.py in PyTorch, for `flaxkd.bench --against torch`: what users of diffusers run today.

The training step follows Segmind's distill-sd: forward hooks on whole blocks, a sum of mean squared errors,
`clip_grad_norm_` and AdamW; under autocast if the compute is not float32. On a GPU, PyTorch has what its users advise
for speed (`_at_its_best`, and a fused AdamW). No other file of flaxkd imports diffusers. evaluate/ imports torch for
its scores. Both packages are in the extra `test`.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from flaxkd import students
from flaxkd.bench.works import FEW, Prepared, Subject
from flaxkd.diffusion import samplers
from flaxkd.evaluate.scores import device
from flaxkd.pretrained import keys, save
from flaxkd.pretrained.folder import SHARED

EAGER, COMPILED = "torch eager", "torch.compile"


class Networks(NamedTuple):
    """Torch modules with the weights of a subject. teacher: None if the subject is the teacher."""

    unet: object
    teacher: object | None
    pipeline: object  # of diffusers, with `unet`


def check(config) -> None:
    """Raises ValueError for settings that distill-sd lacks, or if PyTorch would compute on another kind of device than
    JAX, and ModuleNotFoundError without torch or diffusers."""
    try:
        import diffusers  # noqa: F401
        import torch
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f'{error.name} is not installed: pip install -e ".[test]"') from error
    wrong = {
        "ema_decay": bool(config.ema_decay),
        "accumulate": config.accumulate != 1,
        "remat": bool(config.remat),
        "normalize_features": config.normalize_features == "token",
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
    ours, theirs = jax.default_backend(), {"cuda": "gpu"}.get(device(), device())
    if ours != theirs:
        raise ValueError(
            f"JAX would compute on a {ours}, and PyTorch {torch.__version__} on a {theirs}: install a PyTorch for this "
            "machine's accelerator and driver, or time without --against"
        )


def machine() -> str:
    """The device of PyTorch, and the versions that its speed depends on."""
    import torch

    if device() == "cpu":
        return f"CPU, {torch.get_num_threads()} threads"
    cudnn = torch.backends.cudnn.version()
    return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, cuDNN {cudnn}"


def prepare(subject: Subject, work: str, by: str) -> Prepared:
    """One of `works.WORKS` by EAGER or COMPILED, run once. Torch does not report FLOPs or its whole memory."""
    begin = time.perf_counter()
    make = {"denoise": _denoise, "image": _image, "few_steps": _few_steps, "train": _train}[work]
    call = make(subject, _networks(subject), by == COMPILED)
    call()
    return Prepared(call, time.perf_counter() - begin)


def _at_its_best(*modules) -> None:
    """What users of PyTorch advise for speed on a GPU, besides a fused AdamW."""
    import torch

    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # XLA's float32 there is TF32, too
    for module in modules:
        module.to(memory_format=torch.channels_last)


def _networks(subject: Subject) -> Networks:
    import diffusers
    from diffusers.utils import logging
    from transformers.utils import logging as of_transformers

    logging.disable_progress_bar()  # of loading; the benchmark has its own
    of_transformers.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        path = subject.folder.path
        if subject.folder.readers or SHARED in subject.folder.index:  # parts of it are elsewhere
            path = save(Path(scratch) / "pipeline", source=subject.folder, parts={})
        kind = getattr(diffusers, subject.folder.family.pipeline)
        pipeline = kind.from_pretrained(path, low_cpu_mem_usage=False).to(device())
    pipeline.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    for part in subject.folder.parts:
        getattr(pipeline, part).requires_grad_(False).eval()
    unet = _unet(subject.unet_config, subject.unet)
    teacher = None
    if subject.config.student:
        teacher_config = subject.folder.config("unet")
        teacher = _unet(teacher_config, subject.task.frozen["teacher"]).requires_grad_(False)
    pipeline.register_modules(unet=unet)
    if device() == "cuda":
        _at_its_best(*filter(None, (unet, teacher, pipeline.vae)))
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
    noisy_latents, timesteps, states, *added = _tensors(subject, *subject.inputs)
    noisy_latents, states, *added = (x.to(dtype) for x in (noisy_latents, states, *added))
    condition = _condition(states, *added)

    @torch.no_grad()
    def call():
        noise_pred = unet(noisy_latents, timesteps, **condition).sample
        _wait()
        return noise_pred

    return call


def _image(subject: Subject, networks: Networks, compiled: bool) -> Callable:
    return _draw(subject, networks, compiled, num_inference_steps=subject.steps, guidance_scale=subject.folder.guidance)


def _few_steps(subject: Subject, networks: Networks, compiled: bool) -> Callable:
    import diffusers

    row, pipeline = samplers.SAMPLERS[FEW], networks.pipeline
    pipeline.scheduler = getattr(diffusers, row.scheduler).from_config(pipeline.scheduler.config)
    return _draw(subject, networks, compiled, num_inference_steps=row.steps, guidance_scale=1.0)


def _draw(subject: Subject, networks: Networks, compiled: bool, **options) -> Callable:
    import torch

    dtype, pipeline = _torch_dtype(subject), networks.pipeline
    pipeline = pipeline if dtype == torch.float32 else pipeline.to(dtype)
    if compiled:  # the parts that take the time, as in diffusers' documentation
        pipeline.unet = torch.compile(pipeline.unet)
        pipeline.vae.decode = torch.compile(pipeline.vae.decode)
    return lambda: pipeline(subject.prompts, **options).images


def _condition(states, text_embeds=None, time_ids=None) -> dict:
    """The keyword arguments of a UNet of diffusers: what SDXL adds to the states goes in as a dict."""
    added = {} if text_embeds is None else {"added_cond_kwargs": {"text_embeds": text_embeds, "time_ids": time_ids}}
    return {"encoder_hidden_states": states} | added


def _text_states(pipeline, input_ids):
    return (pipeline.text_encoder(input_ids)[0],)


def _two_text_states(pipeline, input_ids, input_ids_2, time_ids):
    """As in diffusers' `encode_prompt`: the states before the last layer of both, and the second one's projection."""
    import torch

    first = pipeline.text_encoder(input_ids, output_hidden_states=True)
    second = pipeline.text_encoder_2(input_ids_2, output_hidden_states=True)
    states = [output.hidden_states[-2] for output in (first, second)]
    return torch.cat(states, dim=-1), second[0], time_ids


# {pipeline: (pipeline, token ids and sizes of a batch: tensors) -> the arguments of `_condition`}
ENCODERS = {"StableDiffusionPipeline": _text_states, "StableDiffusionXLPipeline": _two_text_states}


def loss(subject: Subject, networks: Networks, compiled: bool = False) -> Callable:
    """(noisy_latents, timesteps, target, conditions) -> {"loss", "loss_noise", ...}, as `losses.kd_loss`.

    All are tensors; conditions: {field: tensor} of a batch, as `Family.condition` reads them."""
    import torch
    from torch.nn import functional

    weight, encode = subject.config.weight, ENCODERS[subject.folder.family.pipeline]
    pairs, seen = (), {"student": {}, "teacher": {}}
    if networks.teacher is not None:
        row, pairing = students.get(subject.config.student), subject.config.pairing
        pairs = students.feature_pairs(row, pairing, subject.folder.config("unet"))

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

    def losses(noisy_latents, timesteps, target, conditions) -> dict:
        with torch.no_grad():
            condition = _condition(*encode(networks.pipeline, **conditions))
        noise_pred = unet(noisy_latents, timesteps, **condition).sample
        found = {"loss_noise": mse(noise_pred, target)}
        if teacher is None:
            return {"loss": found["loss_noise"], **found}
        with torch.no_grad():
            wanted = teacher(noisy_latents, timesteps, **condition).sample
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
    betas, fused = (o.b1, o.b2), device() == "cuda"
    optimizer = torch.optim.AdamW(
        parameters, lr=1e-5, betas=betas, eps=o.get("eps", 1e-8), weight_decay=o.weight_decay, fused=fused
    )
    conditions = dict(zip(subject.batch, _tensors(subject, *subject.batch.values()), strict=True))
    mean, log_variance = conditions.pop("moments").chunk(2, dim=1)
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
            total = losses(noisy_latents, timesteps, target, conditions)["loss"]
        total.backward()
        if config.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        _wait()
        return float(total.detach())

    return call
