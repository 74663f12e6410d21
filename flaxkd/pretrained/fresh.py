"""A new miniature of Stable Diffusion: a pipeline folder with random weights and its own tokenizer.

The embedded teacher began as one (`configs/vae.py`, then `configs/teacher.py`). A run with such a folder as its
teacher trains from scratch.
"""

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from flaxkd.machine import files
from flaxkd.pretrained import clip_tokenizer, families
from flaxkd.pretrained.folder import CONFIGS, Folder
from flaxkd.pretrained.writing import save, write_tokenizer

# The last layer of every residual branch of the UNet starts at zero: a new network is nearly the identity.
ZERO = ("conv2", "proj_out", "conv_out")


def initial(shapes: dict, seed: int, zero: tuple[str, ...] = ()) -> dict:
    """Random float32 parameters for a tree of shapes: LeCun normal kernels, embeddings of 0.02, norms of one.

    Sampled with numpy: compiling the initialisation of a module takes longer than training it for a while. zero:
    names of modules with zero kernels."""
    rng = np.random.default_rng(seed)
    params = {}
    for path, like in sorted(flatten_dict(shapes).items()):
        module, leaf = path[-2], path[-1]
        if leaf == "kernel" and module not in zero:
            fan_in = np.prod(like.shape[:-1])
            params[path] = rng.standard_normal(like.shape, np.float32) / np.float32(np.sqrt(fan_in))
        elif leaf == "embedding":
            params[path] = rng.standard_normal(like.shape, np.float32) * np.float32(0.02)
        else:
            params[path] = np.full(like.shape, float(leaf == "scale"), np.float32)
    return unflatten_dict(params)


def train_tokenizer(captions: list[str], vocab_size: int, max_length: int, out: Path) -> None:
    """Learns a CLIP tokenizer (byte-level BPE, lower case, words end in </w>) from captions, and writes it to `out`."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    letters, end = sorted(pre_tokenizers.ByteLevel.alphabet()), clip_tokenizer.END
    learner = Tokenizer(models.BPE(end_of_word_suffix=end))
    learner.normalizer = normalizers.Lowercase()
    words = pre_tokenizers.Split(Regex(WORD), behavior="removed", invert=True)
    letters_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    learner.pre_tokenizer = pre_tokenizers.Sequence([words, letters_of])
    merges = vocab_size - 2 * len(letters) - len(clip_tokenizer.SPECIALS)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=letters, end_of_word_suffix=end, show_progress=False
    )
    learner.train_from_iterator(captions, trainer)
    pairs = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]][:merges]
    clip_tokenizer.make(pairs, model_max_length=max_length).save_pretrained(out)


WORD = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"  # CLIP's: every digit is a word


TEACHER = "teacher"  # in an architecture: this one is taken from another pipeline, as it is


def write(
    out: Path, architecture: dict, captions: list[str], seed: int, base: Folder | None = None, dtype=None
) -> Folder:
    """Writes a pipeline folder with random weights, and returns it. An existing one is left alone.

    architecture: {part or "scheduler": its configuration, "vocab_size": int}; the text encoders tell the family.
    TEACHER in place of one of them takes the part, the scheduler or the tokenizer of `base`. dtype: of the weights as
    stored; None: float32 for new ones, and what they are for others."""
    out = Path(out)
    if (out / "model_index.json").is_file():
        return Folder(out)
    kept = {name for name, value in architecture.items() if value == TEACHER}
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch)
        scheduler = base.config("scheduler") if "scheduler" in kept else architecture["scheduler"]
        files.write_json(path / "scheduler" / CONFIGS["scheduler"], scheduler)
        encoders = tuple(part for part in architecture if part.startswith("text_encoder"))
        family = next(row for row in families.FAMILIES.values() if row.encoders == encoders)
        made = [part for part in family.parts if part not in kept]
        configs = {part: dict(architecture[part]) if part in made else base.config(part) for part in family.parts}
        kind = family.pipeline_of(configs["unet"], configs["vae"])
        index = {"_class_name": kind, "scheduler": ["diffusers", scheduler["_class_name"]]}
        files.write_json(path / "model_index.json", index)
        source = Folder(path, configs)
        if "vocab_size" in kept:
            write_tokenizer(base, path)
        else:
            length = configs["text_encoder"]["max_position_embeddings"]
            train_tokenizer(captions, architecture["vocab_size"], length, path / "tokenizer")
        add_tokenizers(path, source.family)
        vocab_size = len(source.tokenizer)
        ends = {"bos_token_id": vocab_size - 2, "eos_token_id": vocab_size - 1, "pad_token_id": vocab_size - 1}
        parts = {}
        for i, (part, config) in enumerate(configs.items()):
            if part in kept:
                parts[part] = config, base.stored(part)
                continue
            config |= {"vocab_size": vocab_size, **ends} if part in encoders else {}
            zero = ZERO if part == "unet" else ()
            parts[part] = config, initial(families.shapes(part, config), seed + i, zero)
        save(out, source=source, parts=parts, dtype=dtype, card="A new pipeline: its weights are random.\n")
    return Folder(out)


def skeleton(out: Path, architecture: families.Architecture) -> Folder:
    """A pipeline folder without weights: configurations, and a tokenizer of the same length. For `flaxkd.plan`."""
    family = families.FAMILIES[architecture.family]
    for part, config in architecture.configs.items():
        files.write_json(out / part / CONFIGS[part], config)
    files.write_json(out / "model_index.json", {"_class_name": family.pipeline})
    length = architecture.configs["text_encoder"]["max_position_embeddings"]
    train_tokenizer(["a picture"], 520, length, out / "tokenizer")  # its vocabulary does not matter
    add_tokenizers(out, family)
    return Folder(out)


def add_tokenizers(out: Path, family: families.Family) -> None:
    """Copies tokenizer/ for the further text encoders of a family. As in Stable Diffusion XL they pad with "!"."""
    for field in [*family.captions.values()][1:]:
        folder = out / families.TOKENIZERS[field]
        shutil.copytree(out / "tokenizer", folder)
        file = folder / "tokenizer_config.json"
        files.write_json(file, files.read_json(file) | {"pad_token": "!"})
