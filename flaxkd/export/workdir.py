"""From a workdir to a pipeline folder of diffusers.

A workdir, of a run or of `convert.from_diffusers`, holds
    export.json     its record: {"source": pipeline folder of the untrained parts, "parts": {"unet": its config.json},
                    "guidance": of its pictures,
                    "quantization": how its UNet is quantized, if it is,
                    "configs": those of text encoders and scheduler that differ from the source's, as for clip_skip,
                    "vae": where their autoencoder comes from, if it is not the source's own,
                    "adapted": of a run that trains adapters, {"base": the model whose UNet is adapted, null for the
                    source, "scales": {part: what its A @ B is multiplied with}, "worn": a LoRA file of its text
                    encoders, or null},
                    "step": of the finished export, null before}
    checkpoints/    Orbax steps with the tree {"params": {"unet": ...}, "ema": {"unet": ...} or nothing, ...}: of whole
                    parts, or of adapters as in weights/lora.py
The workdir of a run also holds config.json, metrics.jsonl and samples.png, for the model card.
"""

import dataclasses
import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from flaxkd.export.card import PREVIEW, model_card
from flaxkd.machine import checkpoints, files
from flaxkd.pretrained import Folder, hub, lora_files, save
from flaxkd.weights import lora
from flaxkd.weights.quantize import Quantization, on_grid

RECORD = "export.json"
EXPORT = "diffusers"  # the folder a run exports to


class Adapted(NamedTuple):
    """The base of a run's adapters, see flaxkd.tasks.adapters."""

    base: str | None  # the model whose UNet is adapted; None: the run's
    scales: Mapping[str, float]  # {part: what its A @ B is multiplied with}
    worn: str | None = None  # a LoRA file, FILE or FILE:SCALE, whose text encoders the model has, untrained


def write_record(
    workdir: Path, source: Folder, parts: Mapping[str, dict], step: int | None = None, adapted: Adapted | None = None
) -> None:
    """Writes the export record. parts: {part: its config.json} of the checkpoints; the other parts are `source`'s.

    step: that of the finished export in the workdir. adapted: of a task that trains adapters.

    An embedded teacher and a folder in the workdir are not written as absolute paths: the workdir can be moved to
    another machine."""
    path, here = source.path.resolve(), Path(workdir).resolve()
    is_embedded, name = hub.embedded(path)
    written = name if is_embedded else source.path.absolute()
    if not is_embedded and path.is_relative_to(here):
        written = path.relative_to(here)
    content = {"source": None if written is None else str(written), "parts": dict(parts), "step": step}
    content["guidance"] = source.guidance
    content |= {"quantization": source.quantization._asdict()} if source.quantization else {}
    own = (*source.family.encoders, "scheduler")
    if configs := {x: source.configs[x] for x in own if x in source.configs and x not in parts}:
        content["configs"] = configs
    lasting = lambda model: str(path.absolute()) if (path := Path(os.path.expanduser(model))).exists() else model
    if source.vae is not None:
        content["vae"] = lasting(source.vae)
    if adapted is not None:
        content["adapted"] = {"base": adapted.base and lasting(adapted.base), "scales": dict(adapted.scales)}
        content["adapted"]["worn"] = adapted.worn
    files.write_json(Path(workdir) / RECORD, content)


def exported_step(workdir: Path) -> int | None:
    """The step of a run's finished export; None without one, or if its record does not say."""
    record, out = Path(workdir) / RECORD, Path(workdir) / EXPORT
    whole = record.is_file() and (out / "model_index.json").is_file()
    return files.read_json(record).get("step") if whole else None


