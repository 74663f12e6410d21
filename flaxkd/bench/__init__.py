"""How fast are a teacher and its students? `python -m flaxkd.bench`; see benchmark.py."""
