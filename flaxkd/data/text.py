"""Text as people save it, in any of the usual encodings, and JSON of any depth."""

import codecs
import json
import re
from typing import Any

BOMS = {  # the longer ones first: that of UTF-32 begins with that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
# What no line of Windows-1252 has: control characters, and six letters outside ASCII in a row (Cyrillic, Chinese).
_FOREIGN = re.compile(rb"[\x00-\x08\x0e-\x1f\x7f]|[\x80-\xff]{6}")


def decode(content: bytes) -> str:
    """Text in UTF-8, UTF-16 or UTF-32 (by their marks or zeros), else Windows-1252. Raises ValueError if it is none.

    A file put together from several may have lines of UTF-8 and lines of Windows-1252."""
    encoding = next((encoding for mark, encoding in BOMS.items() if content.startswith(mark)), None)
    if encoding is None and b"\0" in content[:2] and len(content) % 2 == 0:
        encoding = "utf-16-le" if content[:1] != b"\0" else "utf-16-be"
    try:
        found = content.decode(encoding or "utf-8")
    except UnicodeDecodeError:
        if encoding:
            raise ValueError(f"it begins as {encoding} and is not: save it as UTF-8") from None
        found = "\n".join(map(_line, content.split(b"\n")))
    guessed = encoding and not content.startswith(tuple(BOMS))
    if "\0" in found or (guessed and not found.replace("\n", "").replace("\r", "").replace("\t", "").isprintable()):
        raise ValueError("it is not text")
    return found


def _line(line: bytes) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError:
        pass
    try:
        if _FOREIGN.search(line):
            raise ValueError
        return line.decode("cp1252")
    except ValueError:  # UnicodeDecodeError too
        raise ValueError("it is neither UTF-8, UTF-16 nor Windows-1252: save it as UTF-8") from None


def parse(text: str) -> Any:
    """The content of a JSON text. Raises ValueError, also if it is nested too deeply or an object has a key twice."""
    try:
        return json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):  # two lines run together: the second would give the first its caption
        raise ValueError("a key is there twice")
    return found
