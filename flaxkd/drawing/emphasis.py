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
    folder: Folder, prompts: Sequence[str], *, emphasis: bool, long_prompts: bool
) -> tuple[np.ndarray, np.ndarray]:
    """(token ids int32[n, k, l], weights float32[n, k, l]) of prompts in k chunks, as many as the longest one needs.

    emphasis: `parse` the prompts; otherwise all weights are 1. long_prompts: otherwise only the first chunk is kept."""
    tokenizer, length = folder.tokenizer, folder.text_length
    room = length - 2  # the first and the last token of a chunk are markers
    rows = []
    for prompt in prompts:
        pieces = parse(prompt) if emphasis else [(prompt, 1.0)]
        ids, weights = [], []
        for text, weight in pieces:
            own = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            ids += own
            weights += [weight] * len(own)
        rows.append((ids, weights))
    chunks = max(1, *(-(-len(ids) // room) for ids, _ in rows)) if long_prompts else 1
    end = tokenizer.eos_token_id
    padding = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    found = np.full((len(rows), chunks, length), padding, np.int32), np.ones((len(rows), chunks, length), np.float32)
    for i, (ids, weights) in enumerate(rows):
        for j in range(chunks):
            own = ids[j * room : (j + 1) * room]
            found[0][i, j, : len(own) + 2] = [tokenizer.bos_token_id, *own, end]
            found[1][i, j, 1 : len(own) + 1] = weights[j * room : (j + 1) * room]
    return found
