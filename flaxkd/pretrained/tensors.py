"""The tensors of safetensors files: which files of a folder hold a network, and what is in them.

Pickles are never opened, since they can run code. Names of tensors are the matter of keys.py.
"""

import contextlib
import json
import re
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors import safe_open

from flaxkd.machine import files

VARIANTS = ("fp32", "fp16", "bf16", "non_ema")  # of the hub's files, best first; the file without a variant comes first
PICKLES = (".bin", ".ckpt", ".pkl", ".pt", ".pth")

RESAVE = """\
    # in an environment with torch, diffusers and transformers, and only if you trust where it comes from
    from diffusers import DiffusionPipeline
    pipeline = DiffusionPipeline.from_pretrained("{model}", use_safetensors=False)
    pipeline.save_pretrained("NEW_FOLDER", safe_serialization=True)
then pass NEW_FOLDER. (A single .ckpt file needs StableDiffusionPipeline or StableDiffusionXLPipeline in place of
DiffusionPipeline, and from_single_file in place of from_pretrained.)"""


def find(folder: Path, stem: str, model: str | Path) -> list[Path]:
    """The files of a network: STEM.safetensors or its shards, else those of a variant (STEM.fp16.safetensors, ...).

    model: of which the network is a part, for the remedy. Raises FileNotFoundError if there is no such file or a shard
    is missing, and ValueError if there are only pickles or pointers of git-LFS."""
    variants = _variants(folder, stem)
    rank = lambda name: (name != "", VARIANTS.index(name) if name in VARIANTS else len(VARIANTS), name)
    for name in sorted(variants, key=rank):
        if not any(path.is_file() and files.is_lfs_pointer(path) for path in variants[name]):
            if absent := [path.name for path in variants[name] if not path.is_file()]:
                raise FileNotFoundError(f"{folder} lacks files of its weights: {', '.join(absent)}")
            return variants[name]
    if variants:
        files.check_lfs_pointer(next(path for path in variants[min(variants, key=rank)] if path.is_file()))
    here = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    error, problem = FileNotFoundError, f"no {stem}.safetensors (but {', '.join(here) or 'nothing'})"
    if pickles := [name for name in here if name.endswith(PICKLES)]:
        error, problem = ValueError, f"only a pickle ({', '.join(pickles)}), not opened as it can run code"
    raise error(f"{folder} has {problem}. Save the model as safetensors:\n{RESAVE.format(model=model)}")


def _variants(folder: Path, stem: str) -> dict[str, list[Path]]:
    """{variant: its files, all those that must be there}; "" is the network without a variant.

    The hub spells a variant before or after the number of the shard, and in three places of the index's name."""
    found: dict[str, list[Path]] = {}
    shard = r"(?:-(\d{5})-of-(\d{5}))?"
    weights = re.compile(rf"{re.escape(stem)}(?:\.(\w+))?{shard}(?:\.(\w+))?\.safetensors")
    index = re.compile(rf"{re.escape(stem)}(?:\.(\w+))?\.safetensors(?:\.(\w+))?\.index(?:\.(\w+))?\.json")
    names = sorted(path.name for path in folder.glob("*") if path.is_file()) if folder.is_dir() else []
    for match in filter(None, map(index.fullmatch, names)):
        listed = files.read_json(folder / match[0])
        if not isinstance(listed, dict) or not isinstance(listed.get("weight_map"), dict):
            raise ValueError(f"{folder / match[0]} is no index of weights: it has no weight_map")
        found[match[1] or match[2] or match[3] or ""] = [
            folder / x for x in sorted({*map(str, listed["weight_map"].values())})
        ]
    for match in filter(None, map(weights.fullmatch, names)):
        variant, number, of = match[1] or match[4] or "", match[2], match[3]
        if number is None:  # one file goes before shards
            found[variant] = [folder / match[0]]
        elif variant not in found:
            found[variant] = [folder / match[0].replace(number, f"{i + 1:05}", 1) for i in range(int(of))]
    return found


def header(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """({key: zeros of its shape, without memory}, metadata) of a safetensors file. Raises ValueError, as `read`."""
    with _opened(path) as (file, kinds):
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in kinds}
        return {key: np.broadcast_to(np.uint8(0), shape) for key, shape in shapes.items()}, file.metadata() or {}


