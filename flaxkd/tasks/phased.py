"""Few steps without noise between them: the teacher's way from noise to picture is cut into phases, and a UNet learns
to take each phase in one step of DDIM.

Progressive distillation (Salimans & Ho 2022, arXiv:2202.00512) in one stage, at the timesteps of drawing alone, as
phased consistency models cut the ODE (Wang et al. 2024, arXiv:2405.18407). One phase is the distillation of Luhman &
Luhman 2021 (arXiv:2101.02388). Of the data the captions alone are read: the ways are the teacher's own, drawn once and
kept (drawing/ways.py).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from flaxkd.diffusion import NoiseSchedule, phases
from flaxkd.drawing import ways
from flaxkd.models.unet import guidance_embedding
from flaxkd.pretrained import Folder
from flaxkd.tasks.few_step import assembled, networks_of
from flaxkd.tasks.losses import predict, pseudo_huber
from flaxkd.training.task import Task


class Inputs(NamedTuple):
    """What the UNet sees, and its target. The batch is the first axis of every leaf."""

    ways: jax.Array  # float32[b, 1 + phases, h, w, c], from noise to picture
    captions: dict[str, jax.Array]  # what `Family.condition` reads
    guidance: jax.Array  # float32[b] of the teacher, 1 for none


def task(config, folder: Folder, dtype, mesh=None) -> Task:
    """The task of a configuration. folder: the teacher's. dtype: of the compute. mesh: as for distill.task.

        L = mean over phases k of |x_k - y_k|^2,   x_0 = y_0 = noise

    y_k is where the teacher with guidance is after phase k, `few_step.ode_steps / few_step.phases` steps of
    DPM-Solver++ each. x_k is where the UNet is after k steps of DDIM, each from where its last one led, so that it
    learns to mend its own errors; gradients flow through all of its steps. With `few_step.huber`, its distance.

    Raises ValueError for a configuration that cannot be trained."""
    few_step = config.few_step
    _check(config, folder)
    learner, frozen = networks_of(config, folder, dtype, mesh)
    channels = learner.config.get("time_cond_proj_dim")
    kind = NoiseSchedule.from_config(folder.config("scheduler"), config.prediction_type).prediction_type
    scheduler = phases.scheduler_config(folder.config("scheduler"), kind, few_step.phases)
    taught, learnt = phases.teacher(scheduler, few_step.ode_steps), phases.learner(scheduler)
    low, high = min(few_step.guidance), max(few_step.guidance)

    def open_data(pictures, split: str):
        n = {"train": few_step.ways, "validation": config.validation.examples}[split]
        how = ways.How(config.data.resolution, config.seed, scheduler, taught, (low, high))
        return ways.read(folder, pictures, n, how, dtype)

    def prepare(key, batch) -> Inputs:
        captions = {name: x for name, x in batch.items() if name not in ("ways", "guidance")}
        return Inputs(batch["ways"], captions, batch["guidance"][:, 0])

    def loss(trained, frozen, average, inputs: Inputs):
        seen = learner.condition(trained, frozen, inputs.captions)
        if channels is not None:
            seen |= {"timestep_cond": guidance_embedding(inputs.guidance, channels)}

        def noise_pred(latents, timestep):
            at = jnp.full(len(latents), timestep)
            return predict(learner.unet, trained["unet"], latents, at, seen).noise_pred

        y = jnp.moveaxis(inputs.ways, 1, 0)
        x = phases.follow(noise_pred, y[0], learnt)
        terms = [pseudo_huber(x[k], y[k + 1], few_step.huber) for k in range(few_step.phases)]
        found = sum(terms) / few_step.phases
        return found, {"loss": found} | {f"loss_phase_{k}": term for k, term in enumerate(terms, 1)}

    passes = few_step.phases * (3 + bool(config.remat))
    return assembled(
        config,
        folder,
        learner,
        frozen,
        scheduler,
        batch=ways.fields(folder, config.data.resolution, few_step.phases),
        open_data=open_data,
        prepare=prepare,
        loss=loss,
        passes=((learner.config, passes),),
    )


def _check(config, folder: Folder) -> None:
    """Raises ValueError for settings that do not fit together, or not the teacher."""
    if config.data.buckets is not None:
        raise ValueError(f"data.buckets = {config.data.buckets}: the teacher draws its ways in squares alone")
    if folder.beside:
        raise ValueError(f"{folder.path} is for inpainting: phased draws from text alone. task = 'few_step' takes it")
    if config.prediction_type not in (None, "", folder.config("scheduler").get("prediction_type", "epsilon")):
        raise ValueError(f"prediction_type = {config.prediction_type!r}: phased keeps its teacher's, leave it at None")
