"""What a run leaves behind: its export record and newest weights (workdir), the model card of a pipeline (card), and
the LoRA files of its adapters (adapters)."""

from flaxkd.export.adapters import ADAPTERS, write_adapters
from flaxkd.export.workdir import (
    EXPORT,
    RECORD,
    Adapted,
    as_drawn,
    checkpoint,
    export,
    exported_step,
    merged,
    newest_step,
    open_model,
    read_record,
    restore,
    rounded,
    write,
    write_record,
)

__all__ = [
    "ADAPTERS",
    "EXPORT",
    "RECORD",
    "Adapted",
    "as_drawn",
    "checkpoint",
    "export",
    "exported_step",
    "merged",
    "newest_step",
    "open_model",
    "read_record",
    "restore",
    "rounded",
    "write",
    "write_adapters",
    "write_record",
]
