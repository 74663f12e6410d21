"""How good are students? `python -m flaxkd.evaluate`; see evaluation.py."""
