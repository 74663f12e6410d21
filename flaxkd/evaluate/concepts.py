"""Objects in colors: prompts of several concepts, originals that show them, and what a drawn picture shows.

The originals are drawings of OpenMoji in which one color is replaced by each of the others: every object in every
color. A picture is compared with all of them, and with all pairs of them side by side or one above the other, each of
half the size. The nearest (squares of pixels) says which objects it shows, and in which colors.
"""

import functools
import io
import itertools
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from flaxkd.data import collages, openmoji, sources

COLORS = {  # OpenMoji's tones of each, https://openmoji.org/styleguide
    "red": ("#ea5a47", "#d22f27"),
    "orange": ("#f4aa41", "#e27022"),
    "yellow": ("#fcea2b", "#f1b31c"),
    "green": ("#b1cc33", "#5c9e31"),
    "blue": ("#92d3f5", "#61b2e4", "#1e50a0"),
    "purple": ("#b399c8", "#8967aa"),
    "brown": ("#a57939", "#6a462f"),
    "pink": ("#ffa7c0", "#e67a94"),
}
OBJECTS = {  # {object: (its drawing, the color to replace)}
    "heart": ("2764", "red"),
    "circle": ("1F534", "red"),
    "square": ("1F7E5", "red"),
    "hexagon": ("2B21-FE0F-200D-1F7E5", "red"),
    "jar": ("1FAD9-200D-1F7E5", "red"),
    "apple": ("1F34E", "red"),
    "star": ("2B50", "yellow"),
    "grinning face": ("1F600", "yellow"),
    "cat face": ("1F431", "orange"),
}
NEAR = 4  # pixels between two places where half a picture is looked for

Concept = tuple[str | None, str]  # a color, None for any, and an object


class Prompt(NamedTuple):
    kind: str  # a row of KINDS
    text: str
    wanted: tuple[Concept, ...]


class Originals(NamedTuple):
    concepts: list[Concept]
    pictures: np.ndarray  # uint8[n, H, W, 3]


KINDS = {  # what each kind of prompt asks for
    "seen": "an object in a color that a training caption gives it",
    "novel": "an object in a color that no training caption gives it",
    "two": "two objects, one or both in a color, in a pair that no collage of training pictures has",
}


@functools.cache
def originals() -> Originals:
    """Every object in every tone of every color."""
    files, concepts, drawn = {file.stem: file for file in openmoji.svg_files()}, [], []
    for name, (code, own) in OBJECTS.items():
        svg = files[code].read_text("utf-8")
        for color, tones in COLORS.items():
            for tone in tones:
                png = openmoji.render(re.sub("|".join(COLORS[own]), tone, svg, flags=re.IGNORECASE))
                concepts.append((color, name))
                drawn.append(np.asarray(Image.open(io.BytesIO(png))))
    return Originals(concepts, np.stack(drawn))


def prompts(captions: Sequence[str]) -> list[Prompt]:
    """All prompts for a model that was trained on these captions. Those of two objects are pairs that no collage has.

    Which ones they are follows from the captions alone."""
    known = {*captions}
    words = [{*re.findall(r"\w+", caption)} for caption in known]
    pairs = [(color, name) for name in OBJECTS for color in COLORS]
    text = lambda concept: " ".join(word for word in concept if word)
    seen = [pair for pair in pairs if text(pair) in known]
    novel = [pair for pair in pairs if not any({*text(pair).split()} <= found for found in words)]
    plain = [(None, name) for name in OBJECTS if name in known]
    both = [
        (first, second)
        for first, second in itertools.product(seen + plain, repeat=2)
        if first[0] != second[0] and first[1] != second[1]  # so that a color says whose it is
        if collages.split_of(text(first), text(second)) == "validation"
    ]
    alone = {"seen": seen, "novel": novel}
    found = [Prompt(kind, text(pair), (pair,)) for kind, pairs in alone.items() for pair in pairs]
    return found + [Prompt("two", collages.caption(*map(text, pair)), pair) for pair in both]


