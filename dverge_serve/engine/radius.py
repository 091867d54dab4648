"""Radii of attacks as people write them: 0.1, or 8/255."""

from __future__ import annotations

from fractions import Fraction

LEVELS = 255  # the largest 8-bit value


def parse_radius(given: object) -> float:
    """Return a radius given as a number, or as text with or without a fraction bar.

    Raises:
        ValueError: neither a number nor a fraction.
        TypeError: nothing that could be one.
    """
    if not isinstance(given, str):
        return float(given)  # type: ignore[arg-type]
    try:
        return float(Fraction(given.replace(" ", "")))
    except ZeroDivisionError as error:
        raise ValueError(given) from error


def written(eps: float, given: str = "") -> str:
    """Return a radius for people; a fraction both ways: "8/255 = 0.0314".

    Args:
        eps: the radius.
        given: how its user wrote it; without it, whole 8-bit steps are recognised.
    """
    steps = round(eps * LEVELS)
    if not given and steps and eps == steps / LEVELS < 1:
        given = f"{steps}/{LEVELS}"
    return f"{given} = {eps:.3g}" if "/" in given else f"{eps:g}"
