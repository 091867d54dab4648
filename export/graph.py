"""One ONNX graph of an ensemble: both outputs, normalisation inside, the same bytes every time."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

import onnx
import torch

from dverge_serve.engine.card import INPUT, LOGITS, MEMBER_LOGITS, METADATA_KEY, OPSET, Card
from dverge_serve.errors import UserError
from dverge_serve.files import canonical_json
from export.fusing import fuse
from training.models.ensemble import Ensemble

MAX_BYTES = 2 * 1024**3 - 1  # what one ONNX file without external data can hold


def build_graph(ensemble: Ensemble, card: Card) -> bytes:
    """Return the bytes of `model.onnx` for an ensemble.

    Args:
        ensemble: in evaluation mode, on the CPU.
        card: goes into the metadata; its `form` says how the members are fused.

    Raises:
        UserError: more than 2 GB.
    """
    fused = fuse(ensemble, card.form)
    size = sum(tensor.nbytes for tensor in fused.state_dict().values())
    if size >= MAX_BYTES:
        raise UserError(
            f"{len(ensemble)} members have {size / 1024**3:.1f} GB of weights",
            "at most 2 GB, what one ONNX file can hold",
            "export fewer or smaller members",
        )
    example = torch.zeros(2, *card.input_shape)
    with quiet():
        program = torch.onnx.export(
            fused,
            (example,),
            input_names=[INPUT],
            output_names=[LOGITS, MEMBER_LOGITS],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    return finish(program.model_proto, card)


def finish(model: onnx.ModelProto, card: Card) -> bytes:
    """Put the card into a graph, remove traces of this machine, check it; return its bytes."""
    _strip(model)
    del model.metadata_props[:]
    entry = model.metadata_props.add()
    entry.key, entry.value = METADATA_KEY, canonical_json(card.to_json()).decode()
    model.producer_name, model.producer_version = "dverge-serve", card.tool_version
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString(deterministic=True))


def _strip(model: onnx.ModelProto) -> None:
    """Remove what the exporter records of this machine: stack traces, module paths, docs."""
    graph = model.graph
    del graph.value_info[:]  # inferred again by every reader
    for item in [model, graph, *graph.node, *graph.initializer, *graph.input, *graph.output]:
        item.ClearField("doc_string")
        item.ClearField("metadata_props")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the messages of the exporters and quantisers."""
    names = (None, "torch.onnx", "onnxscript", "onnx_ir")  # None: the root, which quantisers use
    loggers = [logging.getLogger(name) for name in names]
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