def read_record(workdir: Path, source: str | os.PathLike | None = None, vae=None) -> tuple[dict[str, dict], Folder]:
    """({part: its config.json} of the parts in the checkpoints, the pipeline folder of the others).

    source, vae: None for the record's own. Raises FileNotFoundError with the remedy if one of them is gone."""
    path = workdir / RECORD
    if not path.is_file():
        raise FileNotFoundError(
            f"{workdir.absolute()} has no {RECORD}: give a workdir of flaxkd.train or convert.from_diffusers"
        )
    content = files.read_json(path)
    if source is None:
        source = content["source"]
        if source is not None and (workdir / source).exists():  # relative to the workdir, or absolute
            source = workdir / source
    try:
        folder = Folder.open(source, vae or content.get("vae"))
        folder = folder.replace(content.get("configs", {}), {})
        if worn := (content.get("adapted") or {}).get("worn"):
            folder = lora_files.applied(folder, [worn], folder.family.encoders)
        own = dict(drawn_with=content.get("guidance"), quantized=content.get("quantization", {}))
        return content["parts"], dataclasses.replace(folder, **own)
    except FileNotFoundError as error:
        hint = f"{path} names it as the source of the untrained parts; --source DIR gives another place."
        raise FileNotFoundError(f"{error}\n{hint}") from None


def open_model(model: str | os.PathLike | None, vae: str | os.PathLike | None = None) -> Folder:
    """The pipeline folder of a model: a path, a hub id, None for the embedded teacher, or the workdir of a run.

    A workdir stands for its exported folder. Without one, it stands for its source with the parts of the newest
    checkpoint, read on first use. vae: another autoencoder than the model's own, as `Folder.open` takes it. Raises
    FileNotFoundError, as `Folder.open` and `read_record` do."""
    workdir = Path(os.path.expanduser(model or ""))
    if model is None or not (workdir / RECORD).is_file():
        return Folder.open(model, vae)
    if (workdir / EXPORT / "model_index.json").is_file():
        return Folder.open(workdir / EXPORT, vae)
    configs, folder = read_record(workdir, vae=vae)
    newest = functools.cache(lambda: restore_whole(workdir, folder))
    weights = {part: lambda part=part: newest()[1][part] for part in configs}
    return folder.replace(configs, weights, step=lambda: newest()[0])


def checkpoint(workdir: Path, ema: bool | None = None, source=None, vae=None) -> Folder:
    """The pipeline of a workdir with its newest readable checkpoint; arguments and errors are those of `export`."""
    parts, folder = read_record(Path(workdir), source, vae)
    step, params, _ = restore_whole(Path(workdir), folder, ema)
    return folder.replace(parts, {part: lambda part=part: params[part] for part in parts}, step=lambda: step)


def export(
    workdir: Path,
    out: Path,
    dtype=None,
    ema: bool | None = None,
    source: str | os.PathLike | None = None,
    vae=None,
    quantize: str | None = None,
) -> Path:
    """Writes the newest readable checkpoint of `workdir` as a whole pipeline folder `out`, and returns `out`.

    dtype: of the trained parts; None: unchanged. ema: True for the moving average, False for the parameters
    themselves; None: the average if there is one. source: of the other parts, vae: of the autoencoder; None: the
    export record's. quantize: see `rounded`. Raises FileNotFoundError if the record, the checkpoint or the source is
    missing, and ValueError if the checkpoint lacks the requested weights (or as `pretrained.save` does)."""
    workdir = Path(workdir)
    parts, folder = read_record(workdir, source, vae)
    how = quantize and rounding(folder, quantize)
    step, params, averaged = restore_whole(workdir, folder, ema)
    if how and "unet" in params:
        folder, params = folder.as_quantized(how), params | {"unet": on_grid(params["unet"], how)}
    return write(workdir, out, folder, parts, params, step=step, averaged=averaged, dtype=dtype)


def rounding(folder: Folder, scheme: str) -> Quantization:
    """How its UNet is to be rounded for good. Raises ValueError if it was trained for another scheme, or is rounded."""
    own = folder.quantization or Quantization(scheme)
    if own.on_grid:
        raise ValueError(f"the weights of {folder.path} are rounded already, by {own.scheme}: give what they were")
    if own.scheme != scheme:
        raise ValueError(f"--quantize {scheme}: this UNet was trained to be rounded by {own.scheme}: give that one")
    return own._replace(on_grid=True)


def scheme_of(folder: Folder, scheme: str | None = None) -> str | None:
    """The scheme that its UNet is still to be rounded by: this one, or that it was trained for; None: none."""
    own = folder.quantization
    return own.scheme if scheme is None and own and not own.on_grid else scheme


