"""Writes pipeline folders for diffusers' from_pretrained. Needs neither torch nor diffusers."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from flaxkd.machine import files
from flaxkd.pretrained import families, keys
from flaxkd.pretrained.folder import CONFIGS, DRAWN_WITH, NO_LIMIT, QUANTIZED, Folder

VERSION = "0.22.0"  # of diffusers, the oldest for all folders; its pipelines for inpainting do not load without one


def save(
    out: Path,
    *,
    source: Folder,
    parts: Mapping[str, tuple[dict, dict]],
    dtype=None,
    source_dtype=None,
    card: str | None = None,
    beside: Mapping[str, Path] | None = None,
) -> Path:
    """Writes a whole pipeline folder, and returns `out`.

    parts: {part: (config.json as a dict, params)} of the new parts, written in `dtype` (None: unchanged). The other
    networks come from the pipeline folder `source` in `source_dtype` (None: unchanged), under current names; tokenizer
    and scheduler are copied. card: the text of README.md. beside: {name: path} of files to copy beside it. Everything
    is written under another name and then renamed: a killed export leaves nothing half-written. An earlier export at
    `out` is replaced. Raises ValueError if `out` is anything else or holds `source`, if `source` belongs to no family,
    if parameters and configuration do not fit, or if a number is too large for its dtype."""
    out = Path(out).absolute()
    check_replaceable(out, source)
    family = source.family
    with files.whole_folder(out) as new:
        for part in family.parts:
            if part in parts:
                config, params = parts[part]
                tensors = cast(keys.to_tensors(params), dtype, part)
            else:
                config, tensors = source.config(part), cast(source.tensors(part), source_dtype, part)
            # There and back: the written tensors fit their configuration and have current names.
            params = keys.from_tensors(tensors, families.shapes(part, config), f"{part} of {source.path}")
            _write_part(new / part, part, config, keys.to_tensors(params))
        files.write_json(new / "scheduler" / CONFIGS["scheduler"], source.config("scheduler"))
        write_tokenizer(source, new)
        made = source.replace({part: config for part, (config, _) in parts.items()}, {})
        files.write_json(new / "model_index.json", _model_index(made))
        for name, path in (beside or {}).items():
            shutil.copyfile(path, new / name)
        if card is not None:
            files.write_text(new / "README.md", card)
    return out


def write_tokenizer(source: Folder, out: Path) -> None:
    """Writes its tokenizers and adds missing files: transformers 5 writes tokenizer.json, 4 reads the other ones."""
    for field in source.family.captions.values():
        _write_tokenizer(source, field, Path(out) / families.TOKENIZERS[field])


def _write_tokenizer(source: Folder, field: str, folder: Path) -> None:
    if folder.name in source.readers:
        source.tokenizers[field].save_pretrained(folder)
    else:
        files.copy_plain(source.tokenizer_folder(field), folder)
    if not (folder / "vocab.json").is_file() or not (folder / "merges.txt").is_file():
        content = files.read_json(folder / "tokenizer.json")
        vocab = content["model"]["vocab"] | {token["content"]: token["id"] for token in content["added_tokens"]}
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in content["model"]["merges"]]
        (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    file = folder / "tokenizer_config.json"
    config = files.read_json(file) if file.is_file() else {"tokenizer_class": "CLIPTokenizer"}
    if (config.get("model_max_length") or NO_LIMIT) >= NO_LIMIT:
        tokens = {} if file.is_file() else source.tokenizers[field].special_tokens_map
        files.write_json(file, config | tokens | {"model_max_length": source.text_length})


def write_padding_tokenizer(source: Folder, field: str, out: Path) -> str:
    """Writes the tokenizer of `field` to a file in `out` whose ids are those of `Folder.tokenize`; returns its name."""
    tokenizer = source.tokenizers[field]
    tokenizer([""], padding="max_length", max_length=source.text_length, truncation=True)  # sets both in what is saved
    name = f"{families.TOKENIZERS[field]}.json"
    tokenizer.backend_tokenizer.save(str(Path(out) / name))
    return name


def check_replaceable(out: Path, source: Folder) -> None:
    """Raises ValueError if `out` is in use and no earlier export, or holds `source`."""
    files.check_replaceable(out, (out / "model_index.json").is_file() and not (out / "checkpoints").exists())
    path = source.path.absolute()
    if path.resolve().is_relative_to(out.resolve()):
        raise ValueError(f"writing {out} would replace its source {path}: choose a new folder")


def cast(tensors: dict[str, np.ndarray], dtype, part: str) -> dict[str, np.ndarray]:
    """The tensors of a part in `dtype` (None: unchanged). Raises ValueError if a number is too large for it."""
    if dtype is None:
        return tensors
    try:
        with np.errstate(over="raise"):
            return {key: x.astype(dtype) for key, x in tensors.items()}
    except FloatingPointError:
        raise ValueError(f"{part} has numbers too large for {np.dtype(dtype)}: export as float32") from None


def _write_part(folder: Path, part: str, config: dict, tensors: dict[str, np.ndarray]) -> None:
    row = families.PARTS[part]
    config = {key: value for key, value in config.items() if not key.startswith("_")}
    if row.library == "transformers":
        own = {"architectures": [row.class_name], "model_type": "clip_text_model"}
        # transformers 5 loads in the dtype given here; diffusers loads the UNet in float32, whatever is stored.
        config = {key: value for key, value in config.items() if key not in ("dtype", "quantization_config")}
        config = own | config | own | {"torch_dtype": "float32"}
    else:
        config = {"_class_name": row.class_name} | config
    folder.mkdir(parents=True)
    files.write_json(folder / "config.json", config)
    save_file(tensors, folder / f"{row.stem}.safetensors", metadata={"format": "pt"})


def _model_index(source: Folder) -> dict:
    family = source.family
    kept = ("_diffusers_version", families.ZEROS)
    index = {"_class_name": source.pipeline, "_diffusers_version": VERSION}
    index |= {DRAWN_WITH: source.guidance, **family.index}
    index |= {QUANTIZED: source.quantization._asdict()} if source.quantization else {}
    index |= {key: value for key, value in source.index.items() if key in kept}
    rows = {part: families.PARTS[part] for part in source.parts}
    index |= {part: [row.library, row.class_name] for part, row in rows.items()}
    scheduler = source.config("scheduler").get("_class_name") or source.index["scheduler"][-1]
    index["scheduler"] = ["diffusers", scheduler.removeprefix("Flax")]
    tokenizers = (families.TOKENIZERS[field] for field in family.captions.values())
    return index | {name: ["transformers", "CLIPTokenizer"] for name in tokenizers}
