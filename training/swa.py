"""Stochastic weight averaging (Izmailov et al., 2018): the mean of a stage's last epochs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from training.models.member import Member
from training.models.state_dict import load_members, members_tensors
from training.schedules import Schedule


class Average:
    """The mean of each member's weights and running statistics over the last epochs of a stage.

    Members go on training from their own weights; the mean takes their place when the stage ends.

    Args:
        settings: of the stage; `average` is the share of its epochs that count.
        members: all of the run's.
        tensors: of a saved state, in which `tensors()` may be found; other keys are left alone.
    """

    def __init__(
        self, settings: Schedule, members: Sequence[Member], tensors: dict[str, Tensor]
    ) -> None:
        self._first = settings.epochs - round(settings.average * settings.epochs)
        self._models = [
            AveragedModel(member, use_buffers=True)
            for member in members
            if self._first < settings.epochs
        ]
        for index, model in enumerate(self._models):
            prefix = f"average{index}."
            found = {
                name.removeprefix(prefix): tensor
                for name, tensor in tensors.items()
                if name.startswith(prefix)
            }
            if found:
                model.load_state_dict(found)

    def add(self, epoch: int, members: Sequence[Member]) -> None:
        """Count the members as they are after `epoch`, from 0, if it is one of the last."""
        if epoch >= self._first:
            for model, member in zip(self._models, members, strict=True):
                model.update_parameters(member)

    def tensors(self) -> dict[str, Tensor]:
        """Return the running means under `average<i>.`, on the CPU, for a saved state."""
        return {
            f"average{index}.{name}": tensor.detach().cpu().contiguous()
            for index, model in enumerate(self._models)
            for name, tensor in model.state_dict().items()
        }

    def put_into(self, members: Sequence[Member]) -> None:
        """Replace the members' weights by the means, if anything is averaged."""
        if self._models:
            means = [cast(Member, model.module) for model in self._models]
            load_members(members, members_tensors(means), "the averaged weights")
