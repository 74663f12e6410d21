"""LoRA files: reading every dialect, and fitting one to a model. lora_writing.py writes two of them.

Whatever a file holds is read as two small matrices for each module, A and B, with all scales folded into B, in the form
of `weights.lora`. LoCon, LoHa and LoKr are products of two matrices too. lora_names.py has the names.
"""

import collections
import contextlib
import dataclasses
import json
import os
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from flaxkd.machine import files
from flaxkd.models.unet import UNetConfig
from flaxkd.pretrained import families, keys, lora_forms, lora_names, tensors
from flaxkd.pretrained.folder import Folder
from flaxkd.weights import lora

NAME = "pytorch_lora_weights.safetensors"  # that diffusers looks for in a folder
OWN = "flaxkd."  # what only flaxkd writes into a header: student, teacher and the layers of its UNet
REMEDY = "python -m convert.lora --lora {} --to-student STUDENT --out NEW"


@dataclasses.dataclass(frozen=True, eq=False)
class LoraFile:
    """A file as read. parts: {part: adapter} in float32, see `weights.lora`, with the scales folded in.

    scales: {part: {module: scale found in the file}}. magnitudes: {part: {module: float32[o]}} of DoRA. dialects: those
    of its keys. unknown: keys of none. metadata: of its header."""

    path: Path
    parts: dict[str, dict]
    scales: dict[str, dict[tuple, float]]
    magnitudes: dict[str, dict[tuple, np.ndarray]]
    dialects: tuple[str, ...]
    unknown: tuple[str, ...]
    metadata: dict[str, str]

    def describe(self) -> str:
        """A line for each part: its modules, ranks, and on how many of them each scale was found."""
        lines = [f"{self.path}: {', '.join(self.dialects)}"]
        for part, adapter in self.parts.items():
            pairs = lora.layers(adapter)
            ranks = sorted({a.shape[-1] for a, _ in pairs.values()})
            scales = collections.Counter(self.scales[part].values()).most_common()
            found = ", ".join(f"{scale:g} on {n}" for scale, n in scales)
            lines.append(f"  {part:15} {len(pairs):4} modules, rank {', '.join(map(str, ranks))}, scale {found}")
            if self.magnitudes.get(part):
                lines[-1] += f", DoRA on {len(self.magnitudes[part])}"
        return "\n".join(lines)


def split(text: str | os.PathLike) -> tuple[Path, float]:
    """(file, scale) of FILE or FILE:SCALE. Raises FileNotFoundError."""
    path, colon, number = str(text).rpartition(":")
    if colon and not Path(text).exists():
        with contextlib.suppress(ValueError):  # a colon of the name
            scale = float(number)
            return _file(Path(path)), scale
    return _file(Path(text)), 1.0


def _file(path: Path) -> Path:
    """The file itself; of a folder, the one that diffusers takes."""
    inside = sorted(path.glob("*.safetensors")) if path.is_dir() else []
    path = path / NAME if (path / NAME).is_file() else inside[0] if len(inside) == 1 else path
    if not path.is_file():
        found = f" (it has {', '.join(x.name for x in inside) or 'none'})" if path.is_dir() else ""
        raise FileNotFoundError(f"there is no file {path}{found}: --lora takes FILE.safetensors or FILE:SCALE")
    return path


# -- Reading -----------------------------------------------------------------------------------------------------------


def read(path: str | os.PathLike) -> LoraFile:
    """Reads a LoRA file of any dialect. Warns of keys that are in none.

    Raises FileNotFoundError, and ValueError that names the file: if it is no LoRA, of a kind that flaxkd does not read
    (`lora_names.REFUSED`), damaged, or has tensors of a module that do not fit each other."""
    path = _file(Path(path))
    metadata = tensors.header(path)[1]
    modules, unknown, dialects = collections.defaultdict(dict), [], set()
    try:
        for key, array in tensors.read([path]).items():
            name = lora_names.parse(key)
            if name is None:
                unknown.append(key)
                continue
            if name.role in modules[name.part, name.module]:
                raise ValueError(f"{key} is there twice, by two names")
            if not np.isfinite(array := array.astype(np.float32)).all():
                raise ValueError(f"{key} has numbers that are NaN or infinite")
            modules[name.part, name.module][name.role] = array
            dialects.add(name.dialect)
        if not modules:
            raise ValueError(f"it has no tensor of a LoRA, but {', '.join(unknown[:3]) or 'nothing'}")
        configured = _Configured(path, metadata)
        adapters, scales, magnitudes = ({} for _ in range(3))
        for (part, module), roles in sorted(modules.items()):
            form = lora_forms.read(roles, lambda rank, p=part, m=module: configured.scale(p, m, rank))
            adapters.setdefault(part, {})[module] = form.pair
            scales.setdefault(part, {})[module] = form.scale
            if "magnitude" in roles:
                magnitudes.setdefault(part, {})[module] = roles["magnitude"]
    except ValueError as error:
        raise error if str(path) in str(error) else ValueError(f"{path} cannot be read as a LoRA: {error}") from error
    if unknown:
        more = ", ..." if len(unknown) > keys.LISTED else ""
        listed = ", ".join(unknown[: keys.LISTED])
        warnings.warn(f"{path}: {len(unknown)} tensors are of no LoRA and not applied: {listed}{more}", stacklevel=2)
    parts = {part: lora.tree(pairs) for part, pairs in adapters.items()}
    return LoraFile(path, parts, scales, magnitudes, tuple(sorted(filter(None, dialects))), tuple(unknown), metadata)


