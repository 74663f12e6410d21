"""How good are the students? `python -m flaxkd.evaluate`; see evaluation.py."""
