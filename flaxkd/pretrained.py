"""Pipeline folders of diffusers: where they are, what is in them, and how one is written.

    model_index.json    unet/ vae/ text_encoder/ (config.json, *.safetensors)    tokenizer/    scheduler/

Reading and writing need neither torch nor diffusers. Weights are read from safetensors only, since a pickle
can run code.
"""

import functools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from flaxkd import keys
from flaxkd.models.clip import CLIPTextConfig, CLIPTextModel
from flaxkd.models.unet import UNet2DCondition, UNetConfig
from flaxkd.models.vae import AutoencoderKL, VAEConfig

EMBEDDED = Path(__file__).parent / "assets" / "teacher"

MODELS = {
    "unet": (UNet2DCondition, UNetConfig),
    "vae": (AutoencoderKL, VAEConfig),
    "text_encoder": (CLIPTextModel, CLIPTextConfig),
}
CLASSES = {
    "unet": ("diffusers", "UNet2DConditionModel"),
    "vae": ("diffusers", "AutoencoderKL"),
    "text_encoder": ("transformers", "CLIPTextModel"),
}
STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
CONFIGS = dict.fromkeys(MODELS, "config.json") | {"scheduler": "scheduler_config.json"}

RESAVE = """\
    # in an environment with torch, diffusers and transformers, and only if you trust where it comes from
    from diffusers import StableDiffusionPipeline
    pipeline = StableDiffusionPipeline.from_pretrained("{folder}", use_safetensors=False, safety_checker=None)
    pipeline.save_pretrained("NEW_FOLDER", safe_serialization=True)
then pass NEW_FOLDER. (For a single .ckpt file, from_single_file takes the place of from_pretrained.)"""


def resolve(model: str | os.PathLike | None) -> Path:
    """The pipeline folder of `model`: None is the embedded one, else it is a folder or a hub id (owner/name).

    Of a hub id, the small files and the safetensors are downloaded into the cache of huggingface_hub, or
    taken from there; HF_HUB_OFFLINE and HF_HOME are honoured. Raises FileNotFoundError with the remedy if
    there is no such folder, no model_index.json in it, or no network."""
    if model is None:
        folder, origin = EMBEDDED, "the embedded teacher"
    elif Path(model).expanduser().is_dir():
        folder, origin = Path(model).expanduser(), "a pipeline folder of diffusers"
    elif re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(model)):
        folder, origin = _download(str(model)), f"hub id {model}"
    else:
        raise FileNotFoundError(
            f"there is no folder {Path(model).expanduser().absolute()}, and {str(model)!r} is not a hub id "
            "(owner/name) either. Give a pipeline folder of diffusers, the one with model_index.json in it."
        )
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(
            f"{folder} has no model_index.json, so it is not {origin}. Give the folder that holds unet/, "
            "vae/, text_encoder/, tokenizer/ and scheduler/, not one of these."
        )
    return folder


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download  # slow to import, and rarely needed

    wanted = ["model_index.json", "README.md", "tokenizer/*.txt"]
    wanted += [f"{part}/*.json" for part in (*CONFIGS, "tokenizer")]
    wanted += [f"{part}/*.safetensors" for part in MODELS]
    try:
        path = snapshot_download(
            hub_id, allow_patterns=wanted, ignore_patterns=["*fp16*", "*non_ema*"], etag_timeout=5
        )
    except Exception as error:  # of hub, network, proxy or disk: the remedy is the same
        raise FileNotFoundError(
            f"{hub_id} is no folder here, and could not be downloaded from the hub:\n"
            f"  {type(error).__name__}: {str(error).strip().splitlines()[0]}\n"
            f"Without network: run `hf download {hub_id} --local-dir DIR` on another machine, copy DIR here, "
            "and pass DIR. If the repository is private or gated, log in with `hf auth login` first."
        ) from error
    return Path(path)


def read_config(folder: Path, part: str) -> dict:
    """The json of unet, vae, text_encoder or scheduler. Raises FileNotFoundError naming the file."""
    path = Path(folder) / part / CONFIGS[part]
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {folder} is not a whole pipeline folder of diffusers")
    return json.loads(path.read_text())


def read_tensors(folder: Path, part: str) -> dict[str, np.ndarray]:
    """The tensors {key: array} of unet, vae or text_encoder, in the dtypes of the file.

    Reads one safetensors file, or the several that an index lists, or else a half-precision variant. Raises
    ValueError if there is only a pickle, and FileNotFoundError if there is nothing, both with the remedy."""
    tensors = {}
    for path in _weight_files(Path(folder), part):
        try:
            with safe_open(path, framework="np") as file:
                tensors |= {key: file.get_tensor(key) for key in file.keys()}
        except Exception as error:  # SafetensorError derives from Exception alone
            raise ValueError(f"{path} cannot be read: {error}. Was it downloaded whole?") from error
    return tensors


