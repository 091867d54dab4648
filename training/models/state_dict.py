"""State dictionaries: members as named tensors, and the checks where tensors come from a file."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor, nn

from dverge_serve.errors import UserError
from training.models.member import Member

OWN = "the weights of a run with these settings"


def members_tensors(members: Sequence[Member]) -> dict[str, Tensor]:
    """Return every member's tensors under `member<i>.`, contiguous and on the CPU."""
    return {
        f"member{index}.{name}": tensor.detach().cpu().contiguous()
        for index, member in enumerate(members)
        for name, tensor in member.state_dict().items()
    }


def load_members(
    members: Sequence[Member], tensors: Mapping[str, Tensor], file: str = "the saved state"
) -> None:
    """Put `members_tensors`' form back; other keys are left alone.

    Args:
        members: as many as were saved.
        tensors: as `members_tensors` returns them.
        file: where they are from, for messages.

    Raises:
        UserError: tensors are missing, foreign, of another shape or not finite.
    """
    for index, member in enumerate(members):
        try:
            fit(member, tensors_of(tensors, index), file=file, who=f"member {index}", expected=OWN)
        except UserError as error:
            again = "train into another `out`"
            raise UserError(error.found, error.expected, again) from error


def tensors_of(tensors: Mapping[str, Tensor], index: int) -> dict[str, Tensor]:
    """Return one member's tensors in `members_tensors`' form, by the member's own names."""
    prefix = f"member{index}."
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def fit(
    network: nn.Module,
    tensors: Mapping[str, Tensor],
    *,
    file: str,
    who: str,
    expected: str = "weights of the same architecture, width and image channels",
    names: Mapping[str, str] | None = None,
    optional: Collection[str] = (),
    unused: Collection[str] = (),
) -> None:
    """Copy tensors into a network: all of them, or with an error none.

    Args:
        network: that they are for.
        tensors: as the file has them.
        file: where they are from, for messages.
        who: the network, for messages, e.g. `member 0`.
        expected: what the file should hold, for messages.
        names: what the file calls each of the network's tensors; the same where nothing is given.
        optional: tensors of the network that the file may lack.
        unused: tensors of the network that keep their values, whatever the file has.

    Raises:
        UserError: tensors are missing, foreign, of another shape or not finite.
    """
    called = {name: (names or {}).get(name, name) for name in network.state_dict()}
    if not tensors.keys() & called.values():
        first = next(iter(tensors), "none")
        raise UserError(
            f"{file} holds no weights of {who} (its first tensor is '{first}')", expected
        )
    if foreign := sorted(tensors.keys() - set(called.values())):
        raise UserError(
            f"{file} holds {len(foreign)} tensors that {who} has not, first '{foreign[0]}'",
            expected,
        )
    needed = [stored for name, stored in called.items() if name not in optional]
    if missing := [stored for stored in needed if stored not in tensors]:
        raise UserError(
            f"{file} lacks {len(missing)} of the {len(needed)} tensors of {who}, "
            f"first '{missing[0]}'",
            expected,
        )
    pairs = [
        (called[name], tensors[called[name]], into)
        for name, into in network.state_dict().items()
        if called[name] in tensors and name not in unused
    ]
    for stored, tensor, into in pairs:
        if tensor.shape != into.shape:
            raise UserError(
                f"'{stored}' in {file} has shape {list(tensor.shape)}, in {who} {list(into.shape)}",
                expected,
            )
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_complex():
            told = f"{tensor.layout}, {tensor.dtype}".replace("torch.", "")
            raise UserError(f"'{stored}' in {file} is {told}", "an ordinary tensor of real numbers")
        if stored.endswith("running_var") and bool((tensor < 0).any()):
            raise UserError(f"'{stored}' in {file} has negative values", "a variance")
        if not bool(tensor.isfinite().all()):
            raise UserError(f"'{stored}' in {file} has values that are not finite", "numbers")
    for _, tensor, into in pairs:
        into.copy_(tensor)


def network_sha256(network: nn.Module) -> str:
    """Return a hash of a network's weights, wherever they came from; BatchNorm's counts aside."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        if not name.endswith("num_batches_tracked"):
            plain = tensor.detach().cpu().contiguous()
            digest.update(f"{name} {plain.dtype} {list(plain.shape)}".encode())
            digest.update(plain.view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def parse(data: bytes, path: str | Path) -> dict[str, Tensor]:
    """Read safetensors bytes.

    Raises:
        UserError: they are something else; `path` is named.
    """
    try:
        return load_tensors(data)
    except (SafetensorError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error})", "a whole safetensors file") from error
