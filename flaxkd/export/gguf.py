"""A pipeline as one .gguf by LDM's names, for stable-diffusion.cpp: single_file.py with blocks of integers.

A block is 32 neighbours of a row. Kernels of 3x3 and 1x1 have rows of 3 and 1 numbers and stay float16, as they do
where stable-diffusion.cpp converts a file itself.
"""

import collections
from pathlib import Path
from typing import NamedTuple

import numpy as np

from flaxkd.export import single_file
from flaxkd.machine import files
from flaxkd.pretrained import FAMILIES, Folder
from flaxkd.pretrained.writing import cast

TYPES = ("Q8_0", "Q4_0", "F16")
BLOCK = 32
# Also kept in float16: src/model.cpp of stable-diffusion.cpp, ModelLoader::tensor_should_be_converted.
KEPT = ("embedding", "time_embed.", "label_emb.")


class Held(NamedTuple):
    """What a file holds in one type."""

    tensors: int
    weights: int
    bytes: int

    @property
    def bits(self) -> float:
        """A weight."""
        return 8 * self.bytes / self.weights


def type_of(name: str, shape: tuple[int, ...], wanted: str) -> str:
    """The type in which a tensor by LDM's name is stored."""
    if len(shape) < 2:
        return "F32"
    kept = shape[-1] % BLOCK or any(each in name for each in KEPT)
    return "F16" if kept else wanted


def write(file: Path, folder: Folder, wanted: str) -> tuple[dict[str, Held], list[str]]:
    """Writes a pipeline; returns {type: what is in it} and the rows of single_file.PROGRAMS that read such a file.

    wanted: one of TYPES. The layers are counted as stable-diffusion.cpp does if it can build the UNet, consecutively
    otherwise. Raises ValueError for another ending of `file` or a number too large for float16, ImportError without the
    package gguf, and as `Folder.stored` does."""
    try:
        import gguf
    except ImportError:
        raise ImportError('GGUF needs the package gguf: pip install "flaxkd[gguf]"') from None
    file = Path(file)
    if file.suffix != ".gguf":
        raise ValueError(f"{file} must end in .gguf")
    gaps = "sd.cpp" in single_file.readers(folder.config("unet"), gaps=True)
    able = single_file.readers(folder.config("unet"), gaps)
    tensors = single_file.tensors(folder, gaps)
    held = collections.defaultdict(lambda: Held(0, 0, 0))
    family = next(name for name, row in FAMILIES.items() if row is folder.family)
    with files.whole(file) as path:
        writer = gguf.GGUFWriter(str(path), family)
        writer.add_name(file.stem)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for name, text in single_file.header(file, folder).items():
            writer.add_string(name, text)
        for name, x in tensors.items():
            kind = type_of(name, x.shape, wanted)
            stored = _stored(name, x, kind)
            writer.add_tensor(name, stored, raw_dtype=gguf.GGMLQuantizationType[kind])
            before = held[kind]
            held[kind] = Held(before.tensors + 1, before.weights + x.size, before.bytes + stored.nbytes)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return dict(held), able


def _stored(name: str, x: np.ndarray, kind: str) -> np.ndarray:
    from gguf import GGMLQuantizationType, quants

    if kind in ("F32", "F16"):
        return cast({name: x}, {"F32": np.float32, "F16": np.float16}[kind], name)[name]
    return quants.quantize(np.ascontiguousarray(x, np.float32), GGMLQuantizationType[kind])
