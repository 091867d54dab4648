"""Verification: attack the very file that will be served, and judge what the figures are worth.

report = verify("model.onnx", run="runs/latest", eps=[0.1])
report.verdict, report.robust_accuracy[0.1].transfer
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dverge_serve.engine.radius import parse_radius
from dverge_serve.engine.report import Report
from dverge_serve.errors import UserError
from verification.config import VerificationConfig, radii

if TYPE_CHECKING:
    import torch

    from training.pgd import Norm
    from training.runs.directory import Run
    from verification.attacks.attack import Attack

__all__ = ["Report", "verify"]


def verify(
    model: str | Path,
    *,
    run: Run | str | Path | None = None,
    preset: str = "quick",
    eps: float | str | Iterable[float | str] = (),
    norm: Norm = "linf",
    data: str | Path | None = None,
    images: int | None = None,
    checkpoint: str | Path | None = None,
    labels: str | Path | None = None,
    contract: Mapping[str, Any] | None = None,
    search_contract: bool = False,
    surrogates: str | Path | Iterable[str | Path] = (),
    against: str | Path | None = None,
    url: str | None = None,
    requests: int = 2000,
    requests_a_second: float = 50.0,
    seed: int = 0,
    device: str | torch.device = "auto",
    at_eps: float | str | None = None,
    attacks: Iterable[Attack] = (),
) -> Report:
    """Attack a model file, write the report and its evidence beside it, and return the report.

    Args:
        model: the ONNX file; `model.onnx` gets `model.report.json`, `model.report.html` and
            `model.report/`.
        run: the training run that the model was exported from, for white-box attacks; by default
            the one with these weights, under `runs/` or beside the file.
        preset: the attack suite: `quick`, `standard` (the paper's protocol) or `full`.
        eps: one radius or several, pixels in `[0,1]`, as numbers or as text such as `8/255`; by
            default the recipe's, for a foreign classifier `auto`. That finds the radius at which
            the undefended control is halved, and takes half and twice of it as well.
        norm: of the radii: `linf` or `l2`.
        data: a folder of images or a data set's name; by default the run's own.
        images: number of test images; by default the recipe's limit, else all; for `quick` as many
            as have 0.25 million pixels, at least 120.
        checkpoint: the weights file that the model was exported from, for gradients instead of a
            run.
        labels: file with the class names of a foreign classifier, in the order of its scores.
        contract: what of a foreign classifier's `Contract` is known: `layout`, `pixel_max`, `mean`,
            `std`, `channels`, `outputs`. Layout and outputs are otherwise read off the file, the
            others are `[0,1]` and RGB.
        search_contract: instead try the usual contracts on held-out training images.
        surrogates: what to attack from: run directories, published weights files, or folders of
            them, in any mixture; by default trained once and cached.
        against: another model file, attacked alike and compared image by image.
        url: a live service of this model, attacked as well: through `/predict` of
            `http://host:port`, or through a server of the Open Inference Protocol V2 at
            `http://host:port/v2/models/NAME`.
        requests: most requests to the service in total.
        requests_a_second: most requests per second.
        seed: of the attacks' random draws.
        device: `auto`, `cpu`, `cuda` or a torch device; the model itself runs in ONNX Runtime.
        at_eps: a radius that must be among those evaluated.
        attacks: further attacks, run after the preset's, in the same norm.

    Raises:
        UserError: a setting out of range; no such model, no data for it, data with other classes;
            a folder that cannot be written; a live service that does not answer, or that stopped
            answering (after all else was written).
    """

    def path(given: str | Path | None) -> Path | None:
        return None if given is None else Path(given)

    chosen = radii(eps)
    try:
        at = None if at_eps is None else parse_radius(at_eps)
    except (TypeError, ValueError) as error:
        raise UserError(f"`at_eps` {at_eps!r}", "a radius, e.g. 0.1 or 8/255") from error
    config = VerificationConfig(
        model=Path(model),
        run=path(run if run is None or isinstance(run, str | Path) else run.path),
        preset=preset,
        eps=chosen.values,
        eps_given=chosen.given,
        norm=norm,
        data=None if data is None else str(data),
        images=images,
        checkpoint=path(checkpoint),
        labels=None if labels is None else str(labels),
        contract=dict(contract or {}),
        search_contract=search_contract,
        surrogates=tuple(
            map(Path, (surrogates,) if isinstance(surrogates, str | Path) else surrogates)
        ),
        against=path(against),
        url=url,
        requests=requests,
        requests_a_second=requests_a_second,
        seed=seed,
        device=device,
        at_eps=at,
        attacks=tuple(attacks),
    )
    from verification.pipeline import attack_and_report

    return attack_and_report(config)
