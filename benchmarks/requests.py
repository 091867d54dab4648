"""The requests for the servers under test: one picture, or a batch as a binary tensor."""

from __future__ import annotations

import io
import json

import numpy as np
from PIL import Image


def png() -> bytes:
    """Return a picture of 32x32 pixels."""
    # Smooth as photographs are, so that it compresses and decodes like one.
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    file = io.BytesIO()
    small.resize((32, 32), Image.Resampling.BICUBIC).save(file, "PNG")
    return file.getvalue()


def tensors(batch: int) -> tuple[bytes, dict[str, str]]:
    """Return a V2 request of `batch` images, binary both ways, and its headers."""
    values = np.random.default_rng(0).random((batch, 3, 32, 32), dtype=np.float32).tobytes()
    header = json.dumps(
        {
            "inputs": [
                {
                    "name": "images",
                    "shape": [batch, 3, 32, 32],
                    "datatype": "FP32",
                    "parameters": {"binary_data_size": len(values)},
                }
            ],
            "outputs": [{"name": "logits", "parameters": {"binary_data": True}}],
        }
    ).encode()
    headers = {
        "content-type": "application/octet-stream",
        "inference-header-content-length": str(len(header)),
    }
    return header + values, headers
