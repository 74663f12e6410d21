"""Distillation as BK-SDM and Segmind's distill-sd do it, with the loss of losses.py."""

import jax

from flaxkd import students
from flaxkd.models.attention import DotProductAttention
from flaxkd.pretrained import Folder
from flaxkd.tasks import networks
from flaxkd.tasks.inputs import Inputs, batch, options, prepare
from flaxkd.tasks.losses import kd_loss, predict
from flaxkd.training.task import Network, Task


def task(config, folder: Folder, dtype, mesh=None) -> Task:
    """The task of a configuration. folder: the teacher's. dtype: of the compute.

    mesh: the devices it will run on, for their kernels; None: any devices, without kernels.

    `config.train` names the trained parts: ("unet",), perhaps with text encoders. Raises ValueError for a
    configuration that cannot be trained."""
    if not config.student:
        raise ValueError("task = 'distill' needs a student: --config.student, or --config.task=finetune for none")
    teacher_config = folder.config("unet")
    pairs = students.feature_pairs(students.get(config.student), config.pairing, teacher_config)
    teacher = folder.params("unet")
    learner = networks.learner(config, folder, networks.begun(config, folder, teacher), dtype, mesh)
    teacher_unet = folder.module("unet", dtype, attend=DotProductAttention(mesh, config.attention))
    frozen = learner.frozen | {"teacher": jax.tree.map(lambda x: x.astype(dtype), teacher)}
    settings = options(config, folder)

    def loss(trained, frozen, average, inputs: Inputs):
        condition = learner.condition(trained, frozen, inputs.conditions)
        seen = inputs.noisy_latents, inputs.timesteps, condition
        return kd_loss(
            predict(learner.unet, trained["unet"], *seen),
            predict(teacher_unet, frozen["teacher"], *seen),
            inputs.target,
            pairs,
            config.weight,
            noise_weights=inputs.noise_weights,
            normalize=config.normalize_features,
        )

    def columns(trained, frozen) -> dict:
        return {"student, distilled": learner.network(trained, frozen)}

    def before(trained, frozen) -> dict:
        teacher = Network({}, learner.assemble(trained, frozen) | {"unet": frozen["teacher"]})
        begun = "student as cut" if config.init == "teacher" else "student as begun"
        return {"teacher": teacher, begun: learner.network(trained, frozen)}

    return Task(
        batch=batch(config, folder),
        trained=learner.trained,
        frozen=frozen,
        prepare=lambda key, batch: prepare(key, batch, **settings),
        loss=loss,
        configs=learner.configs,
        assemble=learner.assemble,
        columns=columns,
        before=before,
        drawn_as=networks.drawn_as(config, folder),
        passes=((teacher_config, 1), learner.passes),
    )
