"""Pictures of a class, for prior preservation: drawn by the model itself before it is trained, and kept.

    000000.png 000001.png ...   picture i is drawn from noise that depends on the seed and on i alone
    settings.json               what they were drawn with: prompt, weights of the model, sampler
    metadata.jsonl              their captions, so that the folder is also a data set

They are counted, and the missing ones are drawn: a folder serves any number of runs of the same prompt and model, and a
run that was stopped goes on. Another prompt or model is refused.
"""

import json
from pathlib import Path

import jax
import numpy as np

from flaxkd.data import encoding, pictures, sources
from flaxkd.diffusion import samplers
from flaxkd.drawing import batches, resumable
from flaxkd.drawing.pipeline import Pipeline
from flaxkd.machine import files, hosts
from flaxkd.pretrained import Folder


def ensure(config, folder: Folder, workdir: Path, dtype) -> sources.Source:
    """The pictures of the class of `config.prior`. Draws those that are missing, and shows progress.

    folder: of the model that draws. dtype: of the compute. Every process draws its share of the files. Raises
    ValueError if the folder has pictures drawn with another prompt or model, or that flaxkd did not draw."""
    place = Path(config.prior.folder).expanduser() if config.prior.folder else workdir / "class"
    if config.prior.pictures:
        _draw(config, folder, place, dtype)
    hosts.wait("class pictures")
    return sources.open_source(
        str(place),
        "train",
        resolution=config.data.resolution,
        background=config.data.background,
        caption=config.prior.prompt,
    )


def _draw(config, folder: Folder, place: Path, dtype) -> None:
    if place.is_dir() and not (place / resumable.SETTINGS).is_file():
        if own := sum(pictures.is_picture(file.name) for file in place.iterdir()):
            raise ValueError(
                f"{place} has {own} pictures that flaxkd did not draw: --config.prior.pictures=0 trains with them as "
                "they are; or give another --config.prior.folder"
            )
    pipeline = Pipeline.from_folder(folder, str(folder.path), dtype)
    about = folder.config("scheduler")
    kind = config.sample.sampler or samplers.own(about)
    steps = config.sample.steps or samplers.usual_steps(kind, about)
    schedule, shape = samplers.schedule(kind, about, steps), folder.latent_shape(config.data.resolution)
    prompt, n = config.prior.prompt, config.prior.pictures
    made = {"prompt": prompt, "model": str(folder.path), "weights": resumable.fingerprint(pipeline.params)}
    made |= {"sampler": kind, "steps": steps, "guidance": folder.guidance, "seed": config.seed}
    made |= {"pixels": config.data.resolution, "dtype": np.dtype(pipeline.modules["unet"].dtype).name}
    if hosts.is_first():
        files.claim(
            place / resumable.SETTINGS,
            made,
            differ="holds class pictures drawn with other settings",
            remedy="Remove that folder, or give another one: --config.prior.folder=DIR",
            free=("model",),
        )
    hosts.wait("class pictures claimed")

    def pictures_of(missing: list[int]):
        return batches.draw(
            pipeline,
            [prompt] * len(missing),
            lambda k: batches.noise_of([config.seed, missing[k]], shape, schedule),
            schedule,
            folder.guidance,
            batch_size=encoding.BATCH,
            words=f"drawing {len(missing):,} class pictures",
        )

    share = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    paths = resumable.fill(place, n, pictures_of, **share)
    if hosts.is_first():
        lines = [json.dumps({"file_name": path.name, "text": prompt, "seed": [config.seed, i]}) + "\n"
                 for i, path in enumerate(paths)]  # fmt: skip
        files.write_text(place / sources.METADATA, "".join(lines))
