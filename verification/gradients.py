"""The weights behind a model file, and the size of the gradients that attacks begin with."""

from __future__ import annotations

import importlib.util
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dverge_serve.engine.card import Card
from dverge_serve.errors import UserError
from dverge_serve.files import sha256
from export.published_checkpoint import read_published
from training import pgd
from training.data.splits import Split, to_float
from training.device import autocast_dtype
from training.models.bn_folding import folded
from training.models.member import Member
from training.runs.directory import Run
from verification.attacks import losses
from verification.attacks.attack import Attack
from verification.attacks.batches import in_batches
from verification.attacks.gradient_attack import GradientAttack
from verification.attacks.outcomes import Mask

if TYPE_CHECKING:
    import onnx

READABLE_OPSET = 17  # onnx2torch knows no newer ReduceMean


@dataclass(frozen=True)
class Gradients:
    """A differentiable copy of the model.

    Args:
        members: in evaluation mode, on the device.
        weights: a hash of their weights.
        origin: where they come from, for the report.
        run: the run that made the model, if they come from there.
    """

    members: Sequence[nn.Module]
    weights: str
    origin: str
    run: Run | None = None

    @property
    def skipped(self) -> tuple[str, ...]:
        """The stages of the run's training that its starting weights stood for."""
        return ("standard",) if self.run and self.run.checkpoint.get("skipped_epochs") else ()


def ready(member: Member, device: torch.device, *, lowered: bool = False) -> Member:
    """Return a copy to take gradients from: BatchNorm folded, channels last, frozen parameters.

    Args:
        member: a network.
        device: where the copy goes.
        lowered: compute in bf16 where the hardware has it, and gains by it. For surrogates, which
            only resemble the model anyway; gradients of the model itself stay in fp32.
    """
    copy = folded(member).to(device)
    copy.to(memory_format=torch.channels_last)
    depthwise = device.type == "cpu" and _depthwise(copy)
    copy.compute = autocast_dtype("auto" if lowered and not depthwise else "fp32", device)
    for module in copy.modules():
        if isinstance(module, nn.ReLU6 | nn.Hardswish):  # in place, autograd would copy its input
            module.inplace = False
    return copy


def _depthwise(network: nn.Module) -> bool:
    """Return whether it has depthwise convolutions, whose bf16 gradients are slow on a CPU."""
    convolutions = (each for each in network.modules() if isinstance(each, nn.Conv2d))
    return any(each.groups == each.in_channels > 1 for each in convolutions)


def find_gradients(
    card: Card, model: Path, *, run: Path | None, checkpoint: Path | None, device: torch.device
) -> Gradients | None:
    """Return the weights behind a model, from the first place that has them.

    These are: the run given; the run whose weights match, under `runs/` or beside the file; a
    published checkpoint; the file itself, where the optional onnx2torch can read it. A precision
    variant carries the hash of its fp32 parent's weights and takes gradients from those.

    Raises:
        UserError: the run or checkpoint given has other weights than the model.
    """
    found = find_run(card, model, run) if checkpoint is None or run is not None else None
    if found is not None:
        members = [ready(member, device) for member in found.members()]
        return Gradients(members, found.weights_sha256, "run", found)
    if checkpoint is not None:
        return _from_checkpoint(checkpoint, card, device)
    return _from_file(model, card, device)


def find_run(card: Card, model: Path, path: Path | None) -> Run | None:
    """Return the run that made a model: the one given, or one with these weights.

    Searches the folders under `runs/` and those beside the model file.

    Raises:
        UserError: the run given has other weights.
    """
    if path is not None:
        run = Run.open_finished(path)
        if run.weights_sha256 != card.weights_sha256:
            raise UserError(
                f"{path} has weights {run.weights_sha256[:12]}, the model was made from "
                f"{card.weights_sha256[:12]}",
                "the run this model was exported from",
            )
        return run
    for folder in (Path("runs"), model.parent / "runs", model.parent):
        for checkpoint in sorted(folder.glob("*/checkpoint.json")):
            run = Run(checkpoint.parent)
            if run.weights_sha256 == card.weights_sha256:
                return Run.open_finished(checkpoint.parent)
    return None


