"""Weights files: networks as named tensors, from safetensors or from what `torch.save` wrote.

Of a pickle nothing but tensors is read: no code in it runs.
"""

from __future__ import annotations

import io
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dverge_serve.errors import UserError
from dverge_serve.files import sha256
from training.models.state_dict import parse

SUFFIXES = (".safetensors", ".pth", ".pt", ".th")
EXPECTED = "safetensors, or state dictionaries that torch.save wrote"
_PICKLES = (b"PK\x03\x04", b"\x80")  # how torch.save's files begin
_WRAPPERS = re.compile(r"(module\.)*(model\.)?(module\.)*")  # of modules around a network


@dataclass(frozen=True)
class Network:
    """One network's weights.

    Args:
        name: what the file calls it, for messages.
        tensors: by the file's names, without those of wrappers around the network.
        mean, std: per channel, for images in `[0,1]`, as the file carries them; or empty.
    """

    name: str
    tensors: dict[str, Tensor]
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()


@dataclass(frozen=True)
class WeightsFile:
    """The networks in a weights file.

    Args:
        sha256: of the file.
        networks: of an ensemble in its order; one of any other file.
    """

    sha256: str
    networks: tuple[Network, ...]

    @classmethod
    def read(cls, path: Path) -> WeightsFile:
        """Read a file: a run's, the published code's, or one network's.

        Raises:
            UserError: it cannot be read, is damaged, holds anything but tensors, or claims more
                of them than it has bytes.
        """
        if path.is_dir():
            found = f"{path} is a folder"
            raise UserError(found, EXPECTED, f"a run's are {path / 'members.safetensors'}")
        try:
            content = path.read_bytes()
        except OSError as error:
            raise UserError(f"cannot read {path} ({error.strerror})", EXPECTED) from error
        states = _states(_table(content, path), path)
        tensors = [each for state in states.values() for each in state.values()]
        if sum(each.numel() * each.element_size() for each in tensors) > len(content):
            raise UserError(f"{path} claims more weights than it has bytes", EXPECTED)
        networks = tuple(_network(state, name, path) for name, state in states.items())
        return cls(sha256(content), networks)


def _table(content: bytes, path: Path) -> Mapping[Any, Any]:
    try:
        return parse(content, path)
    except UserError as error:
        if not content.startswith(_PICKLES):  # only now: a safetensors file may begin so, too
            # The header's length, 8 bytes, and the header, which is JSON.
            found = error.found if content[8:9] == b"{" else f"{path} is no weights file"
            raise UserError(found, EXPECTED) from error
    try:
        if content.startswith(b"PK"):
            with zipfile.ZipFile(io.BytesIO(content)) as parts:
                if sum(part.file_size for part in parts.infolist()) > len(content):
                    raise UserError(f"{path} is compressed", EXPECTED)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old pickles' storage classes
            table = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except UserError:
        raise
    # Damaged pickles surface as almost any exception; a foreign one as a refusal to unpickle,
    # whose text is long and speaks of torch's options.
    except Exception as error:
        needs = re.search(r"GLOBAL (\S+)", str(error))
        fault = f"holds an object of {needs[1]}, and only tensors are unpickled" if needs else None
        raise UserError(
            f"{path} {fault or 'is damaged, or not of torch.save'}", EXPECTED
        ) from error
    if not isinstance(table, Mapping):
        raise UserError(f"{path} holds a {type(table).__name__}", EXPECTED)
    return table


def _states(table: Mapping[Any, Any], path: Path) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of each network by its name, in order."""
    found: dict[str, Mapping[Any, Any]] = {}
    numbered: dict[int, dict[str, Any]] = {}
    of_run = [re.fullmatch(r"member(\d+)\.(.+)", str(key)) for key in table]
    if of_run and all(of_run):
        for match, tensor in zip(of_run, table.values(), strict=True):
            assert match is not None
            numbered.setdefault(int(match[1]), {})[match[2]] = tensor
        found = {f"member {index}": numbered[index] for index in sorted(numbered)}
    elif isinstance(table.get("state_dict"), Mapping):
        found = {"the network": table["state_dict"]}
    elif all(isinstance(each, Tensor) for each in table.values()):
        found = {"the network": table}
    else:
        found = _published(table, path)
    for who, state in found.items():
        for name, value in state.items():
            if not isinstance(value, Tensor):
                told = f"{path}: '{name}' of {who} is a {type(value).__name__}"
                raise UserError(told, "a tensor")
    return {who: dict(state) for who, state in found.items()}


def _published(table: Mapping[Any, Any], path: Path) -> dict[str, Mapping[Any, Any]]:
    """Return the state dictionaries of the published code's form: `model0`, `model1`, ..."""
    numbered: dict[int, Mapping[Any, Any]] = {}
    for key, state in table.items():
        match = re.fullmatch(r"model_?(\d+)", str(key))
        if match and isinstance(state, Mapping):
            if int(match[1]) in numbered:
                raise UserError(f"{path} holds model{match[1]} and model_{match[1]}", "one of them")
            numbered[int(match[1])] = state
    if not numbered or sorted(numbered) != list(range(len(numbered))):
        keys = ", ".join(str(key) for key in list(table)[:6])
        raise UserError(f"{path} holds {keys}", EXPECTED)
    return {f"model{index}": numbered[index] for index in sorted(numbered)}


def _network(state: Mapping[Any, Tensor], who: str, path: Path) -> Network:
    tensors = {_WRAPPERS.sub("", str(name), count=1): tensor for name, tensor in state.items()}
    if len(tensors) < len(state):
        raise UserError(f"{path} holds tensors of {who} twice, with and without a wrapper", "one")
    pair = [tensors.pop(f"normalizer.{key}", None) for key in ("mean", "std")]
    if "mean" in tensors and "std" in tensors:  # of a run's members
        pair = [tensors.pop("mean"), tensors.pop("std")]
    mean, std = pair
    if mean is None or std is None:
        return Network(who, tensors)
    if not bool(((std > 0) & mean.isfinite() & std.isfinite()).all()):
        raise UserError(f"{path}: the normalisation of {who}", "finite, and std above 0")
    return Network(who, tensors, _floats(mean), _floats(std))


def _floats(tensor: Tensor) -> tuple[float, ...]:
    return tuple(tensor.flatten().tolist())
