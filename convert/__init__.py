"""Command-line conversion between diffusers' pipeline folders and Orbax checkpoints; the rule is `flaxkd.keys`."""
