"""Commands that train: train, demo."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from dverge_serve.cli import app, as_flags
from dverge_serve.cli.options import SAME_COMMAND, Data, Device
from dverge_serve.errors import Exit, Interrupted, UserError, interruptible

if TYPE_CHECKING:
    from export.fusion_choice import Target
    from training.config import Config

DEMO_EPS = 0.1

Recipe = Annotated[
    str | None,
    typer.Option(help="A recipe's name or a TOML file. [default: what suits --data]"),
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="Any recipe key, e.g. dverge.epochs=10. Repeats.")
]


EXAMPLES = """Example: dverge train --data photos/ --set dverge.epochs=20

On several devices: torchrun --nproc-per-node 3 -m dverge_serve train --data photos/"""


@app.command(epilog=EXAMPLES)
def train(
    recipe: Recipe = None,
    data: Data = None,
    out: Annotated[
        Path | None, typer.Option(help="The run directory. [default: runs/<recipe>-<time>]")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on where the run stopped.")] = False,
    members: Annotated[int | None, typer.Option(help="How many members.")] = None,
    device: Device = "auto",
    seed: Annotated[int | None, typer.Option(help="Of all randomness. [default: 0]")] = None,
    start: Annotated[
        list[Path] | None,
        typer.Option(
            help="safetensors with weights to start from; a run's or one model's. Repeats."
        ),
    ] = None,
    set_: Settings = None,
    list_skipped: Annotated[
        bool, typer.Option(help="List the files of --data that are not used, and stop.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option(help="Print the settings, what the run will cost, and stop.")
    ] = False,
) -> None:
    """Train a DVERGE ensemble.

    Standard members first, then DVERGE; a killed run goes on with --resume, which without further
    options keeps the settings it was begun with.
    """
    from training.config import check_seed

    if resume and out is None:
        out = Path("runs/latest")
        if not out.exists():
            raise UserError("--resume without --out, and no runs/latest", "a run to go on with")
    begun = _begun(out) if resume and out is not None and recipe is None else None
    if resume and begun is None and recipe is None and data is None:
        # Neither a run nor anything that one could be begun with: a mistyped --out.
        raise UserError(f"no run at {out}", "one that `dverge train` began", "look at --out")
    config = _config(begun, recipe, data, members, seed, set_, start)
    check_seed(config)  # of a dry run, too
    if list_skipped:
        from training.data.image_folder import read_folder

        for each in read_folder(Path(config.data.path)).left_out if config.data.path else ():
            typer.echo(f"{each.path}: {each.reason}")
        return
    if dry_run:
        typer.echo(json.dumps(config.to_json(), indent=2))
        _say_cost(config, device)
        return
    from training.device import pick_device
    from training.parallel.distributed import join
    from training.runs.directory import Run
    from training.trainer import train as train_run

    out = out or Path("runs") / f"{config.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    with join(config, pick_device(device)) as (topology, chosen):
        try:
            run = train_run(config, out, device=chosen, resume=resume, topology=topology)
        except KeyboardInterrupt as stopped:
            if not Run(out).begun:
                raise
            raise Interrupted(f"go on with `dverge train --resume --out {out}`") from stopped
        if topology.first:
            accuracy = run.checkpoint["holdout_accuracy"]
            typer.echo(f"finished {out}: held-out accuracy {accuracy:.3f}")


@app.command(epilog="Example: dverge demo")
def demo(
    out: Annotated[Path, typer.Option(help="Where the run and the model go.")] = Path("demo"),
    device: Device = "auto",
) -> None:
    """Train, export and verify on digits.

    The whole way on embedded images, and a comparison with a standard ensemble.
    """
    from dverge_serve.cli.tables import demo_table, verdict_lines
    from export.exporter import export as export_run
    from training.device import pick_device
    from training.recipe import load_recipe
    from training.trainer import train as train_run
    from verification import verify

    config, chosen, model = load_recipe("digits"), pick_device(device), out / "model.onnx"
    typer.echo(f"1/3 training {config.members} members on digit images", err=True)
    with interruptible(SAME_COMMAND):
        run = train_run(config, out / "run", device=chosen, resume=True)
        typer.echo("2/3 exporting one ONNX graph", err=True)
        export_run(run, model, target=cast("Target", device))  # pick_device knows the same names
        typer.echo("3/3 attacking the exported file and an undefended control", err=True)
        report = verify(model, run=run, device=chosen)
    assert report.control is not None  # the run's own standard members
    demo_table(report, report.control, DEMO_EPS)
    for line in verdict_lines(report):
        typer.echo(as_flags(line))
    typer.echo(f"serve it with: dverge serve {model}")
    if report.verdict != "VALID":
        raise typer.Exit(Exit.NOT_VALID)


def _config(
    begun: Config | None,
    recipe: str | None,
    data: str | None,
    members: int | None,
    seed: int | None,
    settings: list[str] | None,
    start: list[Path] | None,
) -> Config:
    """Return what is asked for: a recipe's settings, or those a run was begun with, overridden."""
    from training.recipe import data_overrides, load_recipe, parse_settings, recipe_for

    overrides: dict[str, Any] = data_overrides(data) if data is not None else {}
    numbers = {"members": members, "seed": seed}
    overrides |= {key: value for key, value in numbers.items() if value is not None}
    if start:
        named = [str(path.resolve()) for path in start]
        overrides["start"] = named if len(named) > 1 else named[0]
    overrides |= parse_settings(settings or [])
    if begun is not None:
        return begun.overridden(overrides)
    if recipe is not None:
        return load_recipe(recipe, overrides)
    suited, own = recipe_for(data, weights=bool(overrides.get("weights")))
    return load_recipe(suited, own | overrides)


def _say_cost(config: Config, device: str) -> None:
    from dverge_serve.progress import duration
    from training.device import pick_device
    from training.estimate import estimate

    chosen = pick_device(device)
    try:
        cost = estimate(config, chosen)
    except UserError as error:
        if config.data.path:
            raise
        # The recipe's settings were asked for; the images may come later.
        typer.echo(f"no estimate: {as_flags(str(error))}", err=True)
        return
    for line in cost["notes"]:
        typer.echo(line, err=True)
    for stage, seconds in cost["seconds"].items():
        gradients = cost["gradient_evaluations"][stage]
        told = f"{gradients:,} gradient evaluations, about {duration(seconds)} on {chosen}"
        typer.echo(f"{stage}: {told}", err=True)
    images, parameters = cost["training_images"], cost["parameters"]
    typer.echo(f"{images:,} training images, {parameters:,} parameters in all", err=True)


def _begun(out: Path) -> Config | None:
    """Return the settings a run was begun with, if it was."""
    from training.runs.directory import Run
    from training.runs.latest import follow

    run = Run(follow(out))
    return run.config if (run.path / "config.json").is_file() else None
