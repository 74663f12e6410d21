"""What is damaged, and what must hold then.

A target writes an input once. For every case a copy is damaged in one place and read as the commands read it. Reading
may succeed, or raise an error of `command.REPORTED` whose message names the file, the folder or the setting. Whatever
is read must be right: a sample whose bytes are untouched is there or reported, and no picture has another's caption.
"""

import dataclasses
import hashlib
import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from PIL import Image

from flaxkd.data import loader, records, sources
from flaxkd.diffusion import samplers
from flaxkd.machine import command, configuration, files, sharding
from flaxkd.pretrained import Folder
from flaxkd.training import checkpoint, settings
from flaxkd.training.step import init_state
from tests import tiny
from tests.data import image_sets
from tests.fuzz import mutations

N = image_sets.N
CAPTIONS = [f"picture {i} {hashlib.sha256(bytes([i])).hexdigest()[:16]}" for i in range(N)]  # no damage makes another's


class Wrong(Exception):
    """What was read is not what was written."""


@dataclasses.dataclass(frozen=True)
class Target:
    """write(folder): the input. use(folder, scratch, victim): reads it, where `victim` is damaged; raises Wrong.

    victims: patterns of the files that may be damaged. damage(content, rng) -> content. named(victim): what a refusal
    may name, besides its file and folder."""

    write: Callable[[Path], object]
    use: Callable[[Path, Path, Path], None]
    victims: tuple[str, ...] = ("**/*",)
    damage: Callable[[bytes, np.random.Generator], bytes] = mutations.damage
    named: Callable[[Path], tuple[str, ...]] = lambda victim: ()


def case(target: Target, pristine: Path, scratch: Path, rng: np.random.Generator) -> str:
    """Damages a copy of the input and reads it. Returns "read", or the message of the refusal.

    Raises Wrong, and any error that a command would show as a traceback."""
    folder = scratch / "input"
    victims = sorted(path for pattern in target.victims for path in pristine.glob(pattern) if path.is_file())
    chosen = victims[rng.integers(len(victims))].relative_to(pristine)
    for path in sorted(pristine.rglob("*")):
        copy = folder / path.relative_to(pristine)
        copy.mkdir(parents=True, exist_ok=True) if path.is_dir() else _link(path, copy)
    victim = folder / chosen
    victim.unlink()
    victim.write_bytes(target.damage((pristine / chosen).read_bytes(), rng))
    try:
        target.use(folder, scratch, victim)
    except command.REPORTED as error:
        message = str(error)
        if not any(name in message for name in (victim.name, str(folder), str(scratch), *target.named(victim))):
            raise Wrong(f"a refusal that names no file: {message}") from error
        return message
    return "read"


def _link(path: Path, copy: Path) -> None:
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.hardlink_to(path)  # only the victim differs, and it is written anew


# -- Image sets ------------------------------------------------------------------------------------------------------


def _tokenize(captions: list[str]) -> dict[str, np.ndarray]:
    return {"input_ids": np.zeros((len(captions), 4), np.int32)}


def _cached(folder: Path, scratch: Path, victim: Path) -> None:
    """As flaxkd.cache reads it."""
    made = image_sets.make(folder, scratch / "cache", tokenize=_tokenize)
    found = {split: image_sets.contents(scratch / "cache", split) for split in ("train", "validation")}
    _check({caption: m for split in found.values() for caption, (m, _) in split.items()}, victim, made["skipped"])


def _trained_on(folder: Path, scratch: Path, victim: Path) -> None:
    """As flaxkd.train reads it."""
    found = {}
    for split in ("train", "validation"):
        source = sources.open_source(str(folder), split, resolution=8)
        moments = lambda images: {"moments": image_sets.encode(images)}
        options = {"encode": moments, "tokenize": _tokenize, "batch_size": 4}
        cache = records.ensure(source, scratch / "cache", **options, fingerprint="vae", progress=False)
        reader = loader.Records(cache)
        found |= dict(zip(reader.captions(N), reader.examples(N)[0]["moments"], strict=True))
    _check(found, victim, None)


