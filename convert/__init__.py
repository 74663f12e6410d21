"""Commands that convert diffusers' pipeline folders to Orbax checkpoints and back; pretrained/keys.py has the rule."""
