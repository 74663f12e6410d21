"""The dtypes of the compute, and how people spell them."""

NAMES = ("float32", "bfloat16", "float16")
# The words of accelerate, diffusers and others for them.
SPELLINGS = {"fp32": "float32", "f32": "float32", "float": "float32", "no": "float32"}
SPELLINGS |= {"bf16": "bfloat16", "fp16": "float16", "f16": "float16", "half": "float16"}


def spelt(name: str) -> str:
    """One of NAMES, for itself or for one of SPELLINGS; other names as they are."""
    plain = name.lower().removeprefix("torch.")
    return SPELLINGS.get(plain, plain if plain in NAMES else name)
