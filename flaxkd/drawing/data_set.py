"""A data set that a model draws: pictures with their captions, in a folder that can be trained on.

    000000.png 000001.png ...   picture i is of prompt i, from noise that depends on the seed and on i alone
    settings.json               what they were drawn with: prompts, weights of the model, sampler
    metadata.jsonl              their captions

They are counted, and the missing ones are drawn: a folder serves any number of runs, and a run that was stopped goes
on. Other settings are refused.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from flaxkd.data import encoding, pictures, sources
from flaxkd.diffusion import samplers
from flaxkd.drawing import batches, resumable
from flaxkd.drawing.pipeline import Pipeline
from flaxkd.machine import files, hosts


class How(NamedTuple):
    """What pictures are drawn with. sampler, steps, guidance: None for those of the model."""

    resolution: int  # pixels a side
    seed: int
    sampler: str | None = None
    steps: int | None = None
    guidance: float | None = None


def check(place: Path, instead: str) -> None:
    """Raises ValueError, with what to do instead, for a folder with pictures or captions that flaxkd did not draw."""
    if not place.is_dir() or (place / resumable.SETTINGS).is_file():
        return
    own = sum(pictures.is_picture(file.name) for file in place.iterdir())
    if own or (place / sources.METADATA).exists():
        found = f"{own} pictures" if own else sources.METADATA
        raise ValueError(f"{place} has {found} that flaxkd did not draw: {instead}")


def draw(
    place: Path, prompts: Sequence[str], pipeline: Pipeline, how: How, about: dict[str, Any], *, remedy: str, words: str
) -> list[Path]:
    """Draws the missing pictures of this process's share, and returns the paths of all pictures, in order.

    about: what settings.json says of the prompts. remedy: for a folder with other settings. words: "class pictures",
    for messages. Processes share `place`. Raises ValueError if it holds pictures drawn with other settings."""
    folder = pipeline.folder
    scheduler = folder.config("scheduler")
    kind = how.sampler or samplers.own(scheduler)
    steps = how.steps or samplers.usual_steps(kind, scheduler)
    guidance = folder.guidance if how.guidance is None else how.guidance
    schedule, shape = samplers.schedule(kind, scheduler, steps), folder.latent_shape(how.resolution)
    made = {**about, "model": str(folder.path), "weights": resumable.fingerprint(pipeline.params, folder)}
    made |= {"sampler": kind, "steps": steps, "guidance": guidance, "seed": how.seed}
    made |= {"pixels": how.resolution, "dtype": np.dtype(pipeline.modules["unet"].dtype).name}
    if hosts.is_first():
        place.mkdir(parents=True, exist_ok=True)
        differ = f"holds {words} drawn with other settings"
        files.claim(place / resumable.SETTINGS, made, differ=differ, remedy=remedy, free=("model",))
    hosts.wait(f"{words} claimed")

    def pictures_of(missing: list[int]):
        return batches.draw(
            pipeline,
            [prompts[i] for i in missing],
            lambda k: batches.noise_of([how.seed, missing[k]], shape, schedule),
            schedule,
            guidance,
            batch_size=encoding.at_a_time([(how.resolution, how.resolution)]),
            words=f"drawing {len(missing):,} {words}",
        )

    share = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    paths = resumable.fill(place, len(prompts), pictures_of, **share)
    if hosts.is_first():
        lines = [json.dumps({"file_name": path.name, "text": prompt, "seed": [how.seed, i]}, ensure_ascii=False) + "\n"
                 for i, (path, prompt) in enumerate(zip(paths, prompts, strict=True))]  # fmt: skip
        files.write_text(place / sources.METADATA, "".join(lines))
    hosts.wait(words)
    return paths
