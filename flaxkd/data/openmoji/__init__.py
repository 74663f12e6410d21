"""The OpenMoji drawings with captions: a data set without a download."""

from flaxkd.data.openmoji.builder import (
    VALIDATION_SHARE,
    OpenMoji,
    build,
    caption_hash,
    caption_of,
    pictures,
    render,
    short_names,
    split_of,
    svg_files,
)

__all__ = [
    "VALIDATION_SHARE",
    "OpenMoji",
    "build",
    "caption_hash",
    "caption_of",
    "pictures",
    "render",
    "short_names",
    "split_of",
    "svg_files",
]