class _Configured:
    """The scale of a module without an alpha of its own: 1, or as peft's configuration of the file says.

    diffusers writes it into the header, peft itself into adapter_config.json beside the file."""

    def __init__(self, path: Path, metadata: dict[str, str]):
        self.config: dict = {}
        beside = path.with_name("adapter_config.json")
        if "lora_adapter_metadata" in metadata:
            try:
                self.config = json.loads(metadata["lora_adapter_metadata"])
            except json.JSONDecodeError as error:
                raise ValueError(f"lora_adapter_metadata in its header is no JSON: {error}") from error
        elif path.name.startswith("adapter_model") and beside.is_file():
            self.config = {f"unet.{name}": value for name, value in files.read_json(beside).items()}
        if not isinstance(self.config, dict):
            raise ValueError("lora_adapter_metadata in its header is no object {...}")

    def scale(self, part: str, module: tuple, rank: int) -> float:
        of = lambda name, default: self.config.get(f"{part}.{name}") or default
        name, alpha = ".".join(module), of("lora_alpha", rank)
        patterns = of("alpha_pattern", {})
        for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
            if re.match(rf"(.*\.)?({pattern})$", name):
                alpha = value
        if isinstance(alpha, bool) or not isinstance(alpha, int | float):
            raise ValueError(f"lora_alpha = {alpha!r} in its header is no number")
        return alpha / (rank**0.5 if of("use_rslora", False) else rank)


# -- Fitting to a model ------------------------------------------------------------------------------------------------


def fit(file: LoraFile, folder: Folder) -> dict[str, dict]:
    """{part: adapter} of a file for this model, its matrices in the form of the model's layers.

    DoRA becomes the difference of whole kernels, since it depends on them. Raises one ValueError if anything in the
    file does not apply: it names both families, or the remedy for a teacher's file on a student, or the modules."""
    _check_layers(file, folder)
    fitted, wrong = {}, []
    for part, adapter in file.parts.items():
        kernels = flatten_dict(folder.shapes(part)) if part in folder.parts else {}
        fitted[part] = {}
        for module, pair in lora.layers(adapter).items():
            kernel = kernels.get((*module, "kernel"))
            name = f"{part}: {'.'.join(module)}"
            if kernel is None:
                wrong.append(f"{name}: there is no such module")
            elif (shaped := lora_forms.shaped(*pair, kernel.shape)) is None:
                a, b = pair
                wrong.append(f"{name}: {(*a.shape[:-1], b.shape[-1])} in the file, {kernel.shape} in the model")
            else:
                fitted[part][module] = shaped
    if wrong:
        raise ValueError(_misfit(file, folder, wrong))
    for part, magnitudes in file.magnitudes.items():
        params = folder.stored(part) if magnitudes else {}
        kernels = flatten_dict(params)
        for module, magnitude in magnitudes.items():
            kernel = np.asarray(kernels[*module, "kernel"], np.float32)
            fitted[part][module] = lora_forms.dora(fitted[part][module], magnitude, kernel, ".".join(module))
    return {part: lora.tree(pairs) for part, pairs in fitted.items()}


