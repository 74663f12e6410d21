"""softmax(q k^T / sqrt(c)) v, in the form that pays on a device at a shape: `choose` is the one place that decides.

Every form equals `plain` in value and gradient. They differ in q k^T, which has n m numbers for each head of each
example: `plain` keeps it for the backward pass, the others recompute it block by block.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

LONG = 1024**2  # n m; from here on, a form without q k^T pays
QUERIES = 256  # in a block on a CPU, at most
TILE = 512  # tokens in a block of the TPU kernel, at most
LANES = 128  # of a TPU's registers: a block is a multiple
CUDNN_CHANNELS = 128  # of a head, at most, before Hopper


def choose(platform: str, dtype, n: int, m: int, c: int) -> str:
    """The name in FORMS for n queries and m keys of c channels a head, on "cpu", "tpu" or "gpu"."""
    if n * m < LONG:
        return "plain"
    if platform == "cpu":
        return "blocked"
    if platform == "tpu":
        return "plain" if n % LANES or m % LANES else "splash"
    half = jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)
    return "cudnn" if half and c % 8 == 0 and c <= CUDNN_CHANNELS else "plain"


@dataclasses.dataclass(frozen=True)
class DotProductAttention:
    """q float[b, n, heads, c], k and v float[b, m, heads, c] -> float[b, n, heads, c]; the softmax is in float32.

    mesh: the devices; b is split over all of them, since XLA can split neither a kernel nor a loop by itself. None: the
    devices are unknown, and the form is `plain`.
    form: a name in FORMS that replaces the choice of `choose` where q k^T is large. None: its choice.
    Raises ValueError for a form that is unknown, or a kernel that is not for the mesh's devices.
    """

    mesh: Mesh | None = None
    form: str | None = None

    def __post_init__(self):
        if self.form not in (None, *FORMS):
            raise ValueError(f"attention = {self.form!r} is unknown (known: {', '.join(FORMS)})")
        if self.form in KERNELS and self.platform != KERNELS[self.form]:
            raise ValueError(
                f"attention = {self.form!r} is a kernel for {KERNELS[self.form]}, and these devices are "
                f"{self.platform}: leave it out, and the form that pays there is chosen"
            )

    @property
    def platform(self) -> str | None:
        platform = self.mesh and self.mesh.devices.flat[0].platform
        return {"cuda": "gpu", "rocm": "gpu"}.get(platform, platform)

    def name(self, dtype, n: int, m: int, c: int) -> str:
        """The name of its form for these shapes: see `choose`."""
        if self.platform is None:
            return self.form or "plain"
        return self.form if self.form and n * m >= LONG else choose(self.platform, dtype, n, m, c)

    def __call__(self, query, key, value, *, upcast: bool = False, mask=None) -> jax.Array:
        """`upcast` takes the products q k^T in float32 too (`upcast_attention` of SD 2.1), as the kernels always do;
        `mask` bool[n, m], True to see."""
        if mask is not None:
            return plain(query, key, value, upcast, mask)

        name = self.name(query.dtype, query.shape[1], key.shape[1], query.shape[-1])
        form = FORMS[name] if name in KERNELS else functools.partial(FORMS[name], upcast=upcast)
        if name == "plain" or self.mesh is None:
            return form(query, key, value)
        batch = PartitionSpec(self.mesh.axis_names)
        sharded = jax.shard_map(form, mesh=self.mesh, in_specs=batch, out_specs=batch, check_vma=False)
        return sharded(query, key, value)


def plain(query, key, value, upcast: bool = False, mask=None) -> jax.Array:
    return jnp.swapaxes(_attend(*_heads_first(query, key, value, upcast), mask), 1, 2)


def blocked(query, key, value, upcast: bool = False) -> jax.Array:
    """One head of one example at a time, in blocks of queries: on a CPU, q k^T stays in the cache.

    Measured on 2 cores: a call of SD1.5's UNet with 2 latents of 512 pixels takes 13.7 s with `plain` and 10.1 with
    this."""
    heads = _heads_first(query, key, value, upcast)
    b, h, n, c = heads[0].shape
    size = max(d for d in range(1, QUERIES + 1) if n % d == 0)

    def one(head):
        query, key, value = head  # with a 1 in front, XLA multiplies faster
        y = jax.lax.map(lambda block: _attend_again(block[None], key, value), query.reshape(n // size, size, c))
        return y.reshape(n, -1)

    y = jax.lax.map(one, (heads[0].reshape(b * h, n, c), *(x.reshape(b * h, 1, *x.shape[2:]) for x in heads[1:])))
    return jnp.swapaxes(y.reshape(b, h, n, -1), 1, 2)


def splash(query, key, value, *, interpret: bool = False) -> jax.Array:
    """The Pallas kernel for TPUs that comes with JAX, on one device. interpret: on any, slowly, for tests."""
    from jax.experimental.pallas.ops.tpu import splash_attention as pallas

    n, m, heads = query.shape[1], key.shape[1], query.shape[2]
    q, kv = (math.gcd(TILE, length) for length in (n, m))
    sizes = pallas.BlockSizes(q, kv, kv, q, kv, kv, q, kv)
    everything = pallas.MultiHeadMask([pallas.FullMask((n, m))] * heads)
    kernel = pallas.make_splash_mha_single_device(everything, block_sizes=sizes, interpret=interpret)
    query, key, value = _heads_first(query, key, value)
    return jnp.swapaxes(jax.vmap(kernel)(query, key, value), 1, 2).astype(value.dtype)


def cudnn(query, key, value) -> jax.Array:
    """The flash attention of NVIDIA's cuDNN, on one device."""
    return jax.nn.dot_product_attention(query, key, value, implementation="cudnn")


