"""What both peers do with an image: our decoder and the same ONNX file, and a plain answer."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from dverge_serve.engine.card import Card
from dverge_serve.images import load, to_float

Pixels = npt.NDArray[np.uint8]


class Classifier:
    """A loaded model that answers with label, index and probability."""

    def __init__(self, session: ort.InferenceSession) -> None:
        self.session = session
        self.card = Card.from_metadata(session.get_modelmeta().custom_metadata_map, "model")

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