def _check_layers(file: LoraFile, folder: Folder) -> None:
    """Raises ValueError if the header says that the file is for a UNet of other layers than the model's."""
    made_for, here = file.metadata.get(f"{OWN}layers"), layers(folder.config("unet"))
    if made_for not in (None, here):
        student = file.metadata.get(f"{OWN}student")
        there = f"the student {student}: --to-teacher makes a file for its teacher" if student else "a whole UNet: "
        remedy = "" if student else REMEDY.format(file.path)
        raise ValueError(
            f"{file.path} is for {there}{remedy}. The layers of its UNet have {made_for} transformer blocks, those of "
            f"{folder.path} {here}"
        )


def only(file: LoraFile, parts: Iterable[str]) -> LoraFile:
    """The file without the adapters of other parts."""
    kept = lambda of_parts: {part: of_parts[part] for part in parts if part in of_parts}
    metadata = file.metadata if "unet" in parts else {}  # it tells the UNet that the file is for
    return dataclasses.replace(file, parts=kept(file.parts), magnitudes=kept(file.magnitudes), metadata=metadata)


def applied(folder: Folder, loras: Iterable[str | os.PathLike], parts: Iterable[str] | None = None) -> Folder:
    """The same model with LoRA files merged: kernel + sum of scale * A @ B, made in float32. Nothing else changes.

    loras: FILE or FILE:SCALE. parts: the files' adapters of other parts are left out; None: all are merged. The base
    stays in its folder, so leaving a file out of the list unloads it. Raises what `read` and `fit` do."""
    found: dict[str, list] = {}
    for path, scale in map(split, loras):
        file = read(path) if parts is None else only(read(path), parts)
        for part, adapter in fit(file, folder).items():
            found.setdefault(part, []).append((adapter, scale))
    weights = {part: lambda part=part: _merged(folder, part, found[part]) for part in found}
    return folder.replace({}, weights, folder.step)


def _merged(folder: Folder, part: str, adapters: list[tuple[dict, float]]) -> dict:
    params = folder.stored(part)
    dtypes = {path: x.dtype for path, x in flatten_dict(params).items()}
    for adapter, scale in adapters:
        params = lora.merge(params, adapter, scale, np.float32)
    flat = flatten_dict(params)
    return unflatten_dict({path: x.astype(dtypes[path]) for path, x in flat.items()})


def layers(unet_config: dict) -> str:
    """The transformer blocks of all layers of a UNet, stage by stage, which tell a student from its teacher.

    Of the teacher of Stable Diffusion 1.x: "1 1|1 1|1 1|0 0|1|0 0 0|1 1 1|1 1 1|1 1 1"."""
    c = UNetConfig.from_dict(unet_config)
    stages = [*c.down, *([c.mid] if c.mid else []), *c.up]
    return "|".join(" ".join(str(depth or 0) for depth in stage.depths) for stage in stages)


def family(parts: Mapping[str, dict]) -> families.Family | None:
    """The family whose text states the adapted UNet reads, by their width in the published models; None: unknown."""
    published = {row.unet["cross_attention_dim"]: row.family for row in families.ARCHITECTURES.values()}
    name = published.get(text_width(parts))
    return families.FAMILIES[name] if name else None


def text_width(parts: Mapping[str, dict]) -> int | None:
    """Of the text states that the adapted UNet reads; None: no adapter tells it."""
    widths = {a.shape[-2] for path, (a, _) in lora.layers(parts.get("unet", {})).items() if path[-2:-1] == ("attn2",)
              if path[-1] in ("to_k", "to_v")}  # fmt: skip
    return widths.pop() if len(widths) == 1 else None


def _misfit(file: LoraFile, folder: Folder, wrong: list[str]) -> str:
    of, listed = family(file.parts), "".join(f"\n  {line}" for line in wrong[: keys.LISTED])
    listed += f"\n  ... and {len(wrong) - keys.LISTED} more" * (len(wrong) > keys.LISTED)
    if of is not None and of is not folder.family:
        here = f"{folder.path} is {folder.family.title}"
        return f"{file.path} is for {of.title}, and {here}. Misfits ({len(wrong)}):{listed}"
    c, row = UNetConfig.from_dict(folder.config("unet")), folder.family
    whole = len(c.block_out_channels) == row.stages and c.mid and {len(x.depths) for x in c.down} == {row.layers}
    if not whole and any(line.startswith("unet") for line in wrong):
        return (
            f"{file.path} is for a whole UNet, and {folder.path} is a student's: as it is, its modules would be put on "
            f"other layers or none. {REMEDY.format(file.path)} makes a file for it. Misfits ({len(wrong)}):{listed}"
        )
    return f"{len(wrong)} modules of {file.path} do not fit {folder.path}:{listed}"