FORMS = {"plain": plain, "blocked": blocked, "splash": splash, "cudnn": cudnn}
KERNELS = {"splash": "tpu", "cudnn": "gpu"}  # forms that are written for one platform
dot_product_attention = DotProductAttention()


def _heads_first(query, key, value, upcast: bool = False) -> tuple:
    """q / sqrt(c), k and v as [b, heads, n or m, c]: a CPU is up to four times faster so.

    The factor is on q, which is smaller than q k^T."""
    if upcast:
        query, key = query.astype(jnp.float32), key.astype(jnp.float32)
    return tuple(jnp.swapaxes(x, 1, 2) for x in (query / math.sqrt(query.shape[-1]), key, value))


def _attend(query, key, value, mask=None) -> jax.Array:
    """softmax(q k^T) v of [..., n, c], [..., m, c] and [..., m, c]."""
    logits = jnp.einsum("...nc,...mc->...nm", query, key).astype(jnp.float32)
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
    return jax.nn.softmax(logits, axis=-1).astype(value.dtype) @ value


@jax.custom_vjp
def _attend_again(query, key, value) -> jax.Array:
    """`_attend` that keeps no q k^T for the backward pass, where it is cheaper to compute it again than to fetch it.

    Dao et al. 2022, arXiv:2205.14135."""
    return _attend_again_forward(query, key, value)[0]


def _attend_again_forward(query, key, value):
    logits = (query @ _transpose(key)).astype(jnp.float32)
    highest = logits.max(-1, keepdims=True)
    weights = jnp.exp(logits - highest)
    total = weights.sum(-1, keepdims=True)
    y = ((weights.astype(value.dtype) @ value) / total).astype(value.dtype)
    return y, (query, key, value, y, highest + jnp.log(total))


def _attend_again_backward(kept, dy):
    query, key, value, y, log_total = kept
    weights = jnp.exp((query @ _transpose(key)).astype(jnp.float32) - log_total)
    mean = (dy * y).astype(jnp.float32).sum(-1, keepdims=True)
    dlogits = (weights * ((dy @ _transpose(value)).astype(jnp.float32) - mean)).astype(query.dtype)
    # A CPU takes twice as long for A^T B with the larger A = [n, m] as for (B^T A)^T.
    dkey = _transpose(_transpose(query) @ dlogits)
    return dlogits @ key, dkey, _transpose(_transpose(dy) @ weights.astype(dy.dtype))


def _transpose(x) -> jax.Array:
    return jnp.swapaxes(x, -1, -2)


_attend_again.defvjp(_attend_again_forward, _attend_again_backward)
