"""Finds a model: a pipeline folder or a single file on disk, or a hub id (owner/name), downloaded once."""

import difflib
import os
import re
from pathlib import Path

from flaxkd.pretrained import tensors
from flaxkd.pretrained.families import PARTS, TOKENIZERS, published

EMBEDDED = Path(__file__).parents[1] / "assets" / "teacher"  # the miniature in the package
MINIATURES = {"miniature_xl": EMBEDDED.with_name("teacher_xl")}  # further ones, by name
HUB_ID = r"\w[\w.-]*/\w[\w.-]*"

# Patterns of the files to download.
PIPELINE = [
    *("model_index.json", "README.md"),
    *(f"{folder}/*.txt" for folder in TOKENIZERS.values()),
    *(f"{part}/*.json" for part in (*PARTS, "scheduler", *TOKENIZERS.values())),
    *(f"{part}/*.safetensors" for part in PARTS),
]
AUTOENCODER = ["config.json", f"{PARTS['vae'].stem}*.safetensors", "vae/*.json", "vae/*.safetensors"]


def resolve(model: str | os.PathLike | None) -> Path:
    """The pipeline folder of `model`: a folder, a hub id (owner/name), or None for the embedded teacher.

    A name in MINIATURES is another embedded teacher, unless there is a folder of that name.

    The small files and the safetensors of a hub id are downloaded into huggingface_hub's store, or reused from there;
    HF_HUB_OFFLINE and HF_HOME are honoured. The address of a model's page is taken as its id. A folder beside existing
    ones is never taken for an id. Raises FileNotFoundError with the remedy if the folder, its model_index.json or the
    network is missing, and ValueError if the hub has a part only as a pickle.
    A file is returned as it is, whatever it holds. It may also be on the hub: owner/name/file.safetensors."""
    if model is None:
        folder, origin = EMBEDDED, "the embedded teacher"
    elif _path(model).is_file():
        return _path(model)
    elif _path(model).is_dir():
        folder, origin = _path(model), "a pipeline folder of diffusers"
    elif model in MINIATURES:
        folder, origin = MINIATURES[model], "an embedded teacher"
    elif file := _hub_file(str(model)):
        return _download(file[0], [file[1]]) / file[1]
    elif hub_id := _hub_id(str(model)):
        folder, origin = _download(hub_id), f"hub id {hub_id}"
    else:
        raise FileNotFoundError(_no_folder(str(model)))
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(
            f"{folder} has no model_index.json, so it is not {origin}. Give the folder that holds unet/, "
            "vae/, text_encoder/, tokenizer/ and scheduler/, not one of these."
        )
    return folder


def embedded(path: Path) -> tuple[bool, str | None]:
    """(whether a folder is an embedded teacher, the name that stands for it: None or one in MINIATURES)."""
    names = {folder.resolve(): name for name, folder in {None: EMBEDDED, **MINIATURES}.items()}
    return path.resolve() in names, names.get(path.resolve())


def resolve_vae(vae: str | os.PathLike) -> Path:
    """The folder with an autoencoder's config.json, or the file with one: a path, or a hub id (owner/name).

    A whole pipeline stands for the autoencoder in it. Raises FileNotFoundError with the remedy."""
    path = _path(vae)
    if path.is_file():
        ours = path.name.startswith(PARTS["vae"].stem) and (path.parent / "config.json").is_file()
        return path.parent if ours else path
    if not path.is_dir():
        if file := _hub_file(str(vae)):
            return _download(file[0], [file[1]]) / file[1]
        if (hub_id := _hub_id(str(vae))) is None:
            raise FileNotFoundError(_no_folder(str(vae), "a folder or file with an autoencoder"))
        path = _download(hub_id, AUTOENCODER)
    folder = path / "vae" if (path / "vae" / "config.json").is_file() else path
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{path} has no config.json and no vae/config.json, so there is no autoencoder in it")
    return folder


def _hub_id(model: str) -> str | None:
    """The hub id that `model` is or that its address holds; None for what can only be a folder, such as runs/smal."""
    page = re.fullmatch(r"(?:https?://)?(?:huggingface\.co|hf\.co)/([^/]+/[^/]+)(?:/tree/main)?/?", model)
    hub_id = page[1] if page else model
    here = Path(hub_id).parent.is_dir() and not page and published(hub_id) is None
    return hub_id if re.fullmatch(HUB_ID, hub_id) and not here and not _is_weights(hub_id) else None


