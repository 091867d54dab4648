"""A model under attack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
from torch import nn

from dverge_serve.engine.outputs import Scores


class Scorer(Protocol):
    """The engine, or anything that scores images as it does."""

    def run_all(self, images: npt.NDArray[np.float32]) -> Scores:
        """Return the scores of float32 images `[N, C, H, W]` in `[0,1]`."""


@dataclass(frozen=True)
class Target:
    """A model under attack: the engine that scores it, and its weights where they are known.

    Args:
        engine: scores every image that counts.
        members: for gradients, in evaluation mode; None where there are none.
        weights: a hash of what the gradients come from.
        kin: hashes of sources that share networks with it; none of them attacks it.
    """

    engine: Scorer
    members: Sequence[nn.Module] | None
    weights: str = ""
    kin: frozenset[str] = frozenset()
