"""What a foreign classifier expects as its input, and what its outputs mean.

Attacks work on images `[N, C, H, W]` in `[0,1]`; everything between these and the model is here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from dverge_serve.errors import UserError, one_of

Layout = Literal["nchw", "nhwc"]
Channels = Literal["rgb", "bgr"]
Outputs = Literal["logits", "softmax", "labels"]
Floats = npt.NDArray[np.float32]

LEAST_PROBABILITY = float(np.finfo(np.float32).tiny)  # a softmax of float32 holds nothing smaller
OTHERS = -20.0  # the score of every class but the answer, where a model gives labels alone
WORDS = {"layout": get_args(Layout), "channels": get_args(Channels), "outputs": get_args(Outputs)}


@dataclass(frozen=True, kw_only=True)
class Contract:
    """The form of a classifier's input and outputs.

    The model's input is `(image * pixel_max - mean) / std`.

    Args:
        layout: `nchw` or `nhwc`.
        pixel_max: the value of white before `mean` and `std`: 1 or 255.
        mean: of each channel in the model's order, or one for all.
        std: as `mean`.
        channels: `rgb` or `bgr`; without meaning for one channel.
        outputs: `logits`; `softmax`, whose logarithm is taken as logits; `labels`, class indices.
        order: for each class of the data, its place among the model's scores; empty: the same.

    Raises:
        UserError: a value outside these.
    """

    layout: Layout = "nchw"
    pixel_max: int = 1
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    channels: Channels = "rgb"
    outputs: Outputs = "logits"
    order: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name, known in WORDS.items():
            if (word := getattr(self, name)) not in known:
                raise UserError(f"`{name}` {word}", one_of(known))
        if self.pixel_max not in (1, 255):
            raise UserError(f"`pixel_max` {self.pixel_max}", "1 or 255")
        for name in ("mean", "std"):
            values = getattr(self, name)
            object.__setattr__(self, name, tuple(map(float, values)))
            if len(values) not in (1, 3) or not all(map(math.isfinite, values)):
                raise UserError(f"`{name}` {shown(values)}", "1 or 3 numbers, e.g. 0.5,0.5,0.5")
        if not all(value > 0 for value in self.std):
            raise UserError(f"`std` {shown(self.std)}", "numbers above 0")

    def __str__(self) -> str:
        parts = [self.layout.upper(), f"0..{self.pixel_max}"]
        if self.normalised:
            parts += [f"mean {shown(self.mean)}", f"std {shown(self.std)}"]
        return ", ".join([*parts, self.channels.upper(), self.outputs])

    @property
    def normalised(self) -> bool:
        """Whether `mean` and `std` change anything."""
        return any(self.mean) or any(value != 1 for value in self.std)

    def encode(self, images: Floats) -> Floats:
        """Return the model's input, float32, for images `[N, C, H, W]` in `[0,1]`."""
        x = images * np.float32(self.pixel_max)
        if self.channels == "bgr":
            x = x[:, ::-1]
        if self.normalised:
            mean, std = (
                np.array(each, np.float32)[:, None, None] for each in (self.mean, self.std)
            )
            x = (x - mean) / std
        return np.ascontiguousarray(x.transpose(0, 2, 3, 1) if self.layout == "nhwc" else x)

    def decode(self, outputs: npt.NDArray[Any]) -> Floats:
        """Return logits `[N, classes]`, float32, in the order of the data's classes.

        Args:
            outputs: scores `[N, classes]` or `[N, classes, 1, 1]`, or labels `[N]`.

        Raises:
            UserError: a label that is no class.
        """
        flat = outputs.reshape(len(outputs), -1)
        if self.outputs == "labels":
            if (odd := flat[(flat < 0) | (flat >= len(self.order))]).size:
                raise UserError(f"the model answers class {odd[0]}", f"0 to {len(self.order) - 1}")
            scores = np.full((len(flat), len(self.order)), OTHERS, np.float32)
            np.put_along_axis(scores, flat.astype(np.int64), 0.0, axis=1)
        else:
            scores = flat.astype(np.float32)
        if self.outputs == "softmax":
            scores = np.log(np.maximum(scores, np.float32(LEAST_PROBABILITY)))
        return scores[:, list(self.order)] if self.order else scores

    def to_json(self) -> dict[str, Any]:
        """Return the form kept in the report."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }

    @classmethod
    def checked(cls, given: Mapping[str, Any]) -> Contract:
        """Return the contract with these fields, as a user gives them.

        Raises:
            UserError: a field that a user cannot give, or a value outside its range.
        """
        names = [each.name for each in fields(cls) if each.name != "order"]
        for name in given:
            if name not in names:
                raise UserError(f"`contract` with '{name}'", one_of(names))
        return cls(**given)

    @classmethod
    def from_json(cls, table: Mapping[str, Any]) -> Contract:
        """Read `to_json`'s form back."""
        known = {each.name for each in fields(cls)}
        found: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in table.items()
            if name in known
        }
        return cls(**found)


def shown(values: Sequence[float]) -> str:
    """Return numbers as they are given: `0.5,0.5,0.5`."""
    return ",".join(f"{value:g}" for value in values)


def looks_like_softmax(scores: npt.NDArray[Any]) -> bool:
    """Whether scores `[N, classes]` are never negative and sum to one."""
    flat = scores.reshape(len(scores), -1)
    return bool((flat >= 0).all() and (np.abs(flat.sum(1) - 1) < 1e-3).all())
