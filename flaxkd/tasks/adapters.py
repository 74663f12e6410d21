"""Any task as a LoRA: the networks stay, and low-rank adapters beside their kernels learn (weights/lora.py).

The adapters are merged within the loss: neither networks nor losses know of them. Optimizer, moving average and
checkpoints hold the adapters alone.
"""

import dataclasses
from typing import NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from flaxkd import export, students
from flaxkd.pretrained import Folder, lora_files
from flaxkd.training.task import Task
from flaxkd.weights import lora


class Kind(NamedTuple):
    """What kind of adapter a part gets. scale: alpha / rank."""

    rank: int
    scale: float
    targets: tuple[str, ...]


def wanted(config) -> bool:
    """Whether a run trains adapters in place of whole parts."""
    return bool(config.lora.rank or config.lora.init)


def teacher(config, folder: Folder) -> Folder:
    """The teacher of a student that learns an adapter: `folder` with `config.lora.init` merged, if there is one.

    Without a student, the file is what the run goes on from. Raises what `lora_files.applied` does."""
    return lora_files.applied(folder, [config.lora.init]) if config.lora.init and config.student else folder


def adapted(task: Task, config, folder: Folder, dtype) -> Task:
    """The task with adapters in place of its parts, which it gets as `frozen["base"]`.

    folder: the teacher's. dtype: of the compute; adapted kernels stay in float32, since the sum with a small product in
    bfloat16 would be the kernel again. Before the first step nothing is changed, but for what `config.lora.init` does.
    Raises ValueError for a configuration without a base that others can load, and as `lora.modules`, `lora_files.read`
    and `lora_files.fit` do."""
    _check(config)
    begun, worn = _begun(config, task, folder)
    kinds = {part: _kind(config, part) for part in task.trained if part not in begun}
    scales = {part: kinds[part].scale if part in kinds else 1.0 for part in task.trained}
    new = lambda part, tree: begun.get(part) or _new(part, tree, kinds[part], config.seed)
    trained = {part: new(part, tree) for part, tree in task.trained.items()}
    base = {part: _base(tree, trained[part], dtype) for part, tree in task.trained.items()}

    def whole(adapters, frozen):
        return {part: lora.merge(frozen["base"][part], tree, scales[part]) for part, tree in adapters.items()}

    def loss(trained, frozen, average, inputs):
        return task.loss(whole(trained, frozen), frozen, whole(average, frozen), inputs)

    drawn_as = task.drawn_as
    if worn:
        drawn_as = lora_files.applied(drawn_as or folder, [worn], folder.family.encoders)
    *others, (learner, passes) = task.passes
    return dataclasses.replace(
        task,
        trained=trained,
        frozen=task.frozen | {"base": base},
        loss=loss,
        assemble=lambda trained, frozen: task.assemble(whole(trained, frozen), frozen),
        columns=lambda trained, frozen: task.columns(whole(trained, frozen), frozen),
        before=lambda trained, frozen: task.before(whole(trained, frozen), frozen),
        passes=(*others, (learner, passes - 1)),  # no gradients of most weights
        drawn_as=drawn_as,
        adapted=export.Adapted(None if config.init == "teacher" else config.init, scales, worn),
    )


def _check(config) -> None:
    """Raises ValueError for settings that leave no base for the adapter."""
    if config.blank or config.init == "random":
        raise ValueError("lora adapts a trained model: not one with blank or init = 'random'")
    if config.student and config.init == "teacher":
        raise ValueError(
            f"lora with student = {config.student!r}: an adapter cannot mend a student as cut, and needs a folder to "
            "be loaded into. Give the distilled one, --config.init=runs/small"
        )
    if config.student and config.lora.init and tuple(config.train) != ("unet",):
        raise ValueError(
            f"lora.init with student = {config.student!r} and train = {tuple(config.train)}: student and teacher share "
            "text encoders, which wear the file as they are. Train the UNet alone, --config.train=unet"
        )


def _kind(config, part: str) -> Kind:
    """Of a part; what `lora.text_encoder` leaves open is as for the UNet."""
    usual = config.lora.rank, config.lora.alpha, config.lora.targets
    own = config.lora.text_encoder.rank, config.lora.text_encoder.alpha, config.lora.text_encoder.targets
    own = own if part.startswith("text_encoder") else usual
    rank, alpha, targets = (x or other for x, other in zip(own, usual, strict=True))
    if not rank:
        raise ValueError(f"lora.init does not adapt the {part}: give lora.rank too, or leave it out of train")
    return Kind(rank, (alpha or rank) / rank, (targets,) if isinstance(targets, str) else tuple(targets))


def _new(part: str, tree: dict, kind: Kind, seed: int) -> dict:
    try:
        return lora.init(tree, kind.targets, kind.rank, seed)
    except ValueError as error:
        raise ValueError(f"lora of the {part}: {error}") from error


def _begun(config, task: Task, folder: Folder) -> tuple[dict[str, dict], str | None]:
    """({part: adapter} of `config.lora.init`, with its scale; the file itself, if a student wears more of it as it is).

    For a student, the file is the teacher's: its UNet's is put under other names, and text encoders are shared."""
    if not config.lora.init:
        return {}, None
    path, scale = lora_files.split(config.lora.init)
    file = lora_files.read(path)
    beside = [part for part in file.parts if part not in task.trained]
    if beside and not config.student:
        raise ValueError(
            f"lora.init = {config.lora.init!r} adapts the {' and '.join(beside)} too: train them, "
            f"--config.train={tuple(task.trained) + tuple(beside)}"
        )
    own = folder if config.student or config.init == "teacher" else export.open_model(config.init)
    parts = lora_files.fit(lora_files.only(file, task.trained), own)
    if config.student and "unet" in parts:
        parts["unet"], _ = students.take_adapter(students.get(config.student), parts["unet"], task.trained["unet"])
    worn = f"{path.absolute()}:{scale}" if beside else None
    return {part: lora.scaled(tree, scale) for part, tree in parts.items()}, worn


def _base(tree: dict, adapter: dict, dtype) -> dict:
    kernels = {(*module, "kernel") for module in lora.layers(adapter)}
    flat = flatten_dict(tree)
    return unflatten_dict({path: x.astype(np.float32 if path in kernels else dtype) for path, x in flat.items()})
