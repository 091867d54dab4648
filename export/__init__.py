"""Export: one averaged-logit ONNX graph from a run's members, checked against torch.

    from export import export

    export("runs/latest", "model.onnx")

`from_checkpoint` and `from_list` read members that were trained elsewhere, for `export` to take in
place of a run. Importing this package does not import torch; using a name of it does.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from export.exporter import Exported, export
    from export.member_list import from_list
    from export.published_checkpoint import from_checkpoint
    from export.source import ExportSource

__all__ = ["ExportSource", "Exported", "export", "from_checkpoint", "from_list"]

_MODULES = {
    "ExportSource": "export.source",
    "Exported": "export.exporter",
    "export": "export.exporter",
    "from_checkpoint": "export.published_checkpoint",
    "from_list": "export.member_list",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'export' has no attribute '{name}'")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
