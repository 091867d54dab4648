"""A foreign classifier in torch, for gradients: its graph, read by onnx2torch, and its contract."""

from __future__ import annotations

import importlib.util

import onnx
import torch
from torch import Tensor, nn

from dverge_serve.errors import brief
from verification.contract import LEAST_PROBABILITY, Contract
from verification.foreign_file import ForeignFile
from verification.foreign_model import ForeignEngine
from verification.gradients import Gradients, torch_graph


class ForeignNetwork(nn.Module):
    """A graph behind its contract: images `[N, C, H, W]` in `[0,1]` to logits `[N, classes]`.

    Args:
        graph: the network, which gives scores.
        contract: of the file.
        before_softmax: the graph's scores are those that go into its softmax.
    """

    mean: Tensor
    std: Tensor
    order: Tensor

    def __init__(self, graph: nn.Module, contract: Contract, *, before_softmax: bool) -> None:
        super().__init__()
        self.graph, self.contract, self.before_softmax = graph, contract, before_softmax
        self.one_by_one = False  # a batch of 1 may be written into the graph
        self.register_buffer("mean", torch.tensor(contract.mean)[:, None, None])
        self.register_buffer("std", torch.tensor(contract.std)[:, None, None])
        self.register_buffer("order", torch.tensor(contract.order))

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits, as `Contract.decode` gives them."""
        contract = self.contract
        x = images * contract.pixel_max
        if contract.channels == "bgr":
            x = x.flip(1)
        if contract.normalised:
            x = (x - self.mean) / self.std
        if contract.layout == "nhwc":
            x = x.permute(0, 2, 3, 1)
        x = x.contiguous()
        if self.one_by_one:
            scores = torch.cat([self.graph(image[None]) for image in x])
        else:
            scores = self.graph(x)
        scores = scores.flatten(1)
        if contract.outputs == "softmax":
            if self.before_softmax:
                logs = scores.log_softmax(1)
                # As low as the file's own probabilities go; the gradient is that of the true value.
                least = torch.full_like(logs, LEAST_PROBABILITY).log()
                scores = logs + (logs.maximum(least) - logs).detach()
            else:
                scores = scores.clamp_min(LEAST_PROBABILITY).log()
        return scores[:, self.order]


def find_foreign_gradients(
    engine: ForeignEngine, device: torch.device
) -> tuple[Gradients | None, str]:
    """Return the classifier in torch, or None and the reason why there are no gradients."""
    file = engine.file
    if not file.classes:
        return None, "the model gives labels alone"
    if file.dtype.__name__ != "float32":
        return None, f"the model takes {file.dtype.__name__}, gradients need float32"
    if importlib.util.find_spec("onnx2torch") is None:
        return None, "onnx2torch is not installed: pip install 'dverge-serve[audit]'"
    model, before_softmax = _scores_alone(file)
    try:
        graph = torch_graph(model).requires_grad_(False)
        network = ForeignNetwork(graph, engine.contract, before_softmax=before_softmax)
        network = network.eval().to(device)
        probe = torch.rand(2, *file.shape, device=device)
        apart = torch.cat([network(image[None]) for image in probe])
        network.one_by_one = not _alike(network, probe, apart)
    # An operator it does not know may raise any exception.
    except Exception as error:
        told = f"{type(error).__name__}: {brief(error)}"
        return None, f"onnx2torch cannot read the file ({told})"
    softmax = (
        ", with the log of its softmax as logits" if engine.contract.outputs == "softmax" else ""
    )
    origin = f"the file itself, by onnx2torch{softmax}"
    return Gradients([network], engine.card.weights_sha256, origin), ""


def _scores_alone(file: ForeignFile) -> tuple[onnx.ModelProto, bool]:
    """Return the graph with the used output alone, and whether a softmax at its end was cut off.

    In front of a softmax the gradient is exact where the softmax itself is already 0 or 1.
    """
    model = onnx.load(file.path)
    graph = model.graph
    (used,) = [each for each in graph.output if each.name == file.output]
    del graph.output[:]
    graph.output.append(used)
    last = next(node for node in graph.node if file.output in node.output)
    axes = [attribute.i for attribute in last.attribute if attribute.name == "axis"]
    flat = len(used.type.tensor_type.shape.dim) == 2
    cut = last.op_type == "Softmax" and (flat or axes == [1])
    if cut:
        graph.output[0].name = last.input[0]
    return model, cut


@torch.no_grad()
def _alike(network: nn.Module, images: Tensor, expected: Tensor) -> bool:
    """Whether the images together give the outputs that each gives alone."""
    try:
        found = network(images)
    except Exception:  # whatever an operator raises at a shape it was not written for
        return False
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-3, atol=1e-3)
