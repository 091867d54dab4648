"""The control: an undefended model that the attacks must break, or they prove nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from training.models.member import Member
from training.runs.directory import Run
from verification.gradients import ready
from verification.surrogates import Surrogate, part_sha256


@dataclass(frozen=True)
class Control:
    """Some undefended networks of a run.

    Args:
        what: `own`, or the surrogate's name.
        run: which trained them.
        which: its members, or those before DVERGE.
        indices: which of them.
    """

    what: str
    run: Run
    which: Literal["standard", "members"]
    indices: tuple[int, ...]

    @property
    def weights(self) -> str:
        """Hash of the weights."""
        return part_sha256(self.run_weights, self.indices, self.run.config.members)

    @property
    def run_weights(self) -> str:
        """Hash of all networks of the run that are of this kind."""
        return str(self.run.checkpoint[f"{self.which}_sha256"])

    def members(self, device: torch.device) -> list[Member]:
        """Return the networks, to take gradients from."""
        whole = self.run.members(self.which)
        return [ready(whole[index], device) for index in self.indices]

    def strangers(self, surrogates: Sequence[Surrogate]) -> list[Surrogate]:
        """Return the surrogates that share no network with it, which attack it."""
        return [each for each in surrogates if not each.shares(self.run_weights, self.indices)]


def find_control(run: Run | None, surrogates: Sequence[Surrogate]) -> Control | None:
    """Return the run's own standard members, else a surrogate that another one can attack.

    Args:
        run: of the model; None where it is not known.
        surrogates: of the evaluation.
    """
    if run is not None:
        return Control("own", run, "standard", tuple(range(run.config.members)))
    for each in surrogates:
        found = Control(each.name, each.run, "members", each.indices)
        if found.strangers(surrogates):
            return found
    return None
