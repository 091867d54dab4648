"""The command that attacks a model file: verify-robustness."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from dverge_serve.cli import app
from dverge_serve.cli import foreign as options
from dverge_serve.cli.options import SAME_COMMAND, Data, Device, Model
from dverge_serve.engine.radius import parse_radius
from dverge_serve.errors import Exit, NotMetError, UserError, interruptible

if TYPE_CHECKING:
    from dverge_serve.engine.rates import Rate
    from dverge_serve.engine.report import Report
    from training.pgd import Norm


@app.command(
    "verify-robustness",
    cls=options.OptionalForeign,
    epilog="Example: dverge verify-robustness model.onnx --min-accuracy 0.6 --at-eps 0.03",
)
def verify_robustness(
    model: Model = Path("model.onnx"),
    preset: Annotated[
        str, typer.Option(help="The attack suite: quick, standard (the paper's protocol) or full.")
    ] = "quick",
    run: Annotated[
        Path | None, typer.Option(help="The run it was exported from. [default: found in runs/]")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="The weights file it was exported from, in place of a run.")
    ] = None,
    data: Data = None,
    foreign: options.Foreign = None,
    labels: options.Labels = None,
    layout: options.Layout = None,
    pixel_max: options.PixelMax = None,
    mean: options.Mean = None,
    std: options.Std = None,
    channels: options.Channels = None,
    outputs: options.Outputs = None,
    surrogates: Annotated[
        list[Path] | None,
        typer.Option(
            help="Runs, weights files or folders of them to attack from. Repeats. "
            "[default: trained, cached]"
        ),
    ] = None,
    eps: Annotated[
        str | None,
        typer.Option(
            help="Radii, e.g. 0.05,0.1 or 8/255, or auto. [default: the recipe's; foreign: auto]"
        ),
    ] = None,
    norm: Annotated[str, typer.Option(help="Of the radii: linf or l2.")] = "linf",
    images: Annotated[
        int | None,
        typer.Option(
            help="Use only this many test images. [default: all, of quick 0.25 million pixels]"
        ),
    ] = None,
    against: Annotated[
        Path | None, typer.Option(help="Another model, attacked alike and compared.")
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(help="A live service of this model: http://host:port, or .../v2/models/NAME."),
    ] = None,
    requests: Annotated[int, typer.Option(help="With --url: most requests.", min=10)] = 2000,
    rate: Annotated[
        float, typer.Option(help="With --url: most requests a second.", min=0.1)
    ] = 50.0,
    junit: Annotated[Path | None, typer.Option(help="Write the checks as JUnit XML.")] = None,
    bom: Annotated[
        Path | None, typer.Option(help="Write the figures as a CycloneDX ML-BOM.")
    ] = None,
    device: Device = "auto",
    seed: Annotated[int, typer.Option(help="Of the attacks' random starts.")] = 0,
    min_accuracy: Annotated[
        float | None, typer.Option(help="Exit with 1 if robust accuracy is below this.")
    ] = None,
    at_eps: Annotated[
        str | None, typer.Option(help="Where --min-accuracy is read. [default: largest eps]")
    ] = None,
    threat: Annotated[
        str, typer.Option(help="Which figure --min-accuracy reads: transfer, white-box or all.")
    ] = "transfer",
) -> None:
    """Attack a model file, report, judge.

    Exit codes: 0 VALID, 1 --min-accuracy not met, 3 INCONCLUSIVE or INVALID.
    """
    contract = options.contract(
        foreign,
        labels,
        mean,
        std,
        layout=layout,
        pixel_max=pixel_max,
        channels=channels,
        outputs=outputs,
    )
    if threat not in ("transfer", "white-box", "all"):
        raise UserError(f"threat '{threat}'", "transfer, white-box or all")
    if min_accuracy is not None and not 0 <= min_accuracy <= 1:
        raise UserError(f"--min-accuracy {min_accuracy}", "a share from 0 to 1")
    from dverge_serve.cli import as_flags
    from dverge_serve.cli.tables import live_line, report_table, verdict_lines
    from dverge_serve.engine.provenance import read_provenance
    from dverge_serve.engine.report import page_path, report_path
    from dverge_serve.files import check_writable, pretty_json, write_atomic
    from verification import verify
    from verification.report.bill_of_materials import bill_of_materials
    from verification.report.junit import junit as junit_xml

    for wanted in (junit, bom):
        if wanted is not None:
            check_writable(wanted)
    with interruptible(SAME_COMMAND):
        report = verify(
            model,
            run=run,
            preset=preset,
            checkpoint=checkpoint,
            labels=labels,
            contract=contract,
            search_contract=foreign == "auto",
            data=data,
            surrogates=surrogates or (),
            against=against,
            eps=eps.split(",") if eps else (),
            url=url,
            requests=requests,
            requests_a_second=rate,
            norm=cast("Norm", norm),
            images=images,
            seed=seed,
            device=device,
            at_eps=at_eps,
        )
    report_table(report)
    if report.live is not None:
        typer.echo(live_line(report.live))
    typer.echo(f"report in {report_path(model)} and {page_path(model)}")
    met, told = _demand(report, min_accuracy, at_eps, threat)
    if junit is not None:
        case = [] if min_accuracy is None else [(f"at least {min_accuracy:g}", met, told)]
        write_atomic(junit, as_flags(junit_xml(report, case).decode()).encode())
    if bom is not None:
        provenance = read_provenance(model, report.model.sha256)
        write_atomic(bom, pretty_json(bill_of_materials(report, provenance)))
    for line in verdict_lines(report):
        typer.echo(as_flags(line))
    if report.verdict != "VALID":
        raise typer.Exit(Exit.NOT_VALID)
    if not met:
        raise NotMetError(told, f"at least {min_accuracy:g}")
    if min_accuracy is not None:
        typer.echo(f"met: {told}, at least {min_accuracy:g} was asked for")


@app.command(epilog="Example: dverge replay model.report.json")
def replay(
    report: Annotated[
        Path, typer.Argument(help="The report; model and images beside it.", metavar="REPORT.json")
    ] = Path("model.report.json"),
) -> None:
    """Score a report's images again.

    They are those saved with it. Every figure must come out as it stands there; exit code 1 if one
    does not.
    """
    from verification.replay import replay as replay_report

    found = replay_report(report)
    for place, told, again in found.differences[:20]:
        typer.echo(f"{place}: the report says {told}, the replay {again}")
    if found.differences:
        raise NotMetError(
            f"{len(found.differences)} of {found.figures} figures came out otherwise", "none"
        )
    typer.echo(f"{found.images} images scored again; all {found.figures} figures are the same")


def _demand(
    report: Report, least: float | None, at_eps: str | None, threat: str
) -> tuple[bool, str]:
    """Return whether the accuracy asked for is there, and what is there."""
    eps = max(report.robust_accuracy) if at_eps is None else parse_radius(at_eps)
    found: Rate | None = getattr(report.robust_accuracy[eps], threat.replace("-", "_"))
    if found is None:
        return least is None, f"{threat} robust accuracy was not measured"
    told = f"{threat} robust accuracy {found.value:.3f} at eps {report.radius(eps)}"
    return least is None or found.value >= least, told