def _hub_file(model: str) -> tuple[str, str] | None:
    """(hub id, file) of a single file on the hub, or of its address; None for what can only be a file here."""
    page = r"(?:https?://)?(?:huggingface\.co|hf\.co)/"
    found = re.fullmatch(rf"({page})?({HUB_ID})/(?:(?:blob|resolve)/main/)?(.+\.safetensors)(?:\?.*)?", model)
    return None if found is None or (not found[1] and Path(found[2]).is_dir()) else (found[2], found[3])


def _is_weights(path: str | Path) -> bool:
    return str(path).lower().endswith((".safetensors", *tensors.PICKLES))


def _path(model: str | os.PathLike) -> Path:
    return Path(os.path.expanduser(model))  # that of pathlib raises an error for an unknown user


def _no_folder(model: str, wanted: str = "a pipeline folder of diffusers, the one with model_index.json in it") -> str:
    """The message for a folder or file that does not exist, with its neighbours of a similar name."""
    kind = "file" if _is_weights(model) else "folder"
    path = _path(model.replace("\\", "/"))
    known = path.absolute().parent
    shown = lambda x: (x.is_dir() or _is_weights(x)) and not x.name.startswith(".")
    siblings = [x.name for x in known.iterdir() if shown(x)] if known.is_dir() else []
    text = f"there is no {kind} {_path(model).absolute()}, and {model!r} is not a hub id (owner/name) either."
    if known.is_dir() and re.fullmatch(HUB_ID, model) and kind == "folder":
        text = (
            f"there is no folder {path.name} in {known}, and beside a folder {path.parent} {model!r} is not taken for "
            f"a hub id: if it is one, give https://huggingface.co/{model}."
        )
    if near := [path.name] if path.is_dir() else difflib.get_close_matches(path.name, siblings, n=3):
        text += f" Did you mean {' or '.join(str(path.with_name(name)) for name in near)}?"
    return f"{text} Give {wanted}."


def _download(hub_id: str, wanted: list[str] = PIPELINE) -> Path:
    """The folder of a hub id, with the files of these patterns.

    Of each part the full weights are downloaded, or a variant if there is nothing else."""
    from huggingface_hub import HfApi, snapshot_download  # slow to import, and rarely needed

    ignored = [f"*{variant}*" for variant in tensors.VARIANTS if not any(variant in name for name in wanted)]
    try:
        path = Path(snapshot_download(hub_id, allow_patterns=wanted, ignore_patterns=ignored, etag_timeout=5))
        places = sorted({os.path.dirname(name) for name in wanted if name.endswith(".safetensors")})
        bare = [x for x in places if (path / x / "config.json").is_file() and not any((path / x).glob("*.safetensors"))]
        names = HfApi().list_repo_files(hub_id) if bare else []
        if variants := [name for place in bare for name in _variant(place, names)]:
            snapshot_download(hub_id, allow_patterns=variants, etag_timeout=5)
    except Exception as error:  # from hub, network, proxy or disk: the remedy is the same
        raise FileNotFoundError(
            f"{hub_id} is no folder here, and could not be downloaded from the hub:\n"
            f"  {type(error).__name__}: {str(error).strip().splitlines()[0]}\n"
            f"Without network: run `hf download {hub_id} --local-dir DIR` on another machine, copy DIR here, "
            "and pass DIR. If the repository is private or gated, log in with `hf auth login` first."
        ) from error
    bare = [place for place in bare if not _variant(place, names)]
    pickles = [name for name in names if os.path.dirname(name) in bare and name.endswith(tensors.PICKLES)]
    if pickles:
        what = " and ".join(place or "weights" for place in bare)
        raise ValueError(
            f"{hub_id} has its {what} only as a pickle ({', '.join(pickles)}), not opened as it can run code. Save the "
            f"model as safetensors:\n{tensors.RESAVE.format(model=hub_id)}"
        )
    return path


def _variant(place: str, names: list[str]) -> list[str]:
    """The files of the best variant of the network in a folder, among all names of a repository."""
    here = [name for name in names if os.path.dirname(name) == place and name.endswith((".safetensors", ".json"))]
    of = {variant: [name for name in here if f".{variant}" in name] for variant in tensors.VARIANTS}
    return next((some for some in of.values() if any(name.endswith(".safetensors") for name in some)), [])
