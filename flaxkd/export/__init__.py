"""What a run leaves behind: its export record and newest weights (workdir), the model card of a pipeline (card)."""

from flaxkd.export.workdir import (
    EXPORT,
    RECORD,
    checkpoint,
    export,
    exported_step,
    newest_step,
    open_model,
    read_record,
    restore,
    write,
    write_record,
)

__all__ = [
    "EXPORT",
    "RECORD",
    "checkpoint",
    "export",
    "exported_step",
    "newest_step",
    "open_model",
    "read_record",
    "restore",
    "write",
    "write_record",
]
