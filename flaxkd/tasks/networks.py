"""The UNet of a run: its configuration, and its weights before the first step."""

import numpy as np

from flaxkd import diffusion, export, pretrained, students
from flaxkd.models.unet import UNetConfig
from flaxkd.pretrained import Folder, fresh


def begun(config, folder: Folder, teacher: dict) -> tuple[dict, dict]:
    """(config.json, float32 parameters) of the UNet to train, by `config.student` and `config.init`.

    folder: the teacher's; teacher: its UNet's parameters. Raises ValueError and FileNotFoundError for a folder in
    `config.init` that has another UNet than the student, or that the teacher cannot teach."""
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
    _check(config.init, folder, other)
    if student and UNetConfig.from_dict(found) != UNetConfig.from_dict(unet_config):
        raise ValueError(f"init = {config.init!r} holds another UNet than the student {config.student}")
    return found, other.params("unet")


def _check(init: str, folder: Folder, other: Folder) -> None:
    seen, fields = lambda x: UNetConfig.from_dict(x.config("unet")), ("in_channels", "cross_attention_dim")
    if any(getattr(seen(folder), field) != getattr(seen(other), field) for field in fields):
        raise ValueError(f"init = {init!r} takes other latents or texts than the teacher {folder.path}")
    noised = lambda x: diffusion.NoiseSchedule.from_config(x.config("scheduler"))
    (betas, kind), (other_betas, other_kind) = noised(folder), noised(other)
    if kind != other_kind or not np.array_equal(betas, other_betas):
        raise ValueError(f"init = {init!r} has another noise schedule or prediction_type than {folder.path}")
