"""Functions from trees of weights to trees of weights: low-rank adapters (lora)."""
