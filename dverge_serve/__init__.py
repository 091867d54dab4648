"""DVERGE Serve: train, fuse, verify and serve image classifiers that will be attacked."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dverge_serve.engine.session import Engine

# ONNX Runtime keeps a device id and reports to its maker, unless told otherwise before its import.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

# A literal, because package metadata is absent inside a Bento's uninstalled copy.
__version__ = "0.1.0"

__all__ = ["Engine"]


def __getattr__(name: str) -> Any:
    """Import the engine, and ONNX Runtime with it, when it is first used."""
    if name == "Engine":
        from dverge_serve.engine.session import Engine

        return Engine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
