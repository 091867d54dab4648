"""Commands that train: train, demo."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from dverge_serve.cli import app, as_flags
from dverge_serve.cli.options import SAME_COMMAND, Data, Device
from dverge_serve.cli.panels import InPanels
from dverge_serve.errors import Exit, Interrupted, UserError, interruptible

if TYPE_CHECKING:
    from export.fusion_choice import Target
    from training.config import Config
    from training.data.splits import TrainingData

# Of the demo: "fast B" of docs/results.md, a ninth of the exact procedure's gradients, and attacks
# of two sizes on 200 of the 360 test images.
DEMO = {"batch_size": 64, "standard.epochs": 12, "dverge.epochs": 15}
DEMO_EPS, DEMO_IMAGES = (0.1, 0.15), 200

Recipe = Annotated[
    str | None,
    typer.Option(help="A recipe's name or a TOML file. [default: what suits --data]"),
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="Any recipe key, e.g. dverge.epochs=10. Repeats.")
]


EXAMPLES = """Example: dverge train --data photos/ --set dverge.epochs=20

On several devices: torchrun --nproc-per-node 3 -m dverge_serve train --data photos/"""


@app.command(cls=InPanels, epilog=EXAMPLES)
def train(
    recipe: Recipe = None,
    data: Data = None,
    out: Annotated[
        Path | None, typer.Option(help="The run directory. [default: runs/<recipe>-<time>]")
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on where the run stopped; with RECIPE or --data, begin it."
        ),
    ] = False,
    members: Annotated[int | None, typer.Option(help="How many members.")] = None,
    device: Device = "auto",
    seed: Annotated[int | None, typer.Option(help="Of all randomness. [default: 0]")] = None,
    start: Annotated[
        list[Path] | None,
        typer.Option(
            help="Weights to start from, safetensors or .pth; an ensemble's or one model's. "
            "Repeats."
        ),
    ] = None,
    sources: Annotated[
        list[Path] | None,
        typer.Option(
            help="A run, folder of runs or weights file whose attacks are learnt from. Repeats."
        ),
    ] = None,
    set_: Settings = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="Fewer epochs, so that training takes at most so long here, e.g. 90s, 10m, 1h30m."
        ),
    ] = None,
    list_skipped: Annotated[
        bool,
        typer.Option(
            "--list-skipped", help="List the files of --data that are not used, and stop."
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print the settings, what the run will cost, and stop."),
    ] = False,
) -> None:
    """Train a DVERGE ensemble.

    Standard members first, then DVERGE; a killed run goes on with --resume, which without further
    options keeps the settings it was begun with.
    """
    from training.config import check_seed
    from training.method_registry import METHODS

    if resume and out is None:
        out = Path("runs/latest")
        if not out.exists():
            raise UserError("--resume without --out, and no runs/latest", "a run to go on with")
    begun = _begun(out) if resume and out is not None and recipe is None else None
    if resume and begun is None and recipe is None and data is None:
        # Neither a run nor anything that one could be begun with: a mistyped --out.
        raise UserError(f"no run at {out}", "one that `dverge train` began", "look at --out")
    files = {"start": start, "transfer.sources": sources}
    config = _config(begun, recipe, data, members, seed, set_, files)
    check_seed(config)  # of a dry run, too
    if sources and not METHODS[config.method].sources:
        raise UserError(
            f"--sources, and method {config.method} learns from none",
            "transfer or dverge+transfer",
            "add --set method=transfer",
        )
    if list_skipped:
        from training.data.image_folder import read_folder

        for each in read_folder(Path(config.data.path)).left_out if config.data.path else ():
            typer.echo(f"{each.path}: {each.reason}")
        return
    seconds = _seconds(budget, begun) if budget is not None else None
    if dry_run:
        _dry_run(config, device, seconds)
        return
    from training.device import pick_device
    from training.parallel.distributed import join
    from training.runs.directory import Run
    from training.trainer import train as train_run

    images: TrainingData | None = None
    if seconds is not None:
        config, images = _fitted(config, device, seconds)
    out = out or Path("runs") / f"{config.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    with join(config, pick_device(device)) as (topology, chosen):
        try:
            run = train_run(
                config, out, device=chosen, resume=resume, data=images, topology=topology
            )
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

    config, chosen = load_recipe("digits-fast", DEMO), pick_device(device)
    model = out / "model.onnx"
    typer.echo(f"1/3 training {config.members} members on digit images", err=True)
    with interruptible(SAME_COMMAND):
        run = train_run(config, out / "run", device=chosen, resume=True)
        typer.echo("2/3 exporting one ONNX graph", err=True)
        export_run(run, model, target=cast("Target", device))  # pick_device knows the same names
        typer.echo("3/3 attacking the exported file and an undefended control", err=True)
        report = verify(model, run=run, eps=DEMO_EPS, images=DEMO_IMAGES, device=chosen)
    assert report.control is not None  # the run's own standard members
    demo_table(report, report.control, DEMO_EPS[0])
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
    files: Mapping[str, list[Path] | None],
) -> Config:
    """Return what is asked for: a recipe's settings, or those a run was begun with, overridden."""
    from training.recipe import data_overrides, load_recipe, parse_settings, recipe_for

    overrides: dict[str, Any] = data_overrides(data) if data is not None else {}
    numbers = {"members": members, "seed": seed}
    overrides |= {key: value for key, value in numbers.items() if value is not None}
    for key, paths in files.items():
        if paths:
            named = [str(path.resolve()) for path in paths]
            overrides[key] = named if len(named) > 1 else named[0]
    overrides |= parse_settings(settings or [])
    if begun is not None:
        return begun.overridden(overrides)
    if recipe is not None:
        return load_recipe(recipe, overrides)
    suited, own = recipe_for(data, weights=bool(overrides.get("weights")))
    return load_recipe(suited, own | overrides)


