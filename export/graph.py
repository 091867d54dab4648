"""One ONNX graph of an ensemble: both outputs, normalisation inside, the same bytes every time."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence

import onnx
import torch
from torch import Tensor, nn

from dverge_serve.contract import INPUT, LOGITS, MEMBER_LOGITS, METADATA_KEY, OPSET, Card
from dverge_serve.files import canonical_json


class Ensemble(nn.Module):
    """The members side by side; answers the mean of their logits and each member's own."""

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits `[batch, classes]` and member logits `[batch, members, classes]`.

        Args:
            images: float32 `[batch, channels, height, width]` in `[0,1]`.
        """
        logits = [member(images) for member in self.members]
        # Add and Mul, not ReduceMean, whose newer versions foreign importers refuse.
        total = logits[0]
        for each in logits[1:]:
            total = total + each
        return total * (1.0 / len(logits)), torch.stack(logits, dim=1)


def build_graph(members: Sequence[nn.Module], card: Card) -> bytes:
    """Return the bytes of `model.onnx` for these members.

    Args:
        members: networks in evaluation mode, on the CPU.
        card: goes into the metadata.
    """
    ensemble = Ensemble(members).eval()
    example = torch.zeros(2, *card.input_shape)
    with _quiet():
        program = torch.onnx.export(
            ensemble,
            (example,),
            input_names=[INPUT],
            output_names=[LOGITS, MEMBER_LOGITS],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    _strip(model)
    entry = model.metadata_props.add()
    entry.key, entry.value = METADATA_KEY, canonical_json(card.to_json()).decode()
    model.producer_name, model.producer_version = "dverge-serve", card.tool_version
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString(deterministic=True))


def _strip(model: onnx.ModelProto) -> None:
    """Remove what the exporter notes down of this machine: stack traces, module paths, docs."""
    graph = model.graph
    del graph.value_info[:]  # inferred again by every reader
    for item in [model, graph, *graph.node, *graph.initializer, *graph.input, *graph.output]:
        item.ClearField("doc_string")
        item.ClearField("metadata_props")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's own chatter off the user's terminal."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
