"""The models under evaluation: where they are, what they are students by, and their networks on the devices."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from flaxkd import diffusion, export, students
from flaxkd.data import encoding
from flaxkd.drawing import resumable
from flaxkd.drawing.pipeline import Pipeline
from flaxkd.evaluate import fidelity
from flaxkd.machine import files, progress, sharding
from flaxkd.pretrained import Folder, shapes


class Candidate(NamedTuple):
    """A model under evaluation: a pipeline folder, hub id or workdir, as for `Pipeline.from_pretrained`."""

    name: str
    folder: Folder
    pipeline: Pipeline | None = None  # None until `load`
    fingerprint: str = ""
    as_cut: bool = False  # a student before its training, added to the requested models
    rows: fidelity.Rows = students.TABLE  # what it may be a student by


def find(model: str | None, taken: tuple[str, ...] = (), vae: str | None = None, clip_skip: int = 0) -> Candidate:
    """The model, with its weights not yet loaded. taken: names of the earlier rows. vae: see `export.open_model`.

    Raises FileNotFoundError like `export.open_model`, and ValueError like `Folder.skip_layers`."""
    path = None if model is None else Path(os.path.expanduser(model))
    folder = export.open_model(model, vae).skip_layers(clip_skip)
    words = ("miniature",) if path is None else path.resolve().parts if path.is_dir() else path.parts
    name = "/".join(words[-2:] if words[-1] == "diffusers" or not (path and path.is_dir()) else words[-1:])
    name = next(n for n in (name, *(f"{name} ({i})" for i in range(2, 1000))) if n not in taken)
    return Candidate(name, folder, rows=rows_of(path))


def rows_of(model: Path | None) -> fidelity.Rows:
    """The rows of the students' table, after that of the file which the run in a workdir names as its student."""
    file = model / "config.json" if model else None
    named = files.read_json(file).get("student") if file and file.is_file() else None
    if not str(named).endswith(".json") or not Path(named).is_file():
        return students.TABLE
    return (students.get(named), *students.TABLE)


def anchored(models: list[Candidate]) -> list[Candidate]:
    """The models, teacher first, with every student as cut from the teacher before the first that began as it.

    It is where training began: without it, no figure says what training was worth. A student that is among the models
    as cut is not added."""
    teacher = models[0].folder
    kinds = [fidelity.student_of(model.folder.config("unet"), teacher.config("unet"), model.rows) for model in models]
    found: list[Candidate] = []
    for at, (model, student) in enumerate(zip(models, kinds, strict=True)):
        alike = [other for other, kind in zip(models, kinds, strict=True) if student and kind is student]
        if student and student not in kinds[:at] and not any(begins_as(teacher, other.folder) for other in alike):
            config = students.config(student, teacher.config("unet"))
            take = lambda s=student, c=config: students.take(s, teacher.params("unet"), shapes("unet", c))
            cut = teacher.replace({"unet": config}, {"unet": take})
            found.append(Candidate(f"{student.names[0]} as cut", cut, as_cut=True))
        found.append(model)
    return found


def begins_as(teacher: Folder, folder: Folder) -> bool:
    """Whether a UNet's first layer is the teacher's, in the precision of an export: no step has trained it."""
    own, of_teacher = (np.float16(each.params("unet")["conv_in"]["kernel"]) for each in (folder, teacher))
    return own.shape == of_teacher.shape and bool((own == of_teacher).all())


def check(model: Candidate, teacher: Candidate) -> None:
    """Raises ValueError unless both models take the same noisy latents and predict the same quantity."""
    wrong = []
    folders = [model.folder, teacher.folder]
    kinds = [diffusion.NoiseSchedule.from_config(folder.config("scheduler")) for folder in folders]
    for what, (own, others) in {
        "latents are scaled by": [folder.scaling_factor for folder in folders],
        "pixels per latent are": [folder.factor for folder in folders],
        "prediction_type is": [kind.prediction_type for kind in kinds],
        "training timesteps are": [len(kind.alphas_cumprod) for kind in kinds],
        "fields beside the noisy latents are": [folder.beside for folder in folders],
    }.items():
        if own != others:
            wrong.append(f"{what} {own!r}, not {others!r}")
    if not wrong and not np.allclose(kinds[0].alphas_cumprod, kinds[1].alphas_cumprod, atol=1e-5):
        wrong.append("the noise schedules (betas) differ")
    if wrong:
        raise ValueError(
            f"{model.name} cannot be compared with {teacher.name}: {'; '.join(wrong)}. Give its own teacher with "
            "--teacher, or --no-fidelity for the published protocol alone"
        )


def sizes(teacher: Candidate, resolution: int | None) -> tuple[tuple[int, int, int], int]:
    """((h, w, c) of the latents, pixels per side). resolution: None for the teacher's own.

    Raises ValueError if the teacher's UNet cannot take it."""
    folder = teacher.folder
    resolution = resolution or folder.resolution
    multiple = folder.factor * 2 ** (len(folder.module("unet").config.block_out_channels) - 1)
    if resolution < 1 or resolution % multiple:
        raise ValueError(f"resolution {resolution} is no multiple of {multiple} pixels, which {teacher.name} needs")
    return folder.latent_shape(resolution), resolution


def load(model: Candidate, dtype, mesh) -> Candidate:
    """The model with its weights on every device of the mesh."""
    pipeline = Pipeline.from_folder(model.folder, model.name, dtype, mesh)
    return model._replace(pipeline=pipeline, fingerprint=resumable.fingerprint(pipeline.params, model.folder))


def network(model: Candidate, captions: list[str], resolution: int, beside: dict) -> fidelity.Network:
    """The predicting networks of a loaded model, with `captions` from its own tokenizer. resolution: in pixels.

    beside: {"beside": what an inpainting UNet sees there}, else {}."""
    pipeline, folder = model.pipeline, model.folder
    parts = ("unet", *folder.family.encoders)
    modules = {part: pipeline.modules[part] for part in parts}
    params = {part: pipeline.params[part] for part in parts}
    conditions = folder.conditions(captions, (resolution, resolution)) | beside
    return fidelity.Network(modules, folder.family.condition, params, conditions)


def encode(
    model: Candidate, images: np.ndarray, batch_size: int, mesh, what: str, fields: Iterable[str] = ("moments",)
) -> dict[str, np.ndarray]:
    """`fields` of pictures uint8[n, H, W, 3], from the model's autoencoder: see `encoding.encode`. what: whose."""
    found, pipeline, n = [], model.pipeline, len(images)
    vae, put = (pipeline.modules["vae"], pipeline.params["vae"]), lambda x: jax.device_put(x, sharding.batch(mesh))
    with progress.Bar(n, f"fidelity: encoding, {what}", " pictures", first=progress.COMPILING, leave=False) as bar:
        for start in range(0, n, batch_size):
            here = np.arange(start, start + batch_size).clip(max=n - 1)  # one shape: compiled once
            found.append({name: np.asarray(x) for name, x in encoding.encode(*vae, images[here], fields, put).items()})
            bar.update(min(batch_size, n - start))
    joined = jax.tree.map(lambda *parts: np.concatenate(parts)[:n], *found)
    return {name: x if x.dtype == np.uint8 else x.astype(np.float32) for name, x in joined.items()}