def _seconds(budget: str, begun: Config | None) -> float:
    """Return a budget in seconds; refuse one where the epochs are settled already."""
    if begun is not None:
        raise UserError("--budget for a run that was begun", "its own epochs", "leave it out")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("--budget with torchrun", "one process", "use --set dverge.epochs=N")
    found = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", budget)
    seconds = sum(
        int(count or 0) * unit
        for count, unit in zip(found.groups() if found else (), (3600, 60, 1), strict=False)
    )
    if not seconds:
        raise UserError(f"--budget {budget}", "a time such as 90s, 10m or 1h30m")
    return seconds


def _fitted(config: Config, device: str, seconds: float) -> tuple[Config, TrainingData]:
    """Return settings that take at most so long here, and the images; say what it will cost."""
    from training.data.splits import load_training
    from training.device import pick_device
    from training.estimate import fit_to_time

    chosen, images = pick_device(device), load_training(config.data)
    config, cost = fit_to_time(config, seconds, chosen, images)
    _say_cost(cost, str(chosen))
    return config, images


def _dry_run(config: Config, device: str, seconds: float | None) -> None:
    """Print the settings, with the epochs that the images and the time give, and their cost."""
    from training.budget import within_budget
    from training.device import pick_device
    from training.estimate import estimate, fit_to_time

    chosen = pick_device(device)
    cost: dict[str, Any] = {}
    try:
        if seconds is None:
            config = within_budget(config)
            cost = estimate(config, chosen)
        else:
            config, cost = fit_to_time(config, seconds, chosen)
    except UserError as error:
        if config.data.path or seconds is not None:
            raise
        # The recipe's settings were asked for; the images may come later.
        typer.echo(f"no estimate: {as_flags(str(error))}", err=True)
    typer.echo(json.dumps(config.to_json(), indent=2))
    if cost:
        _say_cost(cost, str(chosen))


def _say_cost(cost: dict[str, Any], device: str) -> None:
    from dverge_serve.progress import duration

    for line in cost["notes"]:
        typer.echo(line, err=True)
    for stage, seconds in cost["seconds"].items():
        told = f"{cost['epochs'][stage]} epochs, {cost['gradient_evaluations'][stage]:,} gradient "
        typer.echo(f"{stage}: {told}evaluations, about {duration(seconds)} on {device}", err=True)
    images, parameters = cost["training_images"], cost["parameters"]
    typer.echo(f"{images:,} training images, {parameters:,} parameters in all", err=True)


def _begun(out: Path) -> Config | None:
    """Return the settings a run was begun with, if it was."""
    from training.runs.directory import Run
    from training.runs.latest import follow

    run = Run(follow(out))
    return run.config if (run.path / "config.json").is_file() else None
