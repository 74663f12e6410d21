"""Will a run fit, and what will it cost? `python -m flaxkd.plan`; see table.py."""
