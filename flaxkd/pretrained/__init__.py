"""Pipelines of diffusers: THE TABLE of their families (families), one on disk (folder), writing one (writing).

tensors.py reads files of weights, keys.py has the only rule for names and layouts, hub.py finds a model, fresh.py makes
one with random weights.
"""

from flaxkd.pretrained.families import ARCHITECTURES, FAMILIES, PARTS, build, count, published, shapes
from flaxkd.pretrained.folder import Folder
from flaxkd.pretrained.writing import save

__all__ = ["ARCHITECTURES", "FAMILIES", "PARTS", "Folder", "build", "count", "published", "save", "shapes"]
