"""What every peer does with an image: our decoder and the same ONNX file, and a plain answer."""

from __future__ import annotations

import os
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from dverge_serve.engine.card import Card
from dverge_serve.images import load, to_float

Pixels = npt.NDArray[np.uint8]


class Classifier:
    """A loaded model that answers with label, index and probability.

    Args:
        path: the ONNX file.
        threads: of one inference.
        spinning: as ONNX Runtime does it by default, idle threads spin for a while: quicker for
            one caller, slower for several.
    """

    def __init__(self, path: str, threads: int, spinning: bool = False) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
        self.session = ort.InferenceSession(path, options, ["CPUExecutionProvider"])
        self.card = Card.from_metadata(self.session.get_modelmeta().custom_metadata_map, "model")

    @classmethod
    def from_environment(cls, spinning: bool = False) -> Self:
        """Return a classifier of the file and with the threads that the variables name."""
        return cls(os.environ["PEER_MODEL"], int(os.environ["PEER_THREADS"]), spinning)

    def decode(self, data: bytes) -> Pixels:
        return load(data, self.card.preprocess)

    def answers(self, images: list[Pixels]) -> list[dict[str, Any]]:
        (logits,) = self.session.run(["logits"], {"images": to_float(np.stack(images))})
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities = powers / powers.sum(axis=1, keepdims=True)
        best = probabilities.argmax(axis=1)
        return [
            {
                "label": self.card.labels[index],
                "index": int(index),
                "probability": float(probabilities[row, index]),
            }
            for row, index in enumerate(best)
        ]
