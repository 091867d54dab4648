"""Commands that make things: train, export, verify-robustness, demo."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from dverge_serve.cli import app
from dverge_serve.errors import Exit, NotMetError, UserError

if TYPE_CHECKING:
    from training.config import Config

DEMO_EPS = 0.1

Recipe = Annotated[
    str | None,
    typer.Option(help="A recipe's name or a TOML file. [default: digits; with --data: images]"),
]
Data = Annotated[
    str | None,
    typer.Option(help="A folder with train/<class>/ and test/<class>/, or a set's name."),
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="Any recipe key, e.g. dverge.epochs=10. Repeats.")
]


@app.command(epilog="Example: dverge train --data photos/ --set dverge.epochs=20")
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
    set_: Settings = None,
    dry_run: Annotated[bool, typer.Option(help="Print the settings and stop.")] = False,
) -> None:
    """Train standard members, then make them a DVERGE ensemble."""
    from training.config import MAX_SEED

    if seed is not None and seed > MAX_SEED:
        raise UserError(f"seed {seed}", f"0 to {MAX_SEED}; larger ones are kept for surrogates")
    config = _config(recipe, data, members, seed, set_)
    if dry_run:
        typer.echo(json.dumps(config.to_json(), indent=2))
        return
    from training.train import pick_device
    from training.train import train as train_run

    chosen = pick_device(device)
    if resume and out is None:
        out = _latest()
    out = out or Path("runs") / f"{config.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    typer.echo(f"training '{config.name}' on {chosen} into {out}", err=True)
    run = train_run(config, out, device=chosen, resume=resume)
    accuracy = run.checkpoint["holdout_accuracy"]
    typer.echo(f"finished {out}: held-out accuracy {accuracy:.3f}")


@app.command(epilog="Example: dverge export model.onnx --run runs/latest")
def export(
    model: Annotated[Path, typer.Argument(help="The file to write.", metavar="MODEL.onnx")],
    run: Annotated[Path, typer.Option(help="The finished run to export.")] = Path("runs/latest"),
) -> None:
    """Fuse a run's members into one averaged-logit ONNX graph, checked against torch."""
    if model.suffix != ".onnx":
        raise UserError(f"'{model}' as the model's name", "a file name ending in .onnx")
    from export.export import export as export_run
    from training.run import Run

    parity = export_run(Run.open_finished(run), model)
    size = model.stat().st_size / 1e6
    typer.echo(f"wrote {model} ({size:.1f} MB), equal to torch: {parity}")


@app.command(
    "verify-robustness",
    epilog="Example: dverge verify-robustness model.onnx --min-accuracy 0.8 --at-eps 0.1",
)
def verify_robustness(
    model: Annotated[Path, typer.Argument(help="The model file.", metavar="MODEL.onnx")] = Path(
        "model.onnx"
    ),
    preset: Annotated[str, typer.Option(help="The attack suite: quick.")] = "quick",
    run: Annotated[
        Path | None, typer.Option(help="The run it was exported from. [default: found in runs/]")
    ] = None,
    data: Data = None,
    eps: Annotated[
        str | None, typer.Option(help="Linf radii, e.g. 0.05,0.1. [default: the recipe's]")
    ] = None,
    images: Annotated[int | None, typer.Option(help="Use only this many test images.")] = None,
    device: Device = "auto",
    seed: Annotated[int, typer.Option(help="Of the attacks' random starts.")] = 0,
    min_accuracy: Annotated[
        float | None, typer.Option(help="Exit with 1 if robust accuracy is below this.")
    ] = None,
    at_eps: Annotated[
        float | None, typer.Option(help="Where --min-accuracy is read. [default: largest eps]")
    ] = None,
    threat: Annotated[
        str, typer.Option(help="Which figure --min-accuracy reads: transfer, white-box or all.")
    ] = "transfer",
) -> None:
    """Attack the model file and write a report beside it.

    Exit codes: 0 VALID, 1 --min-accuracy not met, 3 INCONCLUSIVE or INVALID.
    """
    radii = _eps(eps)
    if preset != "quick":
        raise UserError(f"preset '{preset}'", "quick")
    if threat not in ("transfer", "white-box", "all"):
        raise UserError(f"threat '{threat}'", "transfer, white-box or all")
    if images is not None and images < 1:
        raise UserError(f"--images {images}", "1 or more")
    if min_accuracy is not None and not 0 <= min_accuracy <= 1:
        raise UserError(f"--min-accuracy {min_accuracy}", "a share from 0 to 1")
    if at_eps is not None and radii and at_eps not in radii:
        raise UserError(f"--at-eps {at_eps:g}", f"one of --eps {eps}")
    from training.train import pick_device
    from verification.verify import Evaluation, verify

    report = verify(
        Evaluation(
            model=model,
            run=run,
            data=data,
            eps=radii,
            images=images,
            seed=seed,
            device=pick_device(device),
            at_eps=at_eps,
        )
    )
    from dverge_serve.cli.tables import report_table
    from dverge_serve.report import report_path

    report_table(report)
    typer.echo(f"verdict {report['verdict']}; report in {report_path(model)}")
    if report["verdict"] != "VALID":
        raise typer.Exit(Exit.NOT_VALID)
    if min_accuracy is not None:
        _require(report, min_accuracy, at_eps, threat.replace("-", "_"))


