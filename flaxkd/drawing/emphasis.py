"""Prompts as user interfaces read them, on request: (weights) and more tokens than a text encoder takes.

`parse` reads the notation of AUTOMATIC1111's web UI. `encode` cuts a prompt into chunks: the text encoder reads them
one by one, the UNet all together. A weight moves a token's state away from that of the empty prompt, as in ComfyUI.
"""

import re
from collections.abc import Sequence

import numpy as np

from flaxkd.pretrained import Folder

ONCE = 1.1  # the factor of a bracket without a number
# An escaped bracket; a bracket; the end of one with its number; text.
_PIECES = re.compile(r"\\[\\()\[\]]|[(\[]|:\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*\)|[)\]]|[^\\()\[\]:]+|[\\:]")


def parse(prompt: str) -> list[tuple[str, float]]:
    """[(text, weight)]: (text:1.3) has the weight 1.3, (text) 1.1 and [text] 1 / 1.1; brackets multiply.

    A backslash takes a bracket as it is. A bracket that is never closed reaches to the end, and one that was never
    opened is text."""
    found: list[list] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def weigh(start: int, factor: float) -> None:
        for piece in found[start:]:
            piece[1] *= factor

    for match in _PIECES.finditer(prompt):
        piece, number = match[0], match[1]
        if piece in opened:
            opened[piece].append(len(found))
        elif number is not None and opened["("]:
            weigh(opened["("].pop(), float(number))
        elif piece == ")" and opened["("]:
            weigh(opened["("].pop(), ONCE)
        elif piece == "]" and opened["["]:
            weigh(opened["["].pop(), 1 / ONCE)
        else:
            found.append([piece[1:] if len(piece) == 2 and piece[0] == "\\" else piece, 1.0])
    for start in opened["("]:
        weigh(start, ONCE)
    for start in opened["["]:
        weigh(start, 1 / ONCE)
    merged: list[list] = []
    for text, weight in found:
        if merged and merged[-1][1] == weight:
            merged[-1][0] += text
        else:
            merged.append([text, weight])
    return [(text, weight) for text, weight in merged]


def encode(
    folder: Folder, prompts: Sequence[str | None], *, emphasis: bool, long_prompts: bool
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """({field: token ids int32[n, k, l]}, weights float32[n, k, l]) of prompts in k chunks, as many as the longest one
    needs. The fields are those of `Folder.tokenize`, and None is a missing prompt as there.

    emphasis: `parse` the prompts; otherwise all weights are 1. long_prompts: otherwise only the first chunk is kept.
    All text encoders read the same words, so that one set of weights serves them."""
    length, missing = folder.text_length, folder.tokenize([None])
    room = length - 2  # the first and the last token of a chunk are markers
    rows = _weighted(folder.tokenizer, prompts, emphasis)
    chunks = max(1, *(-(-len(ids) // room) for ids, _ in rows)) if long_prompts else 1
    found, weights = {}, np.ones((len(rows), chunks, length), np.float32)
    for field, tokenizer in folder.tokenizers.items():
        end = tokenizer.eos_token_id
        padding = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        found[field] = np.full((len(rows), chunks, length), padding, np.int32)
        for i, (ids, row_weights) in enumerate(rows):
            for j in range(chunks):
                own = ids[j * room : (j + 1) * room]
                found[field][i, j, : len(own) + 2] = [tokenizer.bos_token_id, *own, end]
                weights[i, j, 1 : len(own) + 1] = row_weights[j * room : (j + 1) * room]
        absent = [folder.zeros and prompt is None for prompt in prompts]
        found[field][absent] = missing[field][0]
    return found, weights


def _weighted(tokenizer, prompts: Sequence[str | None], emphasis: bool) -> list[tuple[list[int], list[float]]]:
    """(token ids, their weights) of each prompt, of any length and without markers."""
    rows = []
    for prompt in prompts:
        pieces = parse(prompt or "") if emphasis else [(prompt or "", 1.0)]
        ids, weights = [], []
        for text, weight in pieces:
            own = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            ids += own
            weights += [weight] * len(own)
        rows.append((ids, weights))
    return rows