def training_captions() -> list[str]:
    """Those of OpenMoji."""
    return sources.open_source("openmoji", "train").all_captions()


def found(drawn: np.ndarray, known: Originals) -> list[tuple[Concept, ...]]:
    """The concepts of the original, or pair of originals, that is nearest to each picture uint8[n, H, W, 3]."""
    height, width = known.pictures.shape[1:3]
    drawn = np.stack([_resized(image, (width, height)) for image in drawn])
    error, nearest = _nearest(drawn, known.pictures)
    shown = [(known.concepts[i],) for i in nearest]
    small = np.stack([collages.half(image, height, width) for image in known.pictures])
    small = np.concatenate([small, np.full_like(small[:1], 255)])  # or nothing
    concepts = [*known.concepts, None]
    for above in (False, True):
        halves = np.array_split(drawn, 2, axis=1 if above else 2)
        errors, several = zip(*(_within(part, small) for part in halves), strict=True)
        for i in np.flatnonzero(sum(errors) < error):
            shown[i] = tuple(concepts[which[i]] for which in several if concepts[which[i]])
        error = np.minimum(error, sum(errors))
    return shown


def _resized(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return image if image.shape[1::-1] == size else np.asarray(Image.fromarray(image).resize(size, Image.BOX))


def _nearest(drawn: np.ndarray, known: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(squares of the differences float64[n], which int[n]) of the nearest of known pictures uint8[m, h, w, 3]."""
    a, b = (x.reshape(len(x), -1).astype(np.float64) for x in (drawn, known))
    squares = (a**2).sum(1)[:, None] - 2 * a @ b.T + (b**2).sum(1)
    return squares.min(1), squares.argmin(1)


def _within(part: np.ndarray, small: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same of small pictures uint8[m, h, w, 3] on white, wherever they are in half pictures uint8[n, h', w', 3]."""
    h, w = small.shape[1:3]
    white = np.square(255.0 - part).sum(3)  # of each pixel
    error, which = np.full(len(part), np.inf), np.zeros(len(part), int)
    for top in range(0, part.shape[1] - h + 1, NEAR):
        for left in range(0, part.shape[2] - w + 1, NEAR):
            window = (slice(None), slice(top, top + h), slice(left, left + w))
            inside, nearest = _nearest(part[window], small)
            total = inside + white.sum((1, 2)) - white[window].sum((1, 2))
            which = np.where(total < error, nearest, which)
            error = np.minimum(error, total)
    return error, which


def score(wanted: Sequence[Concept], shown: Sequence[Concept]) -> dict[str, float]:
    """Shares of the wanted concepts that a picture shows: "object" and "color" wherever they are, "both" in one place;
    and "all", 1 if it shows each of them. At least one color must be wanted."""
    objects, colors = ({concept[i] for concept in shown} for i in (1, 0))
    both = [any(name == other and color in (None, own) for own, other in shown) for color, name in wanted]
    return {
        "object": float(np.mean([name in objects for _, name in wanted])),
        "color": float(np.mean([color in colors for color, _ in wanted if color])),
        "both": float(np.mean(both)),
        "all": float(all(both)),
    }


def shares(prompts: Sequence[Prompt], shown: Sequence[Sequence[Concept]]) -> list[dict]:
    """For each kind {"kind", "pictures": their number, the means of `score`, "chance": the same by chance}.

    By chance a picture belongs to any prompt of its kind: that is what a model reaches which draws these pictures
    without reading its prompts."""
    mean = lambda scores: {key: float(np.mean([score[key] for score in scores])) for key in scores[0]}
    rows = []
    for kind in dict.fromkeys(prompt.kind for prompt in prompts):
        own = [(prompt.wanted, x) for prompt, x in zip(prompts, shown, strict=True) if prompt.kind == kind]
        any_order = [(wanted, x) for wanted, _ in own for _, x in own]
        means, chance = (mean([score(*pair) for pair in pairs]) for pairs in (own, any_order))
        rows.append({"kind": kind, "pictures": len(own), **means, "chance": chance})
    return rows
