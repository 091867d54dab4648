"""What is worth keeping of the returned files: the results, and the members in fp16."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from benchmarks.gpu import archive
from benchmarks.gpu.chunk import RESULTS
from dverge_serve.errors import UserError
from dverge_serve.files import pretty_json, read_json, write_atomic

LARGEST = 2_000_000


def collect(state: Path, results: Path, runs: Path | None) -> list[Path]:
    """Write the results for people to read and every finished run's members in fp16.

    Args:
        state: what the last chunk returned.
        results: where to; each file is under 2 MB.
        runs: where the run directories go whole, for `dverge export --run`; None for nowhere.

    Returns:
        the files written to `results`.
    """
    table = read_json(state / RESULTS, "what a chunk returned")
    write_atomic(results / RESULTS, pretty_json(table))
    written = [results / RESULTS]
    for name, entry in table["jobs"].items():
        file = state / f"{name}.zip"
        if not entry["done"] or not file.is_file():
            continue
        run = (runs or results / ".runs") / name
        archive.restore(file, run)
        members = load_file(run / "members.safetensors")
        for number, part in enumerate(_parts(_halved(members))):
            path = results / f"{name}{f'-{number + 1}' if number else ''}.fp16.safetensors"
            write_atomic(path, save(part))
            written.append(path)
        if runs is None:
            for each in run.iterdir():
                each.unlink()
            run.rmdir()
            run.parent.rmdir()
    return written


def _halved(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with floats in fp16; counts stay what they are."""
    halves = {
        name: tensor.half() if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }
    for name, tensor in halves.items():
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(f"'{name}' does not fit into fp16", "numbers within 65504")
    return halves


def _parts(tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Return the members in as few files under the limit as can be, none cut in two."""
    members: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        members.setdefault(name.partition(".")[0], {})[name] = tensor
    parts: list[dict[str, Tensor]] = [{}]
    for own in members.values():
        if parts[-1] and _bytes(parts[-1] | own) > LARGEST:
            parts.append({})
        parts[-1] |= own
    return parts


def _bytes(tensors: dict[str, Tensor]) -> int:
    header = 120 * len(tensors)  # a name, a shape and two offsets each
    return header + sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
