"""The tokenizer of CLIP, for models that come without one: a single file of Stable Diffusion has none.

All of Stable Diffusion 1.x and 2.x reads captions with the 49,408 tokens of CLIP (Radford et al. 2021,
arXiv:2103.00020). They follow from 48,894 byte pairs, which are in assets/clip with OpenAI's licence (MIT).
"""

import gzip
import os
from collections.abc import Sequence
from pathlib import Path

MERGES = Path(__file__).parents[1] / "assets" / "clip" / "merges.txt.gz"
VOCAB_SIZE = 49408
LENGTH = 77
SPECIALS = ["<|startoftext|>", "<|endoftext|>"]
END = "</w>"  # of a word


def vocabulary(merges: Sequence[tuple[str, str]]) -> dict[str, int]:
    """{token: id} in CLIP's order: letters, letters that end a word, merges, and the specials last."""
    from tokenizers import pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = letters + [letter + END for letter in letters] + ["".join(pair) for pair in merges] + SPECIALS
    return {name: i for i, name in enumerate(dict.fromkeys(names))}


def options(open_clip: bool) -> dict:
    """Options of `make` for a published model: Stable Diffusion 2.x pads with the token 0, as OpenCLIP does."""
    return {"pad_token": "!" if open_clip else SPECIALS[1], "model_max_length": LENGTH}


def make(merges: Sequence[tuple[str, str]] | None = None, vocab: dict[str, int] | None = None, **options):
    """A CLIPTokenizer (needs no torch). merges: None for CLIP's own. options: pad_token, model_max_length."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # torch is not needed
    from transformers import CLIPTokenizer  # a second of import, needed for captions alone

    if merges is None:
        lines = gzip.decompress(MERGES.read_bytes()).decode().splitlines()[1:]
        merges = [tuple(line.split()) for line in lines]
    merges = [tuple(pair) for pair in merges]
    return CLIPTokenizer(vocab=vocab or vocabulary(merges), merges=merges, **options)
