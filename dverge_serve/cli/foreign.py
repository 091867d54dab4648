"""The options of `verify-robustness` that describe a classifier which is not ours."""

from __future__ import annotations

from itertools import zip_longest
from typing import Annotated, Any

import typer

from dverge_serve.cli.panels import InPanels
from dverge_serve.errors import UserError, one_of

FOREIGN = ("given", "auto")

Foreign = Annotated[
    str | None,
    typer.Option(
        help="A classifier not ours, with --labels: given, or auto, which tries input contracts "
        "on clean images. Without a value: given.",
        metavar="[given|auto]",
    ),
]
Labels = Annotated[
    str | None, typer.Option(help="With --foreign: its classes in its order, one name a line.")
]
Layout = Annotated[
    str | None, typer.Option(help="With --foreign: nchw or nhwc. [default: its input's shape]")
]
PixelMax = Annotated[
    int | None, typer.Option(help="With --foreign: the value of white, 1 or 255. [default: 1]")
]
Mean = Annotated[
    str | None,
    typer.Option(help="With --foreign: subtracted after --pixel-max, e.g. 0.485,0.456,0.406."),
]
Std = Annotated[str | None, typer.Option(help="With --foreign: divided by, after --mean.")]
Channels = Annotated[str | None, typer.Option(help="With --foreign: rgb or bgr. [default: rgb]")]
Outputs = Annotated[
    str | None,
    typer.Option(help="With --foreign: logits, softmax or labels. [default: what it gives]"),
]


class OptionalForeign(InPanels):
    """A command whose option `--foreign` may stand without a value."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse, with the value `given` after a `--foreign` that has none."""
        told: list[str] = []
        for word, after in zip_longest(args, args[1:]):
            told += [word, "given"] if word == "--foreign" and after not in FOREIGN else [word]
        return list(super().parse_args(ctx, told))


def contract(
    foreign: str | None, labels: str | None, mean: str | None, std: str | None, **given: Any
) -> dict[str, Any]:
    """Return the fields of the contract that are given.

    Raises:
        UserError: numbers that are none, or options without --foreign.
    """
    if foreign is not None and foreign not in FOREIGN:
        raise UserError(f"--foreign {foreign}", one_of(FOREIGN))
    if (foreign is None) != (labels is None):
        raise UserError("--foreign and --labels go together", "both, or neither")
    found = {name: value for name, value in given.items() if value is not None}
    for name, text in (("mean", mean), ("std", std)):
        if text is None:
            continue
        try:
            found[name] = tuple(map(float, text.split(",")))
        except ValueError as error:
            raise UserError(f"--{name} {text}", "1 or 3 numbers, e.g. 0.5,0.5,0.5") from error
    if found and foreign is None:
        raise UserError(f"--{sorted(found)[0].replace('_', '-')} without --foreign", "both")
    return found
