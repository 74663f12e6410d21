"""Training captions of OpenMoji with their originals, and whether what was drawn of them is nearest to its own."""

import numpy as np

from flaxkd.data import sources


def read(captions: int, originals: int, seed: int) -> tuple[list[str], np.ndarray]:
    """(captions, originals uint8[n, H, W, 3]): as many captions, those of the first originals. Raises ValueError."""
    if not 1 <= captions <= originals:
        raise ValueError(f"--captions {captions} of --originals {originals}: 1 is the least, all the most")
    source = sources.open_source("openmoji", "train")
    chosen = np.random.default_rng(seed).permutation(len(source))[:originals]
    examples = [source[int(i)] for i in chosen]
    return [example["caption"] for example in examples[:captions]], np.stack([x["image"] for x in examples])


def check(name: str, pixels: int, originals: np.ndarray) -> None:
    """Raises ValueError for a model that draws pictures of another size than the originals uint8[m, H, W, 3]."""
    if (pixels, pixels) != originals.shape[1:3]:
        raise ValueError(
            f"{name} draws {pixels} x {pixels} pixels, and OpenMoji's originals have {originals.shape[2]} x "
            f"{originals.shape[1]}: flaxkd.evaluate compares models of other sizes"
        )


def nearest(drawn: np.ndarray, originals: np.ndarray) -> np.ndarray:
    """Indices int[n, m]: for each picture uint8[n, H, W, 3] the originals uint8[m, H, W, 3], nearest first."""
    a, b = (x.reshape(len(x), -1).astype(np.float64) for x in (drawn, originals))
    squares = (a**2).sum(1)[:, None] - 2 * a @ b.T + (b**2).sum(1)
    return np.argsort(squares, axis=1, kind="stable")


def recall(order: np.ndarray, k: int) -> float:
    """The share of rows i of `order` int[n, m] with i among their first k."""
    return float(np.mean([i in row[:k] for i, row in enumerate(order)]))