def _weight_files(folder: Path, part: str) -> list[Path]:
    where, stem = folder / part, STEMS[part]
    index = where / f"{stem}.safetensors.index.json"
    if (single := where / f"{stem}.safetensors").is_file():
        return [single]
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        absent = [name for name in names if not (where / name).is_file()]
        if absent:
            raise FileNotFoundError(f"{index} lists files that are missing: {', '.join(absent)}")
        return [where / name for name in names]
    if (half := where / f"{stem}.fp16.safetensors").is_file():
        return [half]
    pickles = [p.name for ending in ("bin", "ckpt", "pt", "pth") for p in sorted(where.glob(f"*.{ending}"))]
    error, problem = FileNotFoundError, f"no {stem}.safetensors"
    if pickles:
        error, problem = ValueError, f"only a pickle ({', '.join(pickles)}), not opened as it can run code"
    raise error(f"{where} has {problem}. Save the model as safetensors:\n{RESAVE.format(folder=folder)}")


def build(part: str, config: dict, dtype=jnp.float32, **kwargs):
    """The module of unet, vae or text_encoder for its config.json; `dtype` is that of the compute.

    Raises ValueError naming what the configuration asks for and flaxkd does not have."""
    module, config_class = MODELS[part]
    return module(config_class.from_dict(config), dtype=dtype, **kwargs)


def shapes(module, part: str) -> dict:
    """The parameters of a module as a nested dict of jax.ShapeDtypeStruct, float32: no memory, no compute."""
    return jax.tree.map(lambda x: x, _shapes(part, module.config))


@functools.lru_cache(maxsize=16)  # tracing a UNet takes seconds
def _shapes(part: str, c) -> dict:
    of = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype)
    if part == "unet":
        size = 2 ** (len(c.block_out_channels) - 1)
        inputs = [of(1, size, size, c.in_channels), of(1), of(1, 1, c.cross_attention_dim)]
        if c.addition_embed_type == "text_time":
            pooled = c.projection_class_embeddings_input_dim - 6 * c.addition_time_embed_dim
            inputs += [of(1, pooled), of(1, 6)]
    elif part == "vae":
        inputs = [of(1, c.factor, c.factor, c.in_channels)]
    else:
        inputs = [of(1, 1, dtype=jnp.int32)]
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.eval_shape(MODELS[part][0](c).init, key, *inputs)["params"]


def load(folder: Path, part: str, dtype=None, **kwargs) -> tuple:
    """(module, params) of unet, vae or text_encoder; `dtype` (None: float32) is that of compute and params.

    params: nested dict of C-contiguous numpy arrays. `kwargs` go to the module.
    Raises FileNotFoundError and ValueError like `read_tensors`, `build` and `keys.from_tensors`."""
    dtype = jnp.float32 if dtype is None else dtype
    module = build(part, read_config(folder, part), dtype, **kwargs)
    params = keys.from_tensors(read_tensors(folder, part), shapes(module, part), f"{folder}/{part}")
    return module, jax.tree.map(lambda x: np.ascontiguousarray(x, dtype), params)


def load_tokenizer(folder: Path):
    """The CLIPTokenizer of a pipeline folder (needs no torch). Raises FileNotFoundError if there is none."""
    path = Path(folder) / "tokenizer"
    if not (path / "tokenizer.json").is_file() and not (path / "vocab.json").is_file():
        raise FileNotFoundError(f"{path} has neither vocab.json nor tokenizer.json: copy the model's there")
    os.environ.setdefault(
        "TRANSFORMERS_NO_ADVISORY_WARNINGS", "1"
    )  # that there is no torch is as it should be
    from transformers import CLIPTokenizer  # a second of import, of which drawing and training need one

    return CLIPTokenizer.from_pretrained(path, local_files_only=True)


def tokenize(tokenizer, captions: Sequence[str]) -> np.ndarray:
    """int32[n, model_max_length]: start, tokens, end, padded and cut as diffusers' pipelines do."""
    length = tokenizer.model_max_length
    ids = tokenizer(list(captions), padding="max_length", max_length=length, truncation=True)["input_ids"]
    return np.asarray(ids, np.int32).reshape(-1, length)


