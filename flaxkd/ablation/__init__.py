"""Does each term of the loss earn its place? `python -m flaxkd.ablation`; see runs.py."""
