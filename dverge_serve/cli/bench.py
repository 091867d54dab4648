"""The command that times a model file: bench."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dverge_serve.cli import app
from dverge_serve.cli.options import AsJson, Model
from dverge_serve.errors import UserError

if TYPE_CHECKING:
    from dverge_serve.engine.providers import Device as DeviceName


@app.command(epilog="Example: dverge bench model.onnx --batches 1,32")
def bench(
    model: Model = Path("model.onnx"),
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or tensorrt.")] = "auto",
    threads: Annotated[int, typer.Option(help="Threads of one call; 0: every core.")] = 0,
    batches: Annotated[str, typer.Option(help="Batch sizes.")] = "1,2,4,8,16,32,64,128",
    seconds: Annotated[float, typer.Option(help="For each batch size.")] = 2.0,
    as_json: AsJson = False,
) -> None:
    """Measure a model file's speed.

    Latency and throughput for each batch size.
    Beside the engine's time stands that of a bare ONNX Runtime session on the same file, and the
    share that the engine's own checks take.
    """
    sizes = _sizes(batches)
    if threads < 0 or not 0 < seconds < 3600:
        raise UserError(
            f"--threads {threads} --seconds {seconds:g}", "threads of 0 or more, seconds above 0"
        )
    from typing import cast

    from dverge_serve.engine.benchmark import measure
    from dverge_serve.engine.session import Engine
    from dverge_serve.progress import Progress

    rows = []
    with Engine(model, device=cast("DeviceName", device), threads=threads) as engine:
        with Progress("measuring", len(sizes)) as progress:
            for size in sizes:
                rows.append(dataclasses.asdict(measure(engine, size, seconds)))
                progress.advance(1, f"batch {size}")
        card, sha256, provider = engine.card, engine.sha256, engine.provider
    if as_json:
        facts = {"sha256": sha256, "provider": provider, "threads": threads, "rows": rows}
        typer.echo(json.dumps(facts, indent=2))
        return
    from dverge_serve.cli.tables import bench_table

    bench_table(rows, f"{card.name}: {card.members} members, {card.precision}, {provider}")


def _sizes(batches: str) -> list[int]:
    try:
        sizes = [int(size) for size in batches.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1 or max(sizes) > 4096:
        raise UserError(f"--batches {batches}", "sizes from 1 to 4096, e.g. 1,8,32")
    return sizes