def as_drawn(folder: Folder) -> Folder:
    """The pipeline for programs that do not quantize: with the weights that flaxkd draws with. Raises as `rounded`."""
    scheme = scheme_of(folder)
    return rounded(folder, scheme) if scheme else folder


def rounded(folder: Folder, scheme: str, dtype=None) -> Folder:
    """The same pipeline with the weights of its UNet rounded for good: they need no qwix to be drawn with.

    Layers in full precision are those it was trained with, else the usual ones. dtype: of the UNet's parameters; None:
    unchanged. Raises ValueError, as `rounding` and `quantize.layers` do."""
    how, unet = rounding(folder, scheme), folder.config("unet")
    weights = lambda: on_grid(folder.stored("unet") if dtype is None else folder.params("unet", dtype), how)
    return folder.replace({"unet": unet}, {"unet": weights}, folder.step).as_quantized(how)


def write(
    workdir: Path,
    out: Path,
    source: Folder,
    parts: Mapping[str, dict],
    params: Mapping[str, dict],
    *,
    step: int,
    averaged: bool = False,
    dtype=None,
) -> Path:
    """Like `export`, for params {part: tree} in memory, of `parts` {part: its config.json}."""
    if missing := [part for part in parts if part not in params]:
        raise ValueError(f"the checkpoint holds {', '.join(params)}, but not {', '.join(missing)} of {RECORD}")
    picture = workdir / PREVIEW
    return save(
        out,
        source=source,
        parts={part: (config, params[part]) for part, config in parts.items()},
        dtype=dtype,
        card=model_card(workdir, source, parts, step, averaged),
        beside={PREVIEW: picture} if picture.is_file() else None,
    )


def newest_step(workdir: Path) -> int | None:
    """The step of the newest checkpoint, readable or not; None if there is none."""
    return max(_steps(Path(workdir) / "checkpoints"), default=None)


def _steps(folder: Path) -> list[int]:
    return [int(path.name) for path in folder.glob("*") if path.name.isdigit()]


def restore(folder: Path, ema: bool | None = None) -> tuple[int, dict, bool]:
    """(step, params {part: tree of numpy arrays}, whether they are averages) of the newest good checkpoint.

    Only that tree is read. The larger optimizer state is not loaded, and its structure need not be known."""
    folder = Path(folder)
    found = checkpoints.newest(folder, _steps(folder), lambda step: _restore_tree(folder / str(step), ema))
    if found is None:
        raise FileNotFoundError(f"{folder} has no checkpoint: has this training saved one yet?")
    step, (name, tree) = found
    if tree is None:
        raise ValueError(
            f"{folder / str(step)} holds no moving average (ema): export the parameters themselves, --no-ema"
        )
    return step, tree, name == "ema"


def restore_whole(workdir: Path, source: Folder, ema: bool | None = None) -> tuple[int, dict, bool]:
    """Like `restore`, with the whole parts of a workdir that holds adapters: they are merged into their base.

    source: that of the record."""
    step, params, averaged = restore(workdir / "checkpoints", ema)
    if (adapted := files.read_json(workdir / RECORD).get("adapted")) is None:
        return step, params, averaged
    return step, params | merged(params, Adapted(**adapted), source), averaged


def merged(adapters: Mapping[str, dict], adapted: Adapted, source: Folder) -> dict[str, dict]:
    """{part: params} in float32 of the adapted parts: adapters {part: tree} merged into their base."""
    base = {"unet": open_model(adapted.base)} if adapted.base else {}
    whole = lambda part, scale: lora.merge(base.get(part, source).params(part), adapters[part], scale)
    return {part: whole(part, scale) for part, scale in adapted.scales.items()}


def _restore_tree(step: Path, ema: bool | None) -> tuple[str, dict | None]:
    """("params" or "ema", that tree). The tree is None if the average is requested and was not saved."""
    for item in sorted(path.parent for path in step.glob("*/_METADATA")):
        saved = checkpoints.names(item)
        if "params" not in saved:
            continue
        name = "ema" if (saved.get("ema", False) if ema is None else ema) else "params"
        if name == "ema" and not saved.get("ema"):
            return name, None
        tree = checkpoints.read(item, [name])[name]
        checkpoints.check_finite(tree)
        return name, tree
    raise ValueError("it holds no tree with 'params'")