def _check(found: dict[str, np.ndarray], victim: Path, skipped: dict | None) -> None:
    """Raises Wrong. found: {caption: moments}. skipped: what was reported; None where a log has it."""
    content = victim.read_bytes()
    missing = [c for i, c in enumerate(CAPTIONS) if c not in found and c.encode() in content and not _is(victim, i)]
    if skipped == {} and len(missing) > len(found.keys() - {*CAPTIONS}):  # damaged captions are there, as other texts
        raise Wrong(f"{missing} are lost without a word")
    for i, caption in enumerate(CAPTIONS):
        if caption not in found or content.count(caption.encode()) > 1 or _is(victim, i):
            continue  # the damage itself may have given the caption to another picture
        line = next((line for line in content.splitlines() if caption.encode() in line), b"")
        if victim.stem == "metadata" and not re.search(rb'(file_name": "|^)%d\.\w' % i, line):
            continue  # nor does a list lie that names another file
        left, right = (255 * float(found[caption][0, side, 0]) for side in (0, 1))
        of = [k for k in range(N) if abs(left - k) < 0.3 and abs(right - k // 2) < 0.3]
        if i not in of and of:
            raise Wrong(f"{caption!r} has the picture {of[0]}")


def _is(victim: Path, i: int) -> bool:
    """Whether the victim is the picture or the caption of this sample."""
    return victim.stem in (str(i), f"{i:09}")


def _pictures(folder: Path) -> None:
    """A folder of pictures in all formats."""
    image_sets.listed(folder)
    formats = ("png", "jpg", "webp", "gif", "bmp", "tiff", "avif")
    rows = []
    for i, caption in enumerate(CAPTIONS):
        (folder / f"{i}.png").unlink()
        name = f"{i}.{formats[i % len(formats)]}"
        with Image.open(io.BytesIO(image_sets.picture(i))) as image:
            image.save(folder / name, quality=100, lossless=True)
        rows.append(json.dumps({"file_name": name, "text": caption}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(rows))


def _beside(folder: Path) -> None:
    folder.mkdir()
    for i, caption in enumerate(CAPTIONS):
        (folder / f"{i}.png").write_bytes(image_sets.picture(i))
        (folder / f"{i}.txt").write_text(caption)


# -- Caches, pipelines, checkpoints ------------------------------------------------------------------------------------


def _finished_cache(folder: Path) -> None:
    source = folder.with_name("pictures")
    image_sets.make(image_sets.listed(source), folder)


def _read_cache(folder: Path, scratch: Path, victim: Path) -> None:
    for split in ("train", "validation"):
        reader = loader.Records(sources.open_source(str(folder), split, resolution=8).cache)
        next(reader.batches(4, seed=0))
        reader.examples(N)


def _pipeline(folder: Path, scratch: Path, victim: Path) -> None:
    opened = Folder.open(folder)
    for part in opened.parts:
        opened.params(part)
    opened.tokenize(["red apple"])
    opened.latent_shape()


def _drawn_with(folder: Path, scratch: Path, victim: Path) -> None:
    """As the commands that draw read a scheduler."""
    config = Folder.open(folder).config("scheduler")
    for kind in (samplers.own(config), *samplers.KINDS):
        samplers.schedule(kind, config, 5)


def _states(step: int):
    rng = np.random.default_rng(step)
    params = {"unet": {name: rng.standard_normal((30, 10)).astype(np.float32) for name in ("kernel", "other")}}
    return init_state(params, optax.adamw(1e-3), True)._replace(step=jnp.int32(step))


def _two_checkpoints(folder: Path) -> None:
    manager = checkpoint.manager(folder, keep=3)
    for step in (1, 2):
        checkpoint.save(manager, _states(step), {"position": step})
        checkpoint.wait(manager)
    manager.close()


def _resume(folder: Path, scratch: Path, victim: Path) -> None:
    like = jax.eval_shape(lambda: _states(1))
    manager = checkpoint.manager(folder, keep=3)
    restored = checkpoint.restore(manager, like, sharding.params(sharding.make_mesh(-1, 1), like))
    manager.close()
    if restored is None:
        raise Wrong("a run begins anew although it has checkpoints")
    state, position = restored
    if int(state.step) not in (1, 2):
        raise Wrong(f"resumed at step {state.step}, position {position}")


def _typed(victim: Path) -> list[str]:
    return victim.read_text(encoding="utf-8").split("\n")


def _configured(folder: Path, scratch: Path, victim: Path) -> None:
    """As flaxkd.train reads it, up to where the teacher is opened."""
    settings.check(configuration.configuration("configs/small.py", _typed(victim)))


TARGETS = {
    "metadata": Target(image_sets.listed, _trained_on, ("metadata.jsonl",)),
    "metadata of a cache": Target(image_sets.listed, _cached, ("metadata.jsonl",)),
    "csv": Target(lambda folder: image_sets.listed(folder, "metadata.csv"), _cached, ("metadata.csv",)),
    "pictures": Target(_pictures, _trained_on, ("[0-9]*",)),
    "pictures of a cache": Target(_pictures, _cached, ("[0-9]*",)),
    "captions beside pictures": Target(_beside, _cached),
    "tar": Target(image_sets.tars, _cached, ("*.tar",)),
    "parquet": Target(image_sets.img2dataset_parquet, _cached),
    "arrow": Target(image_sets.saved_to_disk, _cached),
    "cache": Target(_finished_cache, _read_cache, ("*.json", "train/*", "validation/*")),
    "pipeline": Target(tiny.write, _pipeline),
    "safetensors": Target(tiny.write, _pipeline, ("*/*.safetensors",)),
    "configurations": Target(tiny.write, _pipeline, ("*.json", "*/*.json"), mutations.damage_json),
    "schedulers": Target(
        tiny.write,
        _drawn_with,
        ("scheduler/*.json",),
        mutations.damage_json,
        lambda victim: (*files.read_json(victim), *samplers.KINDS, "steps"),
    ),
    "overrides": Target(
        lambda folder: files.write_text(folder / "overrides", "\n".join(settings.RULES)),
        _configured,
        damage=mutations.override,
        named=lambda victim: tuple(word.split("=")[0].removeprefix("--config.") for word in _typed(victim)),
    ),
    "checkpoint": Target(_two_checkpoints, _resume, ("checkpoints/2/**/*",)),
}
