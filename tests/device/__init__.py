"""What only an accelerator can tell, run by hand on one:

    FLAXKD_TEST_PLATFORMS=cuda,cpu pytest -m device -n 0        a GPU
    FLAXKD_TEST_PLATFORMS=tpu,cpu pytest -m device -n 0         a TPU

`pytest -m device -n 1` is a rehearsal on a CPU, where all is compared with itself, and bfloat16 with float32.
"""

import jax
import numpy as np

HERE, THERE = jax.devices("cpu")[0], jax.devices()[0]


def apart(ours, true) -> float:
    """|ours - true| / |true| over all leaves, in float64; not a number if one is not finite."""
    pairs = [(np.float64(a), np.float64(b)) for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(true), strict=True)]
    return float(np.sqrt(sum(np.sum((a - b) ** 2) for a, b in pairs) / sum(np.sum(b**2) for _, b in pairs)))
