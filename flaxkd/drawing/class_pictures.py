"""Pictures of a class, for prior preservation: drawn by the model itself before it is trained, and kept.

They are a data set as data_set.py draws it: a folder serves any number of runs of the same prompt and model. Another
prompt or model is refused.
"""

from pathlib import Path

from flaxkd.data import sources
from flaxkd.drawing import data_set
from flaxkd.drawing.pipeline import Pipeline
from flaxkd.pretrained import Folder


def ensure(config, folder: Folder, workdir: Path, dtype) -> sources.Source:
    """The pictures of the class of `config.prior`. Draws those that are missing, and shows progress.

    folder: of the model that draws. dtype: of the compute. Every process draws its share of the files. Raises
    ValueError if the folder has pictures drawn with another prompt or model, or that flaxkd did not draw."""
    place = Path(config.prior.folder).expanduser() if config.prior.folder else workdir / "class"
    if config.prior.pictures:
        _draw(config, folder, place, dtype)
    return sources.open_source(
        str(place),
        "train",
        resolution=config.data.resolution,
        background=config.data.background,
        caption=config.prior.prompt,
    )


def _draw(config, folder: Folder, place: Path, dtype) -> None:
    instead = "--config.prior.pictures=0 trains with them as they are; or give another --config.prior.folder"
    data_set.check(place, instead)
    how = data_set.How(config.data.resolution, config.seed, config.sample.sampler, config.sample.steps)
    data_set.draw(
        place,
        [config.prior.prompt] * config.prior.pictures,
        Pipeline.from_folder(folder, str(folder.path), dtype),
        how,
        {"prompt": config.prior.prompt},
        remedy="Remove that folder, or give another one: --config.prior.folder=DIR",
        words="class pictures",
    )
