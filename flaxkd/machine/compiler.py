"""Options of XLA, where this version of it knows them."""

from collections.abc import Mapping

import jax

# For rematerialisation. For a Hopper GPU, not for an A100, XLA by itself schedules so as to hide communication, and
# with that order remat saves next to nothing (openxla/xla#45753 has the same of a language model). Of `sd_small`'s step
# for 8 H100 with 48 images at 512 pixels each, temporaries are 34.6 GiB without remat, 31.5 with remat=True, and 12.9
# with this option too (jax 0.10.2, as compiled: no GPU has run it yet).
REMAT_ON_GPU = {"xla_gpu_enable_analytical_sol_latency_estimator": False}


def known(options: Mapping[str, object]) -> dict[str, object]:
    """The options, for `jax.jit`, or none of them if this XLA does not know them: names come and go."""
    try:
        jax.jit(lambda: 0, compiler_options=dict(options)).lower().compile()
    except jax.errors.JaxRuntimeError:
        return {}
    return dict(options)