def read(paths: Iterable[Path], prefix: str = "") -> dict[str, np.ndarray]:
    """The tensors {key: array} of safetensors files, in their dtypes; those of eight bits as float16.

    prefix: only of keys that begin so, without it. Where a tensor of eight bits has a scale beside it, their product in
    float32. Raises ValueError that names the file if it cannot be read, or has tensors of a dtype that numpy does not
    have."""
    tensors, eight = {}, {}
    for path in paths:
        with _opened(path) as (file, kinds):
            wanted = [key for key in kinds if key.startswith(prefix)]
            eight |= {key: path for key in wanted if kinds[key] in FLOAT8}
            tensors |= {key: file.get_tensor(key) for key in wanted if key not in eight}
        tensors |= _read_float8(path, {key for key, of in eight.items() if of == path})
    return {key.removeprefix(prefix): array for key, array in _scaled(tensors, eight).items()}


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple]:
    """(an open safetensors file, {key: its dtype there})."""
    files.check_lfs_pointer(path)
    kinds: dict[str, str] = {}
    try:
        with safe_open(path, framework="np") as file:
            kinds |= {key: file.get_slice(key).get_dtype() for key in file.keys()}
            yield file, kinds
    except OSError:
        raise
    except (AttributeError, TypeError) as error:  # of numpy, which does not know the dtype
        strange = ", ".join(sorted({kind for kind in kinds.values() if re.match(r"F[468]_", kind)})) or error
        raise ValueError(f"{path} has tensors of a dtype that flaxkd does not read ({strange})") from error
    except Exception as error:  # SafetensorError derives from Exception alone
        with path.open("rb") as file:
            start = file.read(8)
        if start[:2] in (b"PK", b"\x80\x02", b"\x80\x04"):  # a zip archive or a pickle
            raise ValueError(f"{path} is a pickle by another name, not opened as it can run code") from error
        raise ValueError(f"{path} cannot be read: {error}. Was it downloaded whole?") from error


FLOAT8 = {
    "F8_E4M3": jnp.float8_e4m3fn,
    "F8_E5M2": jnp.float8_e5m2,
    "F8_E4M3FNUZ": jnp.float8_e4m3fnuz,
    "F8_E5M2FNUZ": jnp.float8_e5m2fnuz,
}


def _read_float8(path: Path, names: set[str]) -> dict[str, np.ndarray]:
    """These tensors of a file as float16, which holds every number of eight bits; safetensors gives numpy none."""
    if not names:
        return {}
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    data = np.memmap(path, np.uint8, mode="r", offset=8 + length)
    read = {}
    for name in names:
        begin, end = header[name]["data_offsets"]
        array = np.asarray(data[begin:end]).view(FLOAT8[header[name]["dtype"]])
        read[name] = array.astype(np.float16).reshape(header[name]["shape"])
    return read


# Beside MODULE.weight, in files of ComfyUI, of transformers and of compressed-tensors.
SCALES = ("scale_weight", "weight_scale", "weight_scale_inv")
INPUT_SCALES = ("scale_input", "input_scale")  # of the arithmetic in eight bits, which is not done here


def _scaled(tensors: dict[str, np.ndarray], eight: Iterable[str]) -> dict[str, np.ndarray]:
    """The tensors, with those of eight bits multiplied by their scales."""
    for key in eight:
        module = key.rpartition(".")[0]
        for name in (f"{module}.{scale}" for scale in INPUT_SCALES):
            tensors.pop(name, None)
        for name in (f"{module}.{scale}" for scale in SCALES):
            if key.endswith(".weight") and name in tensors:
                array, scale = tensors[key], tensors.pop(name).astype(np.float32)
                if scale.size != 1 and (len(scale) != len(array) or scale.size != len(array)):
                    raise ValueError(f"{name} has the shape {list(scale.shape)} for {list(array.shape)} of {key}: "
                                     "flaxkd reads one scale, or one for each output")  # fmt: skip
                tensors[key] = array.astype(np.float32) * scale.reshape(-1, *[1] * (array.ndim - 1))
    return tensors
