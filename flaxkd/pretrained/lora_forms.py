"""What the tensors of one module in a LoRA file say: every form becomes two matrices, A and B, of `weights.lora`.

    LoRA     Delta = up down                                    rank r
    LoCon    the same with a kernel in the middle (Tucker)      rank r
    LoHa     Delta = (w1_a w1_b) * (w2_a w2_b), elementwise     rank r * r
    LoKr     Delta = w1 (x) w2, Kronecker's product             product of the ranks of w1 and w2
    DoRA     W + Delta rescaled to given norms                  full rank; depends on W

Forms and scales are those of LyCORIS (Yeh et al. 2023, arXiv:2309.14859) and DoRA (Liu et al. 2024, arXiv:2402.09353).
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Pair = tuple[np.ndarray, np.ndarray]


class Form(NamedTuple):
    """pair: (A, B) in float32, axes in Flax's order, with `scale` folded into B."""

    pair: Pair
    scale: float


def read(roles: dict[str, np.ndarray], default: Callable[[int], float]) -> Form:
    """The form of a module's tensors, {role: float32 array in PyTorch's layout}.

    default: rank -> the scale where there is no alpha. Raises ValueError for tensors that do not fit each other."""
    kind = next(kind for kind in FORMS if any(role.startswith(kind) for role in roles))
    try:
        a, b, rank = FORMS[kind]({role.removeprefix(kind): x for role, x in roles.items()})
    except KeyError as error:
        raise ValueError(f"a module has {', '.join(sorted(roles))}, and no {kind}{error.args[0]}") from error
    except (ValueError, IndexError) as error:  # of numpy, too
        shapes = ", ".join(f"{role} {list(x.shape)}" for role, x in roles.items())
        raise ValueError(f"tensors of a module do not fit each other: {shapes}") from error
    alpha = roles.get("alpha", np.zeros(()))
    if alpha.size != 1:
        raise ValueError(f"an alpha has the shape {list(alpha.shape)}")
    if rank is None:
        scale = 1.0
    else:
        scale = float(alpha.reshape(())) / rank if "alpha" in roles else default(rank)
    b = (b.T * np.float32(scale)).reshape(*(1,) * (a.ndim - 2), *b.T.shape)
    return Form((np.ascontiguousarray(a.transpose(*range(2, a.ndim), 1, 0)), b), scale)


def _lora(t: dict) -> tuple:
    a, b = t["A"], t["B"]
    if b.ndim not in (2, 4) or a.ndim not in (2, 4) or b.shape[2:] not in ((), (1, 1)) or not len(a):
        raise ValueError
    b = b.reshape(b.shape[:2])
    if "mid" in t:
        a = np.einsum("ijkl,jc->ickl", t["mid"], a.reshape(a.shape[:2]))
    return a, _checked(b, a), len(t["A"])


def _loha(t: dict) -> tuple:
    """Row (p, q) of A is the product of row p of w1_b and row q of w2_b, and so are the columns of B."""
    rank = t["w1_b"].shape[0]
    a, b = [], []
    for i in (1, 2):
        left, right = t[f"w{i}_a"], t[f"w{i}_b"]
        if f"t{i}" in t:
            left, right = left.T, np.einsum("ijkl,jc->ickl", t[f"t{i}"], right)
        a.append(right)
        b.append(_checked(left, right))
    if a[0].shape[1:] != a[1].shape[1:] or len(b[0]) != len(b[1]):
        raise ValueError
    pairs = (a[0][:, None] * a[1][None]).reshape(-1, *a[0].shape[1:])
    return pairs, (b[0][:, :, None] * b[1][:, None]).reshape(len(b[0]), -1), rank


def _lokr(t: dict) -> tuple:
    left1, right1, rank1 = _factors(t, 1)
    left2, right2, rank2 = _factors(t, 2)
    a = np.einsum("pb,qd...->pqbd...", right1, right2)
    a = a.reshape(a.shape[0] * a.shape[1], a.shape[2] * a.shape[3], *a.shape[4:])
    return a, np.kron(left1, left2), rank2 or rank1


def _factors(t: dict, i: int) -> tuple:
    """w1 or w2 as (left, right), and its rank; None if it is stored whole."""
    if f"w{i}" in t:
        whole = t[f"w{i}"]
        if whole.ndim == 2 and whole.shape[1] < whole.shape[0]:
            return whole, np.eye(whole.shape[1], dtype=np.float32), None
        return np.eye(len(whole), dtype=np.float32), whole, None
    left, right = t[f"w{i}_a"], t[f"w{i}_b"]
    rank = len(right)
    if f"t{i}" in t:
        left, right = left.T, np.einsum("ijkl,jc->ickl", t[f"t{i}"], right)
    return _checked(left, right), right, rank


def _checked(b: np.ndarray, a: np.ndarray) -> np.ndarray:
    if b.ndim != 2 or b.shape[1] != len(a) or not a.size:
        raise ValueError
    return b


# {beginning of its roles: tensors without it, in PyTorch's layout -> (A [r, i, ...], B [o, r], rank, None: no scale)}
FORMS = {"hada_": _loha, "lokr_": _lokr, "": _lora}


def shaped(a: np.ndarray, b: np.ndarray, kernel: tuple[int, ...]) -> Pair | None:
    """A and B in the form of a kernel of this shape, None if they do not fit.

    Files also hold a 1x1 convolution for a linear layer, the reverse, and convolutions as matrices."""
    rank, outputs = b.shape[-2:]
    *window, inputs, wanted = kernel
    if outputs != wanted or a.size != rank * inputs * int(np.prod(window, dtype=np.int64)):
        return None
    if a.shape[:-1] != (*window, inputs):
        if a.ndim == 4 and a.shape[:2] != (1, 1):
            return None
        # As PyTorch has it: [r, i * h * w], and there [r, i, h, w].
        torch = a.reshape(-1, rank).T.reshape(rank, inputs, *window)
        a = np.ascontiguousarray(torch.transpose(*range(2, torch.ndim), 1, 0))
    return a, b.reshape(*(1,) * len(window), rank, outputs)


def dora(pair: Pair, magnitude: np.ndarray, kernel: np.ndarray, name: str) -> Pair:
    """(A, B) of what DoRA makes of a kernel in place of `pair`: m V / |V| - W, where V = W + A @ B.

    |V| is over the inputs, one for each output. Scaled, it goes in a straight line from W to what DoRA makes of it."""
    outputs = kernel.shape[-1]
    axis_of_outputs = magnitude.ndim == 1 or magnitude.shape[magnitude.ndim > 2 and len(magnitude) == 1] == outputs
    if magnitude.size != outputs or not axis_of_outputs:
        raise ValueError(f"{name}: DoRA of norms {list(magnitude.shape)} is not over the inputs of {outputs} outputs")
    whole = kernel + pair[0] @ pair[1]
    norms = np.sqrt(np.square(whole).sum(tuple(range(whole.ndim - 1)), dtype=np.float32))
    difference = magnitude.reshape(-1) * whole / np.maximum(norms, np.finfo(np.float32).tiny) - kernel
    identity = np.eye(outputs, dtype=np.float32)
    return difference, identity.reshape(*(1,) * (kernel.ndim - 2), outputs, outputs)
