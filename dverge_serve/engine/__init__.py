"""The engine: runs one exported ONNX file, without torch or a web framework."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dverge_serve.engine.session import Engine

__all__ = ["Engine"]


def __getattr__(name: str) -> Any:
    """Import the engine, and ONNX Runtime with it, when it is first used."""
    if name == "Engine":
        from dverge_serve.engine.session import Engine

        return Engine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
