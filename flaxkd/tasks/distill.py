"""Distillation as BK-SDM and Segmind's distill-sd do it, with the loss of losses.py.

Without a student, the same task trains a whole UNet (and text encoder) on the noise alone.
"""

import jax

from flaxkd import pretrained, students
from flaxkd.models.attention import DotProductAttention
from flaxkd.pretrained import Folder
from flaxkd.tasks import networks
from flaxkd.tasks.inputs import Inputs, batch, options, prepare
from flaxkd.tasks.losses import kd_loss, predict
from flaxkd.training.task import Network, Task


def task(config, folder: Folder, dtype, mesh=None) -> Task:
    """The task of a configuration. folder: the teacher's. dtype: of the compute.

    mesh: the devices it will run on, for their kernels; None: any devices, without kernels.

    Without `config.student`, the teacher's own UNet is trained on the noise alone. `config.train` names the trained
    parts: ("unet",), perhaps with text encoders. Raises ValueError for a configuration that cannot be trained."""
    _check(config, folder)
    family, teacher_config = folder.family, folder.config("unet")
    student = students.get(config.student) if config.student else None
    pairs = students.feature_pairs(student, config.pairing, teacher_config) if student else ()
    params = {part: folder.params(part) for part in ("unet", *family.encoders)}
    unet_config, start = networks.begun(config, folder, params["unet"])

    attend = DotProductAttention(mesh, config.attention)
    teacher_unet = folder.module("unet", dtype, attend=attend)
    unet = pretrained.build("unet", unet_config, dtype, remat=config.remat, attend=attend)
    encoders = {part: folder.module(part, dtype) for part in family.encoders}

    trained = {part: tree for part, tree in params.items() if part in config.train} | {"unet": start}
    frozen = {part: tree for part, tree in params.items() if part not in config.train}
    if student:
        frozen["teacher"] = params["unet"]
    frozen = jax.tree.map(lambda x: x.astype(dtype), frozen)

    settings = options(config, folder)

    def loss(trained, frozen, average, inputs: Inputs):
        condition = family.condition(encoders, assemble(trained, frozen), inputs.conditions)
        seen = inputs.noisy_latents, inputs.timesteps, condition
        teacher = predict(teacher_unet, frozen["teacher"], *seen) if student else None
        return kd_loss(
            predict(unet, trained["unet"], *seen),
            teacher,
            inputs.target,
            pairs,
            config.weight,
            noise_weights=inputs.noise_weights,
            normalize=config.normalize_features,
        )

    def assemble(trained, frozen) -> dict:
        return {part: trained.get(part, frozen.get(part)) for part in ("unet", *encoders)}

    def columns(trained, frozen) -> dict:
        title = "student, distilled" if student else "model"
        return {title: Network({"unet": unet_config}, assemble(trained, frozen))}

    def before(trained, frozen) -> dict:
        if not student:
            return {}
        as_cut = assemble(trained, frozen)
        teacher = Network({}, as_cut | {"unet": frozen["teacher"]})
        return {"teacher": teacher, "student as cut": Network({"unet": unet_config}, as_cut)}

    learning = (unet_config, 3 + bool(config.remat))  # one pass forward, two back; remat adds one forward
    return Task(
        batch=batch(config, folder),
        trained=trained,
        frozen=frozen,
        prepare=lambda key, batch: prepare(key, batch, **settings),
        loss=loss,
        configs={part: folder.config(part) for part in config.train} | {"unet": unet_config},
        assemble=assemble,
        columns=columns,
        before=before,
        drawn_as=predicting(folder, config.prediction_type),
        passes=((teacher_config, 1), learning) if student else (learning,),
    )


def predicting(folder: Folder, prediction_type: str | None) -> Folder | None:
    """The folder with another prediction_type in its scheduler's configuration; None for its own."""
    scheduler = folder.config("scheduler") | {"prediction_type": prediction_type}
    return prediction_type and folder.replace({"scheduler": scheduler}, {}, folder.step)


def _check(config, folder: Folder) -> None:
    """Raises ValueError for settings that do not fit together, or not the teacher."""
    if config.keep and not config.student:
        raise ValueError(f"keep = {config.keep}: flaxkd.train chooses the student. Here, name it: --config.student")
    if "unet" not in config.train:
        raise ValueError(f"train = {tuple(config.train)}: a text encoder is trained together with the 'unet'")
    if absent := [part for part in config.train if part not in folder.parts]:
        raise ValueError(f"train = {tuple(config.train)}: {folder.path} has no {absent[0]}, only {folder.parts}")
    if config.clip_skip and folder.family.penultimate:
        raise ValueError(
            f"clip_skip = {config.clip_skip}: a folder of {folder.family.title} cannot keep it, so diffusers would "
            "draw with other states than the student learnt from. Leave it at 0"
        )
