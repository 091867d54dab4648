"""From a finished run to a checked `model.onnx`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from dverge_serve import __version__
from dverge_serve.contract import Card
from dverge_serve.engine import Engine
from dverge_serve.errors import NotMetError
from dverge_serve.files import atomic_path
from export.graph import build_graph
from export.parity import Parity, check
from training.run import Run

Which = Literal["members", "standard"]


def export(run: Run, path: Path, *, which: Which = "members") -> Parity:
    """Fuse a finished run's members into `path`, after parity with torch has been checked.

    Args:
        run: a finished run.
        path: where `model.onnx` goes; an older file there stays until the new one has passed.
        which: the result, or the standard members after stage one (the undefended control).

    Returns:
        the parity that was found.

    Raises:
        NotMetError: the file does not say what torch says; nothing is written.
        UserError: the run's weights are damaged, or `path` cannot be written.
    """
    members = run.members(which)
    data = build_graph(members, card(run, which))
    with atomic_path(path) as part:
        part.write_bytes(data)
        parity = check(Engine(part, device="cpu"), members, run.probe().numpy())
        if not parity.holds:
            raise NotMetError(
                f"the exported graph does not match torch: {parity}",
                "equal answers",
                "no file was written; please report this with the run's config.json",
            )
    return parity


def card(run: Run, which: Which) -> Card:
    """Return the metadata for a model of this run."""
    config, checkpoint = run.config, run.checkpoint
    training = config.to_json()
    training["data"].pop("path")  # says nothing about the model, and names a folder of this machine
    training["method"] = config.method if which == "members" else "standard"
    return Card(
        name=config.name if which == "members" else f"{config.name}-standard",
        labels=run.labels,
        preprocess=run.preprocess,
        channel_order=run.preprocess.mode,
        members=config.members,
        dataset=config.data.name,
        training=training | {"train_sha256": checkpoint["train_sha256"]},
        weights_sha256=checkpoint[f"{which}_sha256"],
        tool_version=__version__,
    )