def save(
    out: Path,
    *,
    source: Path,
    parts: Mapping[str, tuple[dict, dict]],
    dtype=None,
    card: str | None = None,
    files: Mapping[str, Path] | None = None,
) -> Path:
    """Writes a whole pipeline folder that StableDiffusionPipeline.from_pretrained loads; returns `out`.

    parts: {part: (config.json as a dict, params)} of those that are new, written as `dtype` (None: as they
    are). The others of unet, vae and text_encoder come from the pipeline folder `source` in their own dtype,
    under today's names; tokenizer and scheduler are copied. card: the text of README.md. files: {name: path}
    of what is laid beside it. All is written under another name and then renamed: an export that is killed
    leaves nothing half-written. An older export at `out` is replaced. Raises ValueError if `out` is anything
    else, or holds `source`, if parameters and configuration do not fit, or if a number is too large for
    `dtype`."""
    out, source = Path(out).absolute(), Path(source).absolute()
    _check_replaceable(out, source)
    index = json.loads((source / "model_index.json").read_text())
    kind = index.get("_class_name", "")
    if "text_encoder_2" in index or not kind.startswith("StableDiffusion"):
        raise ValueError(f"{source} is a {kind}, and flaxkd writes folders for StableDiffusionPipeline only")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
        new = Path(scratch) / "new"
        for part in MODELS:
            if part in parts:
                config, params = parts[part]
                tensors = _cast(keys.to_tensors(params), dtype, part)
            else:
                config, tensors = read_config(source, part), read_tensors(source, part)
            # There and back: what is written fits its configuration and has today's names.
            params = keys.from_tensors(tensors, shapes(build(part, config), part), f"{part} of {source}")
            _write_part(new / part, part, config, keys.to_tensors(params))
        shutil.copytree(source / "scheduler", new / "scheduler")
        copy_tokenizer(source, new)
        _write_json(new / "model_index.json", _model_index(index))
        for name, path in (files or {}).items():
            shutil.copyfile(path, new / name)
        if card is not None:
            (new / "README.md").write_text(card)
        if out.exists():
            out.rename(Path(scratch) / "old")
        new.rename(out)
    return out


def copy_tokenizer(source: Path, out: Path) -> None:
    """Copies tokenizer/ with all its files: transformers 5 writes tokenizer.json, 4 reads the other two."""
    folder = shutil.copytree(Path(source) / "tokenizer", Path(out) / "tokenizer")
    if (folder / "vocab.json").is_file():
        return
    content = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    vocab = content["model"]["vocab"] | {token["content"]: token["id"] for token in content["added_tokens"]}
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in content["model"]["merges"]]
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")


def _check_replaceable(out: Path, source: Path) -> None:
    earlier = (out / "model_index.json").is_file() and not (out / "checkpoints").exists()
    if out.exists() and not earlier and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out} exists and is not an earlier export: choose a new folder")
    if source.resolve().is_relative_to(out.resolve()):
        raise ValueError(f"writing {out} would replace {source}, which it is made from: choose a new folder")


def _cast(tensors: dict[str, np.ndarray], dtype, part: str) -> dict[str, np.ndarray]:
    try:
        with np.errstate(over="raise"):
            return {key: x.astype(x.dtype if dtype is None else dtype) for key, x in tensors.items()}
    except FloatingPointError:
        raise ValueError(f"{part} has numbers too large for {np.dtype(dtype)}: export as float32") from None


def _write_part(folder: Path, part: str, config: dict, tensors: dict[str, np.ndarray]) -> None:
    config = {key: value for key, value in config.items() if not key.startswith("_")}
    if part == "text_encoder":
        config = {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model"} | config
        # transformers 5 loads in the dtype that it finds here, diffusers the UNet in float32 whatever is stored.
        config = {key: value for key, value in config.items() if key != "dtype"} | {"torch_dtype": "float32"}
    else:
        config = {"_class_name": CLASSES[part][1]} | config
    folder.mkdir(parents=True)
    _write_json(folder / "config.json", config)
    save_file(tensors, folder / f"{STEMS[part]}.safetensors", metadata={"format": "pt"})


def _model_index(source: dict) -> dict:
    index = {key: value for key, value in source.items() if key == "_diffusers_version"}
    index |= {"_class_name": "StableDiffusionPipeline", "requires_safety_checker": False}
    index |= {name: [None, None] for name in ("feature_extractor", "image_encoder", "safety_checker")}
    index |= {part: list(names) for part, names in CLASSES.items()}
    return index | {"scheduler": source["scheduler"], "tokenizer": ["transformers", "CLIPTokenizer"]}


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
