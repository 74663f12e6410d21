"""A pipeline on disk as one object: `Folder`.

    model_index.json    unet/ vae/ text_encoder/ (config.json, *.safetensors)    tokenizer/    scheduler/

Reading needs neither torch nor diffusers. Weights are read from safetensors alone, since a pickle can run code. Only
this file of flaxkd parses the `config.json` files of a pipeline. writing.py writes such folders.
"""

import contextlib
import dataclasses
import functools
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from flaxkd.machine import files
from flaxkd.pretrained import families, hub, keys, single_file, tensors
from flaxkd.weights.quantize import Quantization

CONFIGS = dict.fromkeys(families.PARTS, "config.json") | {"scheduler": "scheduler_config.json"}
NO_LIMIT = 10**9  # of tokens; a tokenizer of transformers without a configuration has 10**30
# In model_index.json, where diffusers ignores names that begin with an underscore.
DRAWN_WITH = "_guidance_scale"
QUANTIZED = "_quantization"
SCALING = ("scaling_factor", "force_upcast")  # of an autoencoder, what its tensors do not tell
SHARED = "_shared"  # {part, tokenizer or scheduler: the folder that has it, from this one}, for the embedded teachers


@dataclasses.dataclass(frozen=True, eq=False)
class Folder:
    """A pipeline folder: its family, configurations, networks, weights and tokenizer, each read on first use.

    path: of the folder, or of a single-file checkpoint. configs, weights: {part: its config.json} and {part: () -> its
    parameters, a nested dict}, used in place of the files, such as those of a run's newest checkpoint, or shapes in
    place of numbers. step: () -> the step of that checkpoint; None if `weights` come from none.
    readers: {part: () -> its tensors {diffusers' key: array}} and {"tokenizer" or "tokenizer_2": () -> the
    CLIPTokenizer} of what is not a folder of diffusers. vae: where another autoencoder than the model's own comes from;
    None: its own. drawn_with: the guidance of its pictures by default, in place of its own; see `guidance`.
    quantized: how its UNet is, in place of its own, {} for not; see `quantization`."""

    path: Path
    configs: Mapping[str, dict] = dataclasses.field(default_factory=dict)
    weights: Mapping[str, Callable[[], dict]] = dataclasses.field(default_factory=dict)
    step: Callable[[], int] | None = None
    readers: Mapping[str, Callable] = dataclasses.field(default_factory=dict)
    vae: str | None = None
    drawn_with: float | None = None
    quantized: Mapping | None = None

    @classmethod
    def open(
        cls, model: str | os.PathLike | None = None, vae: str | os.PathLike | None = None, clip_skip: int | None = None
    ) -> "Folder":
        """The folder of `model`: a path, a hub id (owner/name), or None for the embedded teacher.

        model: may be a single-file checkpoint. vae: another autoencoder in place of its own: a folder of diffusers, of
        an autoencoder or of a whole pipeline, a file with one, or a hub id of such a folder. clip_skip: see
        `skip_layers`. Raises FileNotFoundError and ValueError, as `hub.resolve` and `single_file.read` do."""
        path = hub.resolve(model)
        configs, readers = ({}, {}) if path.is_dir() else single_file.read(path, own_vae=vae is None)
        if vae is not None:
            own = cls(path, configs)
            known = "vae" in configs or (own.place("vae") / CONFIGS["vae"]).is_file()
            configs["vae"], readers["vae"] = cls._open_vae(hub.resolve_vae(vae), own.config("vae") if known else {})
        folder = cls(path, configs, readers=readers, vae=None if vae is None else str(vae))
        return folder.skip_layers(clip_skip)

    @classmethod
    def _open_vae(cls, path: Path, own: dict) -> tuple[dict, Callable]:
        """own: config.json of the model's own autoencoder, {} without one."""
        if path.is_file():
            return single_file.read_vae(path, {name: own[name] for name in SCALING if name in own})
        stem, file = families.PARTS["vae"].stem, path / CONFIGS["vae"]
        config = families.plain("vae", _read_object(file), str(file))
        return config, lambda: tensors.read(tensors.find(path, stem, path))

    def replace(self, configs: Mapping[str, dict], weights: Mapping[str, Callable[[], dict]], step=None) -> "Folder":
        """The same folder with these parts in place of its own."""
        configs, weights = {**self.configs, **configs}, {**self.weights, **weights}
        return dataclasses.replace(self, configs=configs, weights=weights, step=step)

    def skip_layers(self, n: int | None) -> "Folder":
        """The same folder without the last n layers of its text encoders; the final norm stays.

        n is diffusers' clip_skip: 1 leaves out the last layer, what other programs call clip skip 2. None: 0. Where the
        states before the last layer are used, n layers before that one are left out, and the pooled state stays.
        Raises ValueError for more layers than there are."""
        if not n:
            return self
        configs = {part: self.config(part) for part in self.family.encoders}
        for part, config in configs.items():
            layers = self.module(part).config.num_hidden_layers
            most = layers - 1 - self.family.penultimate
            if not 0 <= n <= most:
                raise ValueError(
                    f"clip_skip = {n}: the {part} of {self.path} has {layers} layers, and 0 to {most} can be "
                    "skipped (1 is the last one, which other programs call clip skip 2)"
                )
            configs[part] = self.family.skip(config, n)
        return self.replace(configs, {}, self.step)

    # -- What it is ---------------------------------------------------------------------------------------------------

    @functools.cached_property
    def index(self) -> dict:
        """Its model_index.json."""
        return self.configs.get("model_index") or _read_object(self.path / "model_index.json")

    @functools.cached_property
    def family(self) -> families.Family:
        """Its row of the table. Raises ValueError for a pipeline outside the table."""
        networks = families.networks(self.index)
        known = ", ".join(family.title for family in families.FAMILIES.values())
        error = ValueError(
            f"{self.path} is a {families.class_name(self.index) or 'pipeline without a name'} of "
            f"{', '.join(networks) or 'unnamed parts'}: flaxkd knows {known}, from text alone or for inpainting, "
            "not refiners or other models"
        )
        if networks and "unet" not in networks:  # a transformer
            raise error
        unet, vae = self.config("unet"), self.config("vae")
        if (more := families.beside(unet, vae)) not in families.BESIDE:
            raise ValueError(f"{error}; its UNet takes {more} channels beside the noisy latents")
        found = families.of(self.index, unet, vae)
        if found is None:
            raise error
        return found

    @property
    def pipeline(self) -> str:
        """diffusers' class for it."""
        return self.family.pipeline_of(self.config("unet"), self.config("vae"))

    @property
    def beside(self) -> tuple[str, ...]:
        """The fields of a record that its UNet sees beside the noisy latents: () for a model that draws from text."""
        return families.BESIDE[families.beside(self.config("unet"), self.config("vae"))]

    @property
    def guidance(self) -> float:
        """The guidance its pictures are drawn with unless another one is asked for, from its model_index.json.

        diffusers ignores names that begin with an underscore. A folder without one has its family's."""
        own = self.index.get(DRAWN_WITH) if self.drawn_with is None else self.drawn_with
        own = self.family.guidance if own is None else own
        if isinstance(own, bool) or not isinstance(own, int | float) or not math.isfinite(own):
            raise ValueError(f"{self.path}/model_index.json: {DRAWN_WITH} = {own!r} is no number")
        return float(own)

    @property
    def quantization(self) -> Quantization | None:
        """How its UNet is quantized where flaxkd draws with it, from its model_index.json; None: not."""
        own = self.index.get(QUANTIZED) if self.quantized is None else self.quantized
        return Quantization.read(own, f"{self.path}/model_index.json")

    def as_quantized(self, how: Quantization | None) -> "Folder":
        """The same folder with this quantization in place of its own; None for none."""
        return dataclasses.replace(self, quantized={} if how is None else how._asdict())

    @property
    def parts(self) -> tuple[str, ...]:
        """Its networks: unet, vae, text_encoder, perhaps text_encoder_2."""
        return self.family.parts

    def place(self, name: str) -> Path:
        """Where a part, a tokenizer or the scheduler lies: in the pipeline folder, beside a single file, or shared."""
        if self.path.is_file():
            return self.path.parent / name
        return self.path / self.index.get(SHARED, {}).get(name, ".") / name

    def config(self, part: str) -> dict:
        """The config.json of a part in one spelling, or scheduler_config.json for "scheduler".

        Raises FileNotFoundError and ValueError, as `families.plain` does."""
        if part in self.configs:
            return self.configs[part]
        path = self.place(part) / CONFIGS[part]
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: {self.path} is not a whole pipeline folder of diffusers")
        config = _read_object(path)
        return families.plain(part, config, str(path)) if part in families.PARTS else config

    # -- Networks and weights -----------------------------------------------------------------------------------------

    def module(self, part: str, dtype=jnp.float32, **kwargs) -> nn.Module:
        """The module of a part. dtype: of the compute, see `dtype`. kwargs: of the module.

        Raises ValueError that names the file."""
        with self._at_fault(part):
            return families.build(part, self.config(part), self.dtype(part, dtype), **kwargs)

    def dtype(self, part: str, wanted):
        """That of a part's compute where `wanted` is asked for: float32 for an autoencoder that overflows in float16.

        Stable Diffusion XL's `force_upcast`, true unless its config.json says otherwise, as in diffusers."""
        upcasts = part == "vae" and self.family.upcasts and self.config(part).get("force_upcast", True)
        return jnp.float32 if upcasts else wanted

    def shapes(self, part: str) -> dict:
        """The parameters of a part as shapes: see `families.shapes`. Raises ValueError that names the file."""
        with self._at_fault(part):
            return families.shapes(part, self.config(part))

    def count(self, part: str) -> int:
        """The number of parameters of a part."""
        with self._at_fault(part):
            return families.count(part, self.config(part))

    @contextlib.contextmanager
    def _at_fault(self, part: str) -> Iterator[None]:
        file = f"{self.place(part)}/{CONFIGS[part]}"
        try:
            yield
        except ValueError as error:
            if file in str(error):
                raise
            raise ValueError(f"{file}: {error}") from error

    def tensors(self, part: str) -> dict[str, np.ndarray]:
        """The tensors {diffusers' key: array} in the files of a part, in their dtypes.

        Read from one safetensors file or from its shards, else from a variant such as fp16. Raises FileNotFoundError
        and ValueError, as `tensors.find` and `tensors.read` do."""
        if part in self.weights:
            return keys.to_tensors(self.weights[part]())
        if part in self.readers:
            return self.readers[part]()
        return tensors.read(tensors.find(self.place(part), families.PARTS[part].stem, self.path))

    def stored(self, part: str) -> dict:
        """The parameters of a part in the dtypes of its files: a nested dict of views of the tensors.

        Raises ValueError for numbers that are not finite, and as `tensors` and `keys.from_tensors` do."""
        params = keys.from_tensors(self.tensors(part), self.shapes(part), f"{self.path}/{part}")
        keys.check_finite(params, f"{self.path}/{part}", "Take another copy of the model, or one in float32")
        return params

    def params(self, part: str, dtype=None) -> dict:
        """The parameters of a part in `dtype` (None: float32), see `dtype`: a nested dict of C-contiguous numpy arrays.

        Raises FileNotFoundError and ValueError, as `stored` and `module` do."""
        dtype = self.dtype(part, jnp.float32 if dtype is None else dtype)
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

    def tokenizer_folder(self, field: str = "input_ids") -> Path:
        """Where a tokenizer is. field: of its token ids."""
        return self.place(families.TOKENIZERS[field])

    @functools.cached_property
    def tokenizers(self) -> dict[str, Any]:
        """{field of the token ids: its CLIPTokenizer} (needs no torch), one for each text encoder.

        Raises FileNotFoundError or ValueError, with the file."""
        return {field: self._tokenizer(field) for field in self.family.captions.values()}

    @property
    def tokenizer(self):
        """The first of its tokenizers. All have the same words; they may differ in how they pad."""
        return next(iter(self.tokenizers.values()))

    def _tokenizer(self, field: str):
        path = self.tokenizer_folder(field)
        if path.name in self.readers:
            return self.readers[path.name]()
        here = {file.name for file in path.iterdir()} if path.is_dir() else set()
        if "tokenizer.json" not in here and not {"vocab.json", "merges.txt"} <= here:
            raise FileNotFoundError(
                f"{path} has neither tokenizer.json nor vocab.json with merges.txt: copy the model's"
            )
        try:
            return _read_tokenizer(path)
        except Exception as error:  # of JSON, tokenizers or transformers
            for file in path.glob("*.json"):
                _read_object(file)
            with tempfile.TemporaryDirectory() as scratch:
                files.copy_plain(path, Path(scratch, "tokenizer"))  # without byte order marks
                try:
                    return _read_tokenizer(Path(scratch, "tokenizer"))
                except Exception:
                    raise ValueError(f"{path} cannot be read as a tokenizer of CLIP: {error}") from error

    @functools.cached_property
    def text_length(self) -> int:
        """The number of tokens of a caption: its tokenizer's, or the text encoder's if that has no limit."""
        limit = self.tokenizer.model_max_length
        if not isinstance(limit, int | float) or not limit > 2:
            raise ValueError(f"{self.tokenizer_folder()}: model_max_length is {limit!r}, must be a number of tokens")
        if limit < NO_LIMIT:
            return int(limit)
        return min(self.module(part).config.max_position_embeddings for part in self.family.encoders)

    def tokenize(self, captions: Sequence[str | None]) -> dict[str, np.ndarray]:
        """{field: int32[n, text_length]} for each text encoder: start, tokens, end, padded and cut as in diffusers.

        None is a missing prompt: "", or where its states are zeros a row of families.MISSING."""
        options = {"padding": "max_length", "max_length": self.text_length, "truncation": True}
        texts, found = [caption or "" for caption in captions], {}
        missing = [self.zeros and caption is None for caption in captions]
        for field, tokenizer in self.tokenizers.items():
            ids = np.asarray(tokenizer(texts, **options)["input_ids"], np.int32).reshape(-1, self.text_length)
            ids[missing] = families.MISSING
            found[field] = ids
        return found

    @property
    def zeros(self) -> bool:
        """Whether the states of a missing prompt are zeros; else they are those of ""."""
        return bool(self.index.get(families.ZEROS, self.family.index.get(families.ZEROS, False)))

    def conditions(self, captions: Sequence[str | None], size: tuple[int, int]) -> dict[str, np.ndarray]:
        """What `Family.condition` reads, for whole pictures of `size` (height, width) in pixels."""
        sizes = np.tile(np.array([*size, 0, 0, *size], np.int32), (len(captions), 1))
        return self.tokenize(captions) | ({"time_ids": sizes} if self.family.sizes else {})

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
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels of the pictures its UNet was trained on. Raises ValueError if it does not say."""
        size = self.module("unet").config.sample_size
        if size is None or (isinstance(size, tuple) and len(size) != 2):
            raise ValueError(
                f"{self.path}/unet/config.json does not say how large its pictures are (sample_size = {size}): give "
                "their size in pixels, such as --height and --width, --resolution or --config.data.resolution"
            )
        rows, columns = size if isinstance(size, tuple) else (size, size)
        return rows * self.factor, columns * self.factor

    @functools.cached_property
    def resolution(self) -> int:
        """Pixels along a side of the pictures its UNet was trained on. Raises ValueError if they are not squares."""
        height, width = self.size
        if height != width:
            raise ValueError(
                f"{self.path} was trained on pictures of {height} x {width} pixels, and squares are asked for: give "
                "their side in pixels, such as --resolution or --config.data.resolution"
            )
        return height

    def picture_size(self, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        """(height, width) in pixels, those asked for or `size`. Raises as that and `check_resolution` do."""
        asked = {"height": height, "width": width}
        for name, value in asked.items():
            if value is not None:
                self.check_resolution(value, name)
        return tuple(self.size[i] if value is None else value for i, value in enumerate(asked.values()))

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


def _read_object(file: Path) -> dict:
    """The object in a JSON file. Raises ValueError if it is anything else."""
    content = files.read_json(file)
    if not isinstance(content, dict):
        raise ValueError(
            f"{file} holds a {type(content).__name__}, and must hold an object {{...}}: was it copied whole?"
        )
    return content


def _read_tokenizer(path: Path):
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # torch is not needed
    from transformers import CLIPTokenizer  # a second of import, needed for captions alone

    return CLIPTokenizer.from_pretrained(path, local_files_only=True)
