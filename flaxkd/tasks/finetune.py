"""Fine-tuning: a whole UNet, perhaps with its text encoders, learns from pictures alone: no teacher.

With `config.prior.prompt`, this is DreamBooth with prior preservation (Ruiz et al. 2023, arXiv:2208.12242): the rows of
a batch are a picture of the subject, one of its class, and so on in turn, as data/loader.py pairs them.
"""

import jax
import jax.numpy as jnp

from flaxkd.pretrained import Folder
from flaxkd.tasks import networks
from flaxkd.tasks.inputs import Inputs, batch, options, prepare
from flaxkd.tasks.losses import predict, squares
from flaxkd.training.task import Task


def task(config, folder: Folder, dtype, mesh=None) -> Task:
    """The task of a configuration without a student. folder: of the model to train. dtype: of the compute.

    mesh: the devices it will run on, for their kernels; None: any devices, without kernels. Raises ValueError for a
    configuration that cannot be trained."""
    if config.student:
        raise ValueError(
            f"task = 'finetune' and student = {config.student!r}: a student that was distilled is trained as a model "
            "of its own, --config.student=None --config.teacher=ITS_FOLDER"
        )
    begin = networks.begun(config, folder, folder.params("unet"))
    learner = networks.learner(config, folder, begin, dtype, mesh)
    settings = options(config, folder)

    def sampled(key, batch) -> Inputs:
        inputs = prepare(key, batch, **settings)
        in_turn = jnp.arange(len(inputs.timesteps), dtype=jnp.float32) % 2
        return inputs._replace(of_class=in_turn) if config.prior.prompt else inputs

    def loss(trained, frozen, average, inputs: Inputs):
        condition = learner.condition(trained, frozen, inputs.conditions)
        prediction = predict(learner.unet, trained["unet"], inputs.noisy_latents, inputs.timesteps, condition)
        each = squares(prediction.noise_pred, inputs.target) * inputs.noise_weights
        return noise_loss(each, inputs.of_class, config.prior.weight)

    def columns(trained, frozen) -> dict:
        return {"model": learner.network(trained, frozen)}

    def before(trained, frozen) -> dict:
        new = config.blank or config.init == "random"
        return {} if new else {"before": columns(trained, frozen)["model"]}

    return Task(
        batch=batch(config, folder),
        trained=learner.trained,
        frozen=learner.frozen,
        prepare=sampled,
        loss=loss,
        configs=learner.configs,
        assemble=learner.assemble,
        columns=columns,
        before=before,
        drawn_as=networks.drawn_as(config, folder),
        passes=(learner.passes,),
    )


def noise_loss(each, of_class, weight: float) -> tuple[jax.Array, dict[str, jax.Array]]:
    """L = mean of `each` over the subject's examples + weight x mean over those of the class (arXiv:2208.12242, eq. 2).

    each: float32[b], the error of each example, weighted by its own timestep (Min-SNR). of_class: float32[b], 1 for
    half of them; None: there is no class, and L = loss_noise.
    Returns (L, {"loss", "loss_noise"} or {"loss", "loss_instance", "loss_prior"}). They are means over a batch with as
    many of either kind, so the mean over any pieces of it is exact, however accumulation and devices split pairs."""
    if of_class is None:
        loss = jnp.mean(each)
        return loss, {"loss": loss, "loss_noise": loss}
    loss_instance, loss_prior = 2 * jnp.mean(each * (1 - of_class)), 2 * jnp.mean(each * of_class)
    loss = loss_instance + weight * loss_prior
    return loss, {"loss": loss, "loss_instance": loss_instance, "loss_prior": loss_prior}
