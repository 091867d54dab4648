"""Members as tensors: the form in which they are saved, checked where they come back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor

from dverge_serve.errors import UserError
from training.models.member import Member


def members_tensors(members: Sequence[Member]) -> dict[str, Tensor]:
    """Return every member's tensors under `member<i>.`, contiguous and on the CPU."""
    return {
        f"member{index}.{name}": tensor.detach().cpu().contiguous()
        for index, member in enumerate(members)
        for name, tensor in member.state_dict().items()
    }


def load_members(members: Sequence[Member], tensors: dict[str, Tensor]) -> None:
    """Put `members_tensors`' form back; other keys are left alone.

    Raises:
        UserError: tensors are missing, or shaped for other members.
    """
    for index, member in enumerate(members):
        prefix = f"member{index}."
        found = {
            name.removeprefix(prefix): tensor
            for name, tensor in tensors.items()
            if name.startswith(prefix)
        }
        try:
            member.load_state_dict(found)
        except RuntimeError as error:
            raise UserError(
                f"the saved weights do not fit member {index} ({str(error).splitlines()[-1]})",
                "the weights of a run with these settings",
                "train into another --out",
            ) from error


def parse(data: bytes, path: Path) -> dict[str, Tensor]:
    """Read safetensors bytes.

    Raises:
        UserError: they are something else; `path` is named.
    """
    try:
        return load_tensors(data)
    except (SafetensorError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error})", "a whole safetensors file") from error
