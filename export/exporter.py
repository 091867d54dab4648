"""From members to a checked `model.onnx`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from dverge_serve.engine.card import Precision
from dverge_serve.engine.session import Engine
from dverge_serve.errors import NotMetError, UserError
from dverge_serve.files import atomic_path
from export.fusion_choice import Ask, Choice, Target, build_best
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
from export.source import Source, Which, from_run, noise
from training.runs.directory import Run


@dataclass(frozen=True)
class Exported:
    """What was written.

    Args:
        choice: how the members were fused.
        parity: how near torch the fp32 graph is.
        agreement: how often the variant answers as fp32 does; None for fp32 itself.
    """

    choice: Choice
    parity: Parity
    agreement: Agreement | None = None

    def __str__(self) -> str:
        variant = f"; {self.agreement}" if self.agreement else ""
        return f"{self.choice}; equal to torch: {self.parity}{variant}"


def export(
    run: Run,
    path: Path,
    *,
    which: Which = "members",
    form: Ask = "auto",
    target: Target = "auto",
    precision: Precision = "fp32",
) -> Exported:
    """Fuse a finished run's members into `path`, after parity with torch has been checked.

    Args:
        run: a finished run.
        path: where `model.onnx` goes; an older file there stays until the new one has passed.
        which: the result, or the standard members after stage one (the undefended control).
        form: how the members are fused; `auto` measures.
        target: the device to measure for; `auto` is what is here.
        precision: of the weights and the arithmetic.

    Raises:
        NotMetError: the file does not say what torch says, or a variant not what fp32 says;
            nothing is written.
        UserError: the run's weights are damaged, `path` cannot be written, the form cannot be, or
            there are no images to calibrate int8 on.
    """
    source = from_run(run, which)
    return export_source(source, path, form=form, target=target, precision=precision)


def export_source(
    source: Source,
    path: Path,
    *,
    form: Ask = "auto",
    target: Target = "auto",
    precision: Precision = "fp32",
) -> Exported:
    """Fuse any source's members into `path`; see `export`."""
    if precision == "int8" and target == "cuda":
        raise UserError("--precision int8 for cuda", "fp16 there; int8 is for CPUs")
    images = _images(source, precision)
    choice, data = build_best(source.members, source.card, form, target)
    with atomic_path(path) as part:
        part.write_bytes(data)
        with Engine(part, device="cpu") as parent:
            parity = check(parent, source.members, source.probe)
            if not parity.holds:
                raise NotMetError(
                    f"the exported graph does not match torch: {parity}",
                    "equal answers",
                    "no file was written; please report this with the settings of the training",
                )
            if precision == "fp32":
                return Exported(choice, parity)
            choice = _variant_form(choice, form, precision)
            card = replace(
                source.card,
                form=choice.form,
                target=choice.target,
                precision=precision,
                parent_sha256=parent.sha256,
            )
            if choice.form != parent.card.form:
                data = build_graph(source.members, card)
            calibration, compared = images
            part.write_bytes(convert(data, card, precision, calibration))
            with Engine(part, device="cpu") as variant:
                found = agreement(parent, variant, compared, precision)
        if not found.holds:
            raise NotMetError(
                f"the {precision} variant does not answer as fp32 does: {found}",
                next_step="no file was written; use another precision",
            )
    return Exported(choice, parity, found)


def _variant_form(choice: Choice, ask: Ask, precision: Precision) -> Choice:
    """Return the form of a variant: integer kernels are made for plain convolutions.

    Measured on 3 ResNet-20: int8 in branches is 1.9 times as fast as fp32, grouped only 1.2.
    """
    if precision == "int8" and ask == "auto":
        return Choice("branches", choice.target)
    return choice


def _images(source: Source, precision: Precision) -> tuple[Pixels | None, Pixels]:
    """Return images to calibrate on and to compare on; those for fp32 are not used."""
    if precision == "fp32":
        return None, source.probe
    if precision == "int8":
        return need_images(source.config)
    if at_hand(source.config):
        return images_for(source.config)
    return None, noise(source.card.input_shape, COMPARED)  # fp16 needs no images, so none fetched