@app.command(epilog="Example: dverge demo")
def demo(
    out: Annotated[Path, typer.Option(help="Where the run and the model go.")] = Path("demo"),
    device: Device = "auto",
) -> None:
    """Go the whole way on embedded digit images: train, export, verify, compare."""
    from dverge_serve.cli.tables import demo_table
    from export.export import export as export_run
    from training.config import load_recipe
    from training.train import pick_device
    from training.train import train as train_run
    from verification.verify import Evaluation, verify

    config, chosen, model = load_recipe("digits"), pick_device(device), out / "model.onnx"
    typer.echo(f"1/3 training {config.members} members on digit images", err=True)
    run = train_run(config, out / "run", device=chosen, resume=True)
    typer.echo("2/3 exporting one ONNX graph", err=True)
    export_run(run, model)
    typer.echo("3/3 attacking the exported file and an undefended control", err=True)
    report = verify(Evaluation(model=model, run=run.path, device=chosen))
    demo_table(report, DEMO_EPS)
    typer.echo(f"verdict {report['verdict']}. Serve it with: dverge serve {model}")
    if report["verdict"] != "VALID":
        raise typer.Exit(Exit.NOT_VALID)


def _config(
    recipe: str | None,
    data: str | None,
    members: int | None,
    seed: int | None,
    settings: list[str] | None,
) -> Config:
    from training.config import data_overrides, load_recipe, parse_settings

    overrides: dict[str, Any] = data_overrides(data) if data is not None else {}
    if members is not None:
        overrides["members"] = members
    if seed is not None:
        overrides["seed"] = seed
    default = "images" if overrides.get("data.name") == "imagefolder" else "digits"
    return load_recipe(recipe or default, overrides | parse_settings(settings or []))


def _latest() -> Path:
    latest = Path("runs/latest")
    if latest.is_file():
        return latest.parent / latest.read_text().strip()
    if not latest.is_dir():
        raise UserError("--resume without --out, and no runs/latest", "a run to go on with")
    return latest.resolve()


def _eps(text: str | None) -> tuple[float, ...]:
    try:
        radii = tuple(float(part) for part in text.split(",")) if text else ()
    except ValueError:
        radii = (0.0,)
    if not all(0 < radius <= 1 for radius in radii):
        raise UserError(f"--eps {text}", "radii in (0, 1] with commas between, e.g. 0.05,0.1")
    return tuple(sorted(set(radii)))


def _require(
    report: dict[str, Any],
    least: float,
    at_eps: float | None,
    threat: Literal["transfer", "white_box", "all"] | str,
) -> None:
    rows = report["robust_accuracy"]
    row = next((row for row in rows if row["eps"] == at_eps), rows[-1])
    value = row[threat]["value"]
    told = f"{threat} robust accuracy {value:.3f} at eps {row['eps']:g}"
    if value < least:
        raise NotMetError(told, f"at least {least:g}")
    typer.echo(f"met: {told}, at least {least:g} was asked for")
