"""Few steps: a UNet learns to say where the teacher's guided ODE ends, from any point of it (a consistency model).

LCM, Luo et al. 2023, arXiv:2310.04378, algorithm 1; as in diffusers' train_lcm_distill_sd_wds.py. The teacher is the
run's; the UNet that learns is its own, a student cut from it, or that of the folder `config.init`. phased.py has
another way to few steps.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from flaxkd import diffusion, pretrained
from flaxkd.diffusion import consistency, sampling
from flaxkd.models.attention import DotProductAttention
from flaxkd.models.unet import guidance_embedding
from flaxkd.pretrained import Folder
from flaxkd.tasks import inputs, networks
from flaxkd.tasks.losses import predict, pseudo_huber
from flaxkd.training.task import Network, Task

EMBEDDED = 256  # numbers in which the UNet sees the guidance, as in diffusers' scripts


class Inputs(NamedTuple):
    """What the networks see. The batch is the first axis of every leaf."""

    noised: inputs.Inputs  # at timesteps of the ODE
    guidance: jax.Array  # float32[b] of the teacher, 1 for none


def task(config, folder: Folder, dtype, mesh=None) -> Task:
    """The task of a configuration. folder: the teacher's. dtype: of the compute. mesh: as for distill.task.

        L = mean huber(f(x_t, t) - f'(x_s, s))        without gradient through f' and x_s

    x_s is one DDIM step of the guided teacher from x_t, to the next timestep of the ODE. f is what `consistency.lcm`
    draws with. f' is f itself, or with `few_step.target` "average" the moving average of its weights.

    Raises ValueError for a configuration that cannot be trained."""
    few_step = config.few_step
    _check(config, folder)
    learner, frozen = networks_of(config, folder, dtype, mesh)
    channels = learner.config.get("time_cond_proj_dim")
    teacher_unet = folder.module("unet", dtype, attend=DotProductAttention(mesh, config.attention))

    options = inputs.options(config, folder)
    schedule, missing = options["schedule"], options["missing"]
    visited = consistency.timesteps(len(schedule.alphas_cumprod), few_step.ode_steps)
    stride = int(visited[0]) + 1
    low, high = min(few_step.guidance), max(few_step.guidance)

    def prepare(key, batch) -> Inputs:
        key, key_guidance = jax.random.split(key)
        noised = inputs.prepare(key, batch, **options, among=visited)
        return Inputs(noised, jax.random.uniform(key_guidance, noised.timesteps.shape, minval=low, maxval=high))

    def loss(trained, frozen, average, inputs: Inputs):
        (noisy_latents, timesteps, captions, *_), guidance = inputs
        nothing = {name: jnp.broadcast_to(ids, captions[name].shape) for name, ids in missing.items()}
        both = jax.tree.map(sampling.pairs, captions | nothing, captions)
        condition = learner.condition(trained, frozen, both)
        seen = {name: x[1::2] for name, x in condition.items()}
        if channels is not None:
            seen["timestep_cond"] = guidance_embedding(guidance, channels)

        def f(params, noisy_latents, timesteps):
            noise_pred = predict(learner.unet, params["unet"], noisy_latents, timesteps, seen).noise_pred
            data, _ = diffusion.separate(schedule, noisy_latents, noise_pred, timesteps)
            c_skip, c_out = consistency.boundary(timesteps[:, None, None, None])
            return c_skip * noisy_latents + c_out * data

        twice = lambda x: sampling.pairs(x, x)
        said = predict(teacher_unet, frozen["teacher"], twice(noisy_latents), twice(timesteps), condition).noise_pred
        negative, positive = jnp.float32(said[::2]), jnp.float32(said[1::2])
        guided = negative + guidance[:, None, None, None] * (positive - negative)
        before = jnp.maximum(timesteps - stride, 0)
        nearer = diffusion.add_noise(schedule, *diffusion.separate(schedule, noisy_latents, guided, timesteps), before)
        target = f(average if few_step.target == "average" else trained, nearer, before)
        found = pseudo_huber(f(trained, noisy_latents, timesteps), jax.lax.stop_gradient(target), few_step.huber)
        return found, {"loss": found}

    scheduler = consistency.scheduler_config(folder.config("scheduler"), schedule.prediction_type, few_step.ode_steps)
    passes = (folder.config("unet"), 2), (learner.config, 4 + bool(config.remat))
    batch = inputs.batch(config, folder)
    return assembled(config, folder, learner, frozen, scheduler, batch=batch, prepare=prepare, loss=loss, passes=passes)


def networks_of(config, folder: Folder, dtype, mesh=None) -> tuple[networks.Learner, dict]:
    """(the UNet that learns, frozen trees with the teacher's as "teacher"). Arguments as for `task`.

    Raises ValueError for a configuration that cannot be trained."""
    if tuple(config.train) != ("unet",):
        raise ValueError(f"train = {tuple(config.train)}: {config.task} trains the unet alone")
    if config.few_step.embedded and (config.lora.rank or config.lora.init):
        raise ValueError(
            "few_step.embedded = True: the guidance would be an input that no adapter holds. As a LoRA, it is learnt: "
            "--config.few_step.embedded=False"
        )
    if folder.config("unet").get("time_cond_proj_dim") is not None:
        raise ValueError(f"{folder.path} draws in few steps itself: give its own teacher, and this folder as init")
    teacher = folder.params("unet")
    begin = networks.begun(config, folder, teacher)
    begin = with_guidance(*begin) if config.few_step.embedded else begin
    learner = networks.learner(config, folder, begin, dtype, mesh)
    return learner, learner.frozen | {"teacher": jax.tree.map(lambda x: x.astype(dtype), teacher)}


def assembled(config, folder: Folder, learner: networks.Learner, frozen: dict, scheduler: dict, **fields) -> Task:
    """The task of `networks_of`. scheduler: its scheduler_config.json. fields: those of the task that a loss has."""
    low, high = min(config.few_step.guidance), max(config.few_step.guidance)
    embedded = learner.config.get("time_cond_proj_dim") is not None
    guidance = min(max(folder.guidance, low), high) if embedded else 1.0
    few = dataclasses.replace(folder.replace({"scheduler": scheduler}, {}, folder.step), drawn_with=guidance)

    def before(trained, frozen) -> dict:
        teacher = Network({}, learner.assemble(trained, frozen) | {"unet": frozen["teacher"]}, folder)
        return {"teacher": teacher, "as begun": learner.network(trained, frozen)}

    return Task(
        trained=learner.trained,
        frozen=frozen,
        configs=learner.configs,
        assemble=learner.assemble,
        columns=lambda trained, frozen: {"few steps": learner.network(trained, frozen)},
        before=before,
        drawn_as=few.as_quantized(learner.quantization),
        **fields,
    )


def with_guidance(unet_config: dict, params: dict) -> tuple[dict, dict]:
    """The same UNet with the guidance as one more input, which changes nothing before the first step.

    diffusers' scripts begin with random weights there, and so with another network than the teacher."""
    if unet_config.get("time_cond_proj_dim") is not None:
        return unet_config, params
    unet_config = unet_config | {"time_cond_proj_dim": EMBEDDED}
    shape = pretrained.shapes("unet", unet_config)["time_embedding"]["cond_proj"]["kernel"].shape
    embedding = params["time_embedding"] | {"cond_proj": {"kernel": jnp.zeros(shape)}}
    return unet_config, params | {"time_embedding": embedding}


def _check(config, folder: Folder) -> None:
    """Raises ValueError for settings that do not fit together, or not the teacher."""
    few_step, count = config.few_step, folder.config("scheduler").get("num_train_timesteps", 1000)
    if few_step.target == "average" and not config.ema_decay:
        raise ValueError(
            "few_step.target = 'average' is the moving average of the weights, and ema_decay is "
            f"{config.ema_decay}: give it, 0.95 is diffusers', or take the target 'online'"
        )
    if few_step.ode_steps > count:
        raise ValueError(f"few_step.ode_steps = {few_step.ode_steps}: the teacher has {count} timesteps")
