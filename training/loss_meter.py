"""Loss meter: members' losses, summed on the device and read every 50 steps: no step waits."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dverge_serve.errors import UserError
from training.models.member import Member
from training.parallel.threads import one_thread_inside
from training.parallel.topology import ProcessTopology

WINDOW = 50  # steps between two looks at the losses


class Losses:
    """The losses of one epoch.

    Args:
        stage: its name, which is also its table's in the recipe.
        epoch: counted from 0.
        members: how many.
        topology: of the processes that train them.
    """

    def __init__(self, stage: str, epoch: int, members: int, topology: ProcessTopology) -> None:
        self._stage, self._epoch, self._members, self._topology = stage, epoch, members, topology
        self._sum: Tensor | float = 0.0  # of this process's members since the last look
        self._totals = [0.0] * members
        self._steps = self._read = 0

    def add(self, losses: Tensor) -> None:
        """Count one step's losses `[members of this process]`.

        Raises:
            UserError: a loss within the last steps was no number.
        """
        self._sum = losses + self._sum
        self._steps += 1
        if self._steps - self._read == WINDOW:
            self._read_losses()

    def means(self, members: Sequence[Member]) -> list[float]:
        """Return each member's mean loss at the end of the epoch.

        Raises:
            UserError: a loss within the last steps was no number, or what came of them is not.
        """
        if self._steps > self._read:
            self._read_losses()
        with one_thread_inside():  # of many operations on few numbers
            healthy = torch.stack(
                [
                    torch.stack([p.isfinite().all() for p in member.parameters()]).all()
                    for member in members
                ]
            )
        for index, fine in enumerate(healthy.tolist()):
            if not fine:
                self._fail(f"the weights of member {index} became infinite or nan", self._steps)
        return [total / max(self._steps, 1) for total in self._totals]

    def _read_losses(self) -> None:
        assert isinstance(self._sum, Tensor)
        found = self._topology.losses(self._sum, self._members).tolist()
        for index, loss in enumerate(found):
            if not math.isfinite(loss):
                self._fail(f"the loss of member {index} became {loss}", self._read + 1)
            self._totals[index] += loss
        self._sum, self._read = 0.0, self._steps

    def _fail(self, what: str, since: int) -> None:
        where = f"{self._stage} epoch {self._epoch + 1}"
        steps = f"step {since}" if since == self._steps else f"steps {since} to {self._steps}"
        self._topology.fail(
            UserError(
                f"{what} in {where}, {steps}",
                "finite numbers",
                f"lower {self._stage}.lr and train into another `out`",
            )
        )
