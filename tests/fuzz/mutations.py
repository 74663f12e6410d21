"""Ways to damage a file: its bytes, a value of its JSON, or the settings of a command line."""

import copy
import json

import numpy as np

# Bytes that mean something to a parser of text, numbers or archives.
MEANINGFUL = (b"\0", b"\xff", b"\n", b"\r\n", b'"', b"\\", b"{", b"}", b"[", b",", b";", b":", b"-1", b"1e999", b"NaN")
MEANINGFUL += (
    b"\xef\xbb\xbf",
    b"\xff\xfe",
    b"\x1a",
    b"../",
    b"null",
    b"\xff\xff\xff\x7f",
    b"\0\0\0\x80",
    b"%s",
    b"\xed",
)
SPAN = 64  # bytes; of a span, at most


def damage(content: bytes, rng: np.random.Generator) -> bytes:
    """The content after one to three of the changes below. It may turn out equal."""
    for _ in range(rng.integers(1, 4)):
        content = CHANGES[rng.integers(len(CHANGES))](content, rng)
    return content


def _flip(content, rng):
    at = _place(content, rng)
    changed = bytes([content[at] ^ (1 << rng.integers(8))]) if content else b""
    return content[:at] + changed + content[at + 1 :]


def _overwrite(content, rng):
    at, mark = _place(content, rng), MEANINGFUL[rng.integers(len(MEANINGFUL))]
    return content[:at] + mark + content[at + len(mark) :]


def _insert(content, rng):
    at = _place(content, rng)
    return content[:at] + MEANINGFUL[rng.integers(len(MEANINGFUL))] + content[at:]


def _noise(content, rng):
    at, size = _place(content, rng), rng.integers(1, SPAN)
    return content[:at] + rng.bytes(size) + content[at + size :]


def _delete(content, rng):
    at = _place(content, rng)
    return content[:at] + content[at + rng.integers(1, SPAN) :]


def _repeat(content, rng):
    at = _place(content, rng)
    return content[:at] + content[at : at + rng.integers(1, SPAN)] + content[at:]


def _cut(content, rng):
    return content[: _place(content, rng)]


CHANGES = (_flip, _flip, _overwrite, _insert, _noise, _delete, _repeat, _cut)


def _place(content: bytes, rng) -> int:
    """Any place in the content; every second time within its first or last 256 bytes, where headers and footers lie."""
    if not content:
        return 0
    near = int(rng.integers(min(len(content), 256)))
    return (near, len(content) - 1 - near, *(int(rng.integers(len(content))),) * 2)[rng.integers(4)]


# What people and programs write where something else belongs.
VALUES = (None, True, False, 0, 1, -1, 2, 3, 7, 2**31, 10**30, 0.5, -0.5, 1e-30, 1e30, float("nan"), float("inf"))
VALUES += (
    "",
    "0",
    "none",
    "True",
    "fp16",
    "a/b",
    "../..",
    "\u0000",
    "x" * 5000,
    [],
    [1],
    [None, 2],
    ["a"],
    {},
    {"a": 1},
)


def damage_json(content: bytes, rng: np.random.Generator) -> bytes:
    """A JSON document in which one to three values are replaced, removed or wrapped in a list."""
    document = json.loads(content)
    for _ in range(rng.integers(1, 4)):
        holders = list(_holders(document))
        if not holders:
            break
        holder, key = holders[rng.integers(len(holders))]
        change = rng.integers(5)
        if change == 0:
            del holder[key]
        elif change == 1:
            holder[key] = [holder[key]]
        else:
            holder[key] = copy.deepcopy(VALUES[rng.integers(len(VALUES))])
    return json.dumps(document).encode()


def _holders(tree):
    """Every (object or list, key) in a document."""
    for key, value in list(tree.items()) if isinstance(tree, dict) else enumerate(tree):
        yield tree, key
        if isinstance(value, dict | list):
            yield from _holders(value)


def override(content: bytes, rng: np.random.Generator) -> bytes:
    """Lines --config.KEY=VALUE, one to three: keys from the content, values of any kind."""
    keys = content.decode().split("\n")
    chosen = [(keys[rng.integers(len(keys))], VALUES[rng.integers(len(VALUES))]) for _ in range(rng.integers(1, 4))]
    return "\n".join(f"--config.{key}={value}" for key, value in chosen).encode()
