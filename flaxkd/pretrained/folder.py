"""A pipeline on disk as one object: `Folder`.

    model_index.json    unet/ vae/ text_encoder/ (config.json, *.safetensors)    tokenizer/    scheduler/

Reading needs neither torch nor diffusers. Weights are read from safetensors alone, since a pickle can run code. Only
this file of flaxkd parses the `config.json` files of a pipeline. writing.py writes such folders.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from flaxkd.machine import files
from flaxkd.pretrained import families, hub, keys, tensors

CONFIGS = dict.fromkeys(families.PARTS, "config.json") | {"scheduler": "scheduler_config.json"}


@dataclasses.dataclass(frozen=True, eq=False)
class Folder:
    """A pipeline folder: its family, configurations, networks, weights and tokenizer, each read on first use.

    path: of the folder. configs, weights: {part: its config.json} and {part: () -> its parameters, a nested dict}, used
    in place of the files, such as those of a run's newest checkpoint, or shapes in place of numbers.
    step: () -> the step of that checkpoint; None if `weights` come from none."""

    path: Path
    configs: Mapping[str, dict] = dataclasses.field(default_factory=dict)
    weights: Mapping[str, Callable[[], dict]] = dataclasses.field(default_factory=dict)
    step: Callable[[], int] | None = None

    @classmethod
    def open(cls, model: str | os.PathLike | None = None) -> "Folder":
        """The folder of `model`: a path, a hub id (owner/name), or None for the embedded teacher.

        Raises FileNotFoundError, as `hub.resolve` does."""
        return cls(hub.resolve(model))

    def replace(self, configs: Mapping[str, dict], weights: Mapping[str, Callable[[], dict]], step=None) -> "Folder":
        """The same folder with these parts in place of its own."""
        return Folder(self.path, {**self.configs, **configs}, {**self.weights, **weights}, step)

    # -- What it is ---------------------------------------------------------------------------------------------------

    @functools.cached_property
    def index(self) -> dict:
        """Its model_index.json."""
        return files.read_json(self.path / "model_index.json")

    @functools.cached_property
    def family(self) -> families.Family:
        """Its row of the table. Raises ValueError for a pipeline outside the table."""
        unet, vae = self.config("unet"), self.config("vae")
        found = families.of(self.index, unet, vae)
        if found is None:
            known = " and ".join(family.title for family in families.FAMILIES.values())
            raise ValueError(
                f"{self.path} is a {self.index.get('_class_name', 'pipeline without a name')} whose UNet takes "
                f"{unet.get('in_channels', 4)} channels for latents of {vae.get('latent_channels', 4)}: flaxkd knows "
                f"{known} from text alone, not with SDXL or inpainting models"
            )
        return found

    @property
    def parts(self) -> tuple[str, ...]:
        """Its networks: unet, vae, text_encoder."""
        return self.family.parts

    def config(self, part: str) -> dict:
        """The config.json of a part, or scheduler_config.json for "scheduler". Raises FileNotFoundError, ValueError."""
        if part in self.configs:
            return self.configs[part]
        path = self.path / part / CONFIGS[part]
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: {self.path} is not a whole pipeline folder of diffusers")
        return files.read_json(path)

    # -- Networks and weights -----------------------------------------------------------------------------------------

    def module(self, part: str, dtype=jnp.float32, **kwargs) -> nn.Module:
        """The module of a part. dtype: of the compute. kwargs: of the module. Raises ValueError."""
        return families.build(part, self.config(part), dtype, **kwargs)

    def shapes(self, part: str) -> dict:
        """The parameters of a part as shapes: see `families.shapes`."""
        return families.shapes(part, self.config(part))

    def count(self, part: str) -> int:
        """The number of parameters of a part."""
        return families.count(part, self.config(part))

    def tensors(self, part: str) -> dict[str, np.ndarray]:
        """The tensors {diffusers' key: array} in the files of a part, in their dtypes.

        Read from one safetensors file or from its shards, else from a variant such as fp16. Raises FileNotFoundError
        and ValueError, as `tensors.find` and `tensors.read` do."""
        return tensors.read(tensors.find(self.path / part, families.PARTS[part].stem, self.path))

    def stored(self, part: str) -> dict:
        """The parameters of a part in the dtypes of its files: a nested dict of views of the tensors.

        Raises ValueError for numbers that are not finite, and as `tensors` and `keys.from_tensors` do."""
        params = keys.from_tensors(self.tensors(part), self.shapes(part), f"{self.path}/{part}")
        keys.check_finite(params, f"{self.path}/{part}", "Take another copy of the model, or one in float32")
        return params

    def params(self, part: str, dtype=None) -> dict:
        """The parameters of a part in `dtype` (None: float32): a nested dict of C-contiguous numpy arrays.

        Raises FileNotFoundError and ValueError, as `stored` and `module` do."""
        dtype = jnp.float32 if dtype is None else dtype
        if part in self.weights:
            params = self.weights[part]()
            keys.check_finite(params, f"{part} of the newest checkpoint", "Remove this checkpoint to use an older one")
            return jax.tree.map(lambda x: x.astype(dtype), params)
        return jax.tree.map(lambda x: np.ascontiguousarray(x, dtype), self.stored(part))

    def load(self, part: str, dtype=None, **kwargs) -> tuple[nn.Module, dict]:
        """(module, params) of a part, both in `dtype` (None: float32)."""
        dtype = jnp.float32 if dtype is None else dtype
        return self.module(part, dtype, **kwargs), self.params(part, dtype)

    # -- Captions -----------------------------------------------------------------------------------------------------

    @functools.cached_property
    def tokenizer(self):
        """Its CLIPTokenizer (needs no torch). Raises FileNotFoundError if there is none."""
        path = self.path / "tokenizer"
        if not (path / "tokenizer.json").is_file() and not (path / "vocab.json").is_file():
            raise FileNotFoundError(f"{path} has neither vocab.json nor tokenizer.json: copy the model's there")
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # torch is not needed
        from transformers import CLIPTokenizer  # a second of import, needed for captions alone

        return CLIPTokenizer.from_pretrained(path, local_files_only=True)

    @property
    def text_length(self) -> int:
        """The number of tokens of a caption."""
        return self.tokenizer.model_max_length

    def tokenize(self, captions: Sequence[str]) -> np.ndarray:
        """int32[n, text_length]: start, tokens, end, padded and cut as diffusers' pipelines do."""
        options = {"padding": "max_length", "max_length": self.text_length, "truncation": True}
        ids = self.tokenizer(list(captions), **options)["input_ids"]
        return np.asarray(ids, np.int32).reshape(-1, self.text_length)

    # -- Latents ------------------------------------------------------------------------------------------------------

    @functools.cached_property
    def factor(self) -> int:
        """Pixels along a side of one latent."""
        return self.module("vae").config.factor

    @functools.cached_property
    def scaling_factor(self) -> float:
        """The factor that scales latents to about unit variance."""
        return self.module("vae").config.scaling_factor

    @functools.cached_property
    def resolution(self) -> int:
        """Pixels along a side of the pictures its UNet was trained on."""
        return self.module("unet").config.sample_size * self.factor

    def latent_shape(self, resolution: int | None = None) -> tuple[int, int, int]:
        """(h, w, c) of the latents of a square picture. resolution: in pixels; None: the model's own."""
        side = (resolution or self.resolution) // self.factor
        return side, side, self.module("vae").config.latent_channels

    def check_resolution(self, pixels: int, name: str, multiple: int | None = None) -> None:
        """Raises ValueError that names the option, unless a side of `pixels` holds a whole number of latents.

        multiple: in pixels; None: the size of one latent."""
        multiple = multiple or self.factor
        if pixels < multiple or pixels % multiple:
            near = max(1, round(pixels / multiple)) * multiple
            raise ValueError(
                f"{name} = {pixels} pixels is no multiple of {multiple}, the size of a latent: take {near}"
            )
