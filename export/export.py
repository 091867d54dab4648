"""From members to a checked `model.onnx`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dverge_serve.engine import Device, Engine
from dverge_serve.errors import NotMetError
from dverge_serve.files import atomic_path
from export.choice import Ask, Choice, build_best
from export.parity import Parity, check
from export.source import Source, Which, from_run
from training.run import Run


@dataclass(frozen=True)
class Exported:
    """What was written: how the members were fused, and how near torch the file is."""

    choice: Choice
    parity: Parity


def export(
    run: Run,
    path: Path,
    *,
    which: Which = "members",
    form: Ask = "auto",
    target: Device = "auto",
) -> Exported:
    """Fuse a finished run's members into `path`, after parity with torch has been checked.

    Args:
        run: a finished run.
        path: where `model.onnx` goes; an older file there stays until the new one has passed.
        which: the result, or the standard members after stage one (the undefended control).
        form: how the members are fused; `auto` measures.
        target: the device to measure for; `auto` is what is here.

    Raises:
        NotMetError: the file does not say what torch says; nothing is written.
        UserError: the run's weights are damaged, `path` cannot be written, or the form cannot be.
    """
    return export_source(from_run(run, which), path, form=form, target=target)


def export_source(
    source: Source, path: Path, *, form: Ask = "auto", target: Device = "auto"
) -> Exported:
    """Fuse any source's members into `path`; see `export`."""
    choice, data = build_best(source.members, source.card, form, target)
    with atomic_path(path) as part:
        part.write_bytes(data)
        with Engine(part, device="cpu") as engine:
            parity = check(engine, source.members, source.probe)
        if not parity.holds:
            raise NotMetError(
                f"the exported graph does not match torch: {parity}",
                "equal answers",
                "no file was written; please report this with the settings of the training",
            )
    return Exported(choice, parity)
