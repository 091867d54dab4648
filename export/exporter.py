"""Export: fuse an ensemble, check the file against torch, write it and its provenance."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import get_args

from dverge_serve.engine.card import Precision
from dverge_serve.engine.provenance import add_report, provenance_path, statement
from dverge_serve.engine.report import read_report
from dverge_serve.engine.session import Engine
from dverge_serve.errors import NotMetError, UserError
from dverge_serve.files import atomic_path, pretty_json, sha256, write_atomic
from export.fusion_choice import FusionPlan, RequestedMode, Target, build_best
from export.graph import build_graph
from export.parity import Parity, check
from export.precision import (
    COMPARED,
    Agreement,
    Pixels,
    agreement,
    at_hand,
    convert,
    images_for,
    need_images,
)
from export.source import ExportSource, Which, from_run, noise
from training.recipe import data_overrides
from training.runs.directory import Run


@dataclass(frozen=True)
class Exported:
    """A model file that passed its checks.

    Args:
        plan: how the members were fused.
        parity: how near torch the fp32 graph is.
        agreement: how often the variant answers as fp32 does; None for fp32 itself.
    """

    plan: FusionPlan
    parity: Parity
    agreement: Agreement | None = None

    def __str__(self) -> str:
        variant = f"; {self.agreement}" if self.agreement else ""
        return f"{self.plan}; equal to torch: {self.parity}{variant}"


def export(
    run: Run | ExportSource | str | Path,
    path: str | Path,
    *,
    which: Which = "members",
    form: RequestedMode = "auto",
    target: Target = "auto",
    precision: Precision = "fp32",
    data: str | Path | None = None,
    licence: str = "",
    data_licence: str = "",
) -> Exported:
    """Fuse an ensemble's members into the file `path`, after parity with torch has been checked.

    Its provenance is written beside it, `model.provenance.json` for `model.onnx`.

    Args:
        run: a finished run or its directory; or members from elsewhere, as `from_checkpoint` and
            `from_list` return them.
        path: where `model.onnx` goes; an older file there stays until the new one has passed.
        which: of a run's members the final ones, or the standard members after stage one (the
            undefended control).
        form: how the members are fused: `grouped` is one network, `branches` is one for each
            member, `auto` is whichever the rule of `export.fusion_choice` says, `measure` whichever
            measures faster here.
        target: the device that the file is meant for; `auto` is what is here.
        precision: of the weights and the arithmetic.
        data: the folder or data set of the images that int8 is calibrated on, if not where the run
            found them.
        licence: of the model, for its provenance, e.g. an SPDX identifier.
        data_licence: of the training images, for the provenance.

    Raises:
        NotMetError: the file's logits differ from torch's, or a variant's answers from those of
            fp32; nothing is written.
        UserError: the run is unfinished or damaged, `path` cannot be written, the members cannot be
            fused in that form, there are no images to calibrate int8 on, or an argument has an
            unknown value.
    """
    for name, value, known in (
        ("which", which, get_args(Which)),
        ("form", form, get_args(RequestedMode)),
        ("target", target, get_args(Target)),
        ("precision", precision, get_args(Precision)),
    ):
        if value not in known:
            raise UserError(f"`{name}` {value}", f"one of {', '.join(known)}")
    if precision == "int8" and target == "cuda":
        raise UserError("`precision` int8 for cuda", "fp16 there; int8 is for CPUs")
    if isinstance(run, str | Path):
        run = Run.open_finished(Path(run))
    source = from_run(run, which) if isinstance(run, Run) else run
    if data is not None:
        source = replace(source, config=source.config.overridden(data_overrides(data)))
    if precision == "int8":
        target = "cpu"  # CUDA has no kernels for it
    images = _images(source, precision)
    path = Path(path)
    plan, model = build_best(source.ensemble, source.card, form, target)
    with atomic_path(path) as part:
        part.write_bytes(model)
        with Engine(part, device="cpu") as parent:
            parity, card, found = check(parent, source.ensemble, source.probe), parent.card, None
            if not parity.holds:
                raise NotMetError(
                    f"the exported graph does not match torch: {parity}",
                    "equal answers",
                    "no file was written; please report this with the settings of the training",
                )
            if precision != "fp32":
                plan = _variant_plan(plan, form, precision)
                card = replace(
                    source.card,
                    form=plan.form,
                    target=plan.target,
                    precision=precision,
                    parent_sha256=parent.sha256,
                )
                if plan.form != parent.card.form:
                    model = build_graph(source.ensemble, card)
                calibration, compared = images
                model = convert(model, card, precision, calibration)
                part.write_bytes(model)
                with Engine(part, device="cpu") as variant:
                    found = agreement(parent, variant, compared, precision)
        if found is not None and not found.holds:
            raise NotMetError(
                f"the {precision} variant does not answer as fp32 does: {found}",
                next_step="no file was written; use another precision",
            )
    record = statement(
        card,
        path.name,
        sha256(model),
        trained=source.trained,
        parity=asdict(parity),
        licence=licence,
        data_licence=data_licence,
    )
    write_atomic(provenance_path(path), pretty_json(record))
    if report := read_report(path, sha256(model)):  # of an earlier export of the same bytes
        add_report(path, sha256(model), report["verdict"])
    return Exported(plan, parity, found)


def _variant_plan(plan: FusionPlan, requested: RequestedMode, precision: Precision) -> FusionPlan:
    """Return the plan of a variant: integer kernels are made for plain convolutions.

    Measured on 3 ResNet-20: int8 in branches is 1.9 times as fast as fp32, grouped only 1.2.
    """
    if precision == "int8" and requested in ("auto", "measure"):
        return FusionPlan("branches", plan.target)
    return plan


def _images(source: ExportSource, precision: Precision) -> tuple[Pixels | None, Pixels]:
    """Return images to calibrate on and to compare on; those for fp32 are not used."""
    if precision == "fp32":
        return None, source.probe
    if precision == "int8":
        return need_images(source.config)
    if at_hand(source.config):
        return images_for(source.config)
    return None, noise(source.card.input_shape, COMPARED)  # fp16 needs no images, so none fetched
