"""What a run leaves: its export record and newest weights (workdir.py), the model card of a pipeline (card.py)."""

from flaxkd.export.workdir import EXPORT, export, plan, read_plan, restore, write

__all__ = ["EXPORT", "export", "plan", "read_plan", "restore", "write"]