def _from_checkpoint(path: Path, card: Card, device: torch.device) -> Gradients:
    found = read_published(path)
    if found.sha256 != card.weights_sha256:
        raise UserError(
            f"{path} has sha256 {found.sha256[:12]}, the model was made from "
            f"{card.weights_sha256[:12]}",
            "the checkpoint this model was exported from",
        )
    members = [ready(member, device) for member in found.members]
    return Gradients(members, found.sha256, "published checkpoint")


def _from_file(model: Path, card: Card, device: torch.device) -> Gradients | None:
    """Read an fp32 graph back into torch, if the optional onnx2torch is installed and able to."""
    if card.precision != "fp32" or importlib.util.find_spec("onnx2torch") is None:
        return None
    import onnx

    try:
        graph = torch_graph(onnx.load(model))
    # An operator it does not know may raise any exception.
    except Exception:
        return None
    shared = _Shared(graph.requires_grad_(False).to(device))
    members = [_View(shared, index) for index in range(card.members)]
    return Gradients(members, sha256(model.read_bytes()), "the file itself, by onnx2torch")


def torch_graph(model: onnx.ModelProto) -> nn.Module:
    """Return an ONNX graph as a torch module in evaluation mode, by the optional onnx2torch.

    Raises:
        Exception: of any kind, for an operator that it does not know.
    """
    from onnx import version_converter
    from onnx2torch import convert

    warnings.filterwarnings("ignore", module=r"onnx2torch\.")  # about tracing, at every call
    for node in model.graph.node:  # no shape of ours has a zero; the gate `parity` checks it
        kept = [each for each in node.attribute if each.name != "allowzero"]
        del node.attribute[:]
        node.attribute.extend(kept)
    opset = next(each.version for each in model.opset_import if each.domain in ("", "ai.onnx"))
    if opset > READABLE_OPSET:
        model = version_converter.convert_version(model, READABLE_OPSET)
    graph: nn.Module = convert(model)
    return graph.eval()


class _Shared(threading.local):
    """One graph behind several members, run once for the same images.

    Each thread remembers its own last images and their logits.
    """

    def __init__(self, graph: nn.Module) -> None:
        self.graph = graph
        self._last: tuple[Tensor, bool] | None = None  # images, and whether with gradients
        self._logits: Tensor | None = None

    def __call__(self, images: Tensor) -> Tensor:
        graded = torch.is_grad_enabled()
        last, logits = self._last, self._logits
        if logits is None or last is None or last[0] is not images or last[1] is not graded:
            logits = self.graph(images)[1]
            self._last, self._logits = (images, graded), logits
        return logits


class _View(nn.Module):
    """One member of a shared graph."""

    def __init__(self, shared: _Shared, index: int) -> None:
        super().__init__()
        self._shared, self._index = shared, index

    def forward(self, images: Tensor) -> Tensor:
        """Return this member's logits `[batch, classes]`."""
        return self._shared(images)[:, self._index]


def flow(
    members: Sequence[nn.Module], split: Split, suite: Sequence[Attack]
) -> tuple[Mask, Mask, list[float]]:
    """Measure the gradients that white-box attacks begin with.

    Args:
        members: the attacked model.
        split: clean images.
        suite: its white-box attacks name the losses.

    Returns:
        images without a gradient on any loss, images with one that is not finite on some loss,
        both bool `[n]`, and each member's mean L2 norm of the gradient of its own margin.
    """
    forms = {
        (each.loss, each.output): each
        for each in suite
        if isinstance(each, GradientAttack) and each.threat == "white_box"
    }

    def batch(part: Split, start: int) -> tuple[Tensor, Tensor, Tensor]:
        x = to_float(part.images)
        found = [pgd.gradient(each.loss_on(members, part.labels), x) for each in forms.values()]
        sizes = torch.stack([each.abs().amax((1, 2, 3)) for each in found])
        norms = torch.stack([_norm(member, x, part.labels) for member in members])
        return (sizes == 0).all(0), (~sizes.isfinite()).any(0), norms

    zero, broken, norms = zip(*in_batches(batch, split), strict=True)
    return (
        torch.cat(zero).cpu().numpy(),
        torch.cat(broken).cpu().numpy(),
        torch.cat(norms, 1).nanmean(1).tolist(),
    )


def _norm(member: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    found = pgd.gradient(losses.cw_margin(member, labels), x)
    return found.square().sum((1, 2, 3)).sqrt()
