"""The networks of a run: which are trained and which stay, their configurations, and the weights to begin with."""

from typing import Any, NamedTuple

import jax
import numpy as np

from flaxkd import diffusion, export, pretrained, students
from flaxkd.models.attention import DotProductAttention
from flaxkd.models.unet import UNetConfig
from flaxkd.pretrained import Folder, fresh
from flaxkd.training import settings
from flaxkd.training.task import Network
from flaxkd.weights import quantize
from flaxkd.weights.quantize import Quantization


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
    quantization: Quantization | None  # of the UNet

    def assemble(self, trained, frozen) -> dict:
        """{part: whole parameters} of the UNet and the text encoders."""
        return {part: trained.get(part, frozen.get(part)) for part in ("unet", *self.encoders)}

    def network(self, trained, frozen) -> Network:
        """How it is drawn: as it was trained to compute."""
        whole = self.assemble(trained, frozen)
        return Network({"unet": self.config}, whole, quantization=self.quantization)

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
    attend, how = DotProductAttention(mesh, config.attention), quantization(config)
    unet = pretrained.build("unet", unet_config, dtype, remat=config.remat, attend=attend)
    return Learner(
        folder.family,
        quantize.wrapped(unet, start, how),
        {part: folder.module(part, dtype) for part in folder.family.encoders},
        {part: tree for part, tree in params.items() if part in config.train} | {"unet": start},
        jax.tree.map(lambda x: x.astype(dtype), frozen),
        unet_config,
        {part: folder.config(part) for part in config.train} | {"unet": unet_config},
        (unet_config, 3 + bool(config.remat)),  # one pass forward, two back; remat adds one forward
        how,
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


def quantization(config) -> Quantization | None:
    """How the trained UNet is quantized."""
    return Quantization(config.quantize, tuple(settings.listed(config.full_precision))) if config.quantize else None


def drawn_as(config, folder: Folder) -> Folder | None:
    """The teacher's folder as what the run trains is drawn: its prediction_type and quantization; None for its own."""
    how, kind = quantization(config), config.prediction_type
    if not kind and folder.quantization == how:
        return None
    scheduler = {"scheduler": folder.config("scheduler") | {"prediction_type": kind}} if kind else {}
    return folder.replace(scheduler, {}, folder.step).as_quantized(how)
