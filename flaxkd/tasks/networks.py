"""The networks of a run: which are trained and which stay, their configurations, and the weights to begin with."""

from typing import Any, NamedTuple

import jax
import numpy as np

from flaxkd import diffusion, export, pretrained, students
from flaxkd.models.attention import DotProductAttention
from flaxkd.models.unet import UNetConfig
from flaxkd.pretrained import Folder, fresh


class Learner(NamedTuple):
    """A UNet that learns from pictures, with the text encoders of its folder, which may learn with it."""

    family: Any  # row of pretrained/families.py
    unet: Any  # module
    encoders: dict[str, Any]  # {part: module}
    trained: dict[str, dict]  # {part: tree} in float32
    frozen: dict[str, dict]  # {part: tree} in compute precision
    config: dict  # config.json of the UNet
    configs: dict[str, dict]  # {part: its config.json} of all trained parts
    passes: tuple[dict, int]  # as in `Task.passes`

    def assemble(self, trained, frozen) -> dict:
        """{part: whole parameters} of the UNet and the text encoders."""
        return {part: trained.get(part, frozen.get(part)) for part in ("unet", *self.encoders)}

    def condition(self, trained, frozen, conditions) -> dict:
        """The keyword arguments of the UNet, from the captions of a batch."""
        return self.family.condition(self.encoders, self.assemble(trained, frozen), conditions)


def learner(config, folder: Folder, begin: tuple[dict, dict], dtype, mesh=None) -> Learner:
    """The UNet that `begun` has made, and the text encoders, as `config.train` says.

    folder: the teacher's. dtype: of the compute. mesh: the devices it will run on, for their kernels; None: any
    devices, without kernels."""
    unet_config, start = begin
    params = {part: folder.params(part) for part in folder.family.encoders}
    frozen = {part: tree for part, tree in params.items() if part not in config.train}
    attend = DotProductAttention(mesh, config.attention)
    return Learner(
        folder.family,
        pretrained.build("unet", unet_config, dtype, remat=config.remat, attend=attend),
        {part: folder.module(part, dtype) for part in folder.family.encoders},
        {part: tree for part, tree in params.items() if part in config.train} | {"unet": start},
        jax.tree.map(lambda x: x.astype(dtype), frozen),
        unet_config,
        {part: folder.config(part) for part in config.train} | {"unet": unet_config},
        (unet_config, 3 + bool(config.remat)),  # one pass forward, two back; remat adds one forward
    )


def begun(config, folder: Folder, teacher: dict) -> tuple[dict, dict]:
    """(config.json, float32 parameters) of the UNet to train, by `config.student` and `config.init`.

    folder: the teacher's; teacher: its UNet's parameters. Raises ValueError for settings that do not fit together, and
    ValueError and FileNotFoundError for a folder in `config.init` that has another UNet than the student, or that the
    teacher cannot teach."""
    _check(config, folder)
    own = folder.config("unet")
    student = students.get(config.student) if config.student else None
    unet_config = students.config(student, own) if student else own
    if config.init == "random":
        return unet_config, fresh.initial(pretrained.shapes("unet", unet_config), config.seed, fresh.ZERO)
    if config.init == "teacher":
        shapes = pretrained.shapes("unet", unet_config)
        return unet_config, students.take(student, teacher, shapes) if student else teacher
    other = export.open_model(config.init)
    found = other.config("unet")
    _check_init(config.init, folder, other)
    if student and UNetConfig.from_dict(found) != UNetConfig.from_dict(unet_config):
        raise ValueError(f"init = {config.init!r} holds another UNet than the student {config.student}")
    return found, other.params("unet")


def _check_init(init: str, folder: Folder, other: Folder) -> None:
    seen, fields = lambda x: UNetConfig.from_dict(x.config("unet")), ("in_channels", "cross_attention_dim")
    if any(getattr(seen(folder), field) != getattr(seen(other), field) for field in fields):
        raise ValueError(f"init = {init!r} takes other latents or texts than the teacher {folder.path}")
    noised = lambda x: diffusion.NoiseSchedule.from_config(x.config("scheduler"))
    (betas, kind), (other_betas, other_kind) = noised(folder), noised(other)
    if kind != other_kind or not np.array_equal(betas, other_betas):
        raise ValueError(f"init = {init!r} has another noise schedule or prediction_type than {folder.path}")


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


def predicting(folder: Folder, prediction_type: str | None) -> Folder | None:
    """The folder with another prediction_type in its scheduler's configuration; None for its own."""
    scheduler = folder.config("scheduler") | {"prediction_type": prediction_type}
    return prediction_type and folder.replace({"scheduler": scheduler}, {}, folder.step)
