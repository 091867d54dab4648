"""Attacking a server of the Open Inference Protocol V2: KServe, Triton, OpenVINO, ours."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from dverge_serve.errors import UserError
from dverge_serve.images import to_float
from verification.attacks.outcomes import Pixels
from verification.contract import Contract, Outputs, looks_like_softmax
from verification.service_client import Service

MODEL_PATH = re.compile(r"(.*/v2/models/[^/]+(?:/versions/[^/]+)?)(?:/infer)?/?$")
FLOATS = ("FP16", "FP32", "FP64")
INTEGERS = ("INT64", "INT32", "INT16", "INT8", "UINT64", "UINT32", "UINT16", "UINT8")


@dataclass
class OipService(Service):
    """A model behind the Open Inference Protocol V2, asked by JSON tensors, one image a request.

    The input's name, shape and type come from the model's metadata. Of the outputs the first with
    a score for each class is asked for, else the first of labels. See `Service` for the rest.

    Args:
        url: `http://host:port/v2/models/NAME`, also with `/versions/VERSION`.
        contract: from images to the model's input, and from its outputs to logits.
        labels: names of the data's classes, for labels that come as text.
    """

    contract: Contract = field(default_factory=Contract)
    labels: Sequence[str] = ()

    content_type = "application/json"

    def __post_init__(self) -> None:
        super().__post_init__()
        found = MODEL_PATH.match(self._path.removesuffix("/predict"))
        if found is None:
            raise UserError(f"`url` {self.url}", "http://host:port/v2/models/NAME")
        self._model = found[1]
        if not self.contract.order:
            self.contract = replace(self.contract, order=tuple(range(self.classes)))
        self._path = f"{self._model}/infer"
        self._input: dict[str, Any] = {}
        self._output: dict[str, Any] = {}

    @property
    def exposure(self) -> str:
        """How much the service exposes, as a value of our setting `DVERGE_EXPOSE`."""
        if "disagreement" in self.exposed:
            return "full"
        return "scores" if self._output.get("datatype") in FLOATS else "label"

    def _body(self, image: Pixels) -> bytes:
        if not self._input:
            self._read_metadata(image.shape)
        values = self.contract.encode(to_float(image[None]))
        if self._input["datatype"] not in FLOATS:
            values = np.rint(values).astype(np.int64)
        tensor = self._input | {"shape": list(values.shape), "data": values.ravel().tolist()}
        outputs = [{"name": self._output["name"]}]
        return json.dumps({"inputs": [tensor], "outputs": outputs}).encode()

    def _answer(self, text: bytes) -> npt.NDArray[np.float64]:
        try:
            found = {each["name"]: each["data"] for each in json.loads(text)["outputs"]}
            values = np.asarray(found[self._output["name"]]).reshape(1, -1)
            if self._output["datatype"] == "BYTES":
                values = np.array([[self.labels.index(values[0, 0])]])
                contract = replace(
                    self.contract, outputs="labels", order=tuple(range(self.classes))
                )
            elif self._output["datatype"] in INTEGERS:
                contract = replace(self.contract, outputs="labels")
            else:
                kind: Outputs = "softmax" if looks_like_softmax(values) else "logits"
                contract = replace(self.contract, outputs=kind)
            (logits,) = contract.decode(values).astype(np.float64)
            return np.asarray(logits)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise UserError(
                f"the answer of {self._path} has no '{self._output['name']}' that can be read",
                "a response of the Open Inference Protocol V2 with JSON tensors",
            ) from error

    def _read_metadata(self, shape: Sequence[int]) -> None:
        """Ask for the model's metadata and check that it takes these images.

        Raises:
            UserError: not such a server, or a model with another input or outputs.
        """
        text = self._ask(None, self._model)
        try:
            described = json.loads(text)
            inputs, outputs = described["inputs"], described["outputs"]
            takes = [(each["name"], each["datatype"], list(each["shape"])) for each in inputs]
            gives = [(each["name"], each["datatype"], list(each["shape"])) for each in outputs]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self._model} does not describe its inputs and outputs",
                "a server of the Open Inference Protocol V2",
            ) from error
        wanted = list(self.contract.encode(np.zeros((1, *shape), np.float32)).shape)
        (name, datatype, sides), *more = takes or [("", "", [])]
        fits = len(sides) == 4 and all(
            side in (-1, size) for side, size in zip(sides, wanted, strict=True)
        )
        if more or not fits or datatype not in (*FLOATS, *INTEGERS):
            raise UserError(
                f"{self._model} takes {', '.join(f'{n} {d} {s}' for n, d, s in takes)}",
                f"one input of numbers {[-1, *wanted[1:]]}, as the model file has",
            )
        scores = [
            each for each in gives if each[1] in FLOATS and _classes(each[2]) in (-1, self.classes)
        ]
        answers = [
            each
            for kinds in (INTEGERS, ("BYTES",))
            for each in gives
            if each[1] in kinds and _classes(each[2]) in (0, 1)
        ]
        chosen = next(iter([*scores, *answers]), None)
        if chosen is None:
            raise UserError(
                f"{self._model} gives {', '.join(f'{n} {d} {s}' for n, d, s in gives)}",
                f"scores [-1, {self.classes}], or labels [-1]",
            )
        self.exposed |= {each[0] for each in gives}
        self._input = {"name": name, "datatype": datatype}
        self._output = {"name": chosen[0], "datatype": chosen[1]}


def _classes(shape: Sequence[int]) -> int | None:
    """Return the number of scores in an output of this shape, 0 for none, None for other shapes."""
    _, *rest = shape or [0]
    if rest[1:] not in ([], [1, 1]):
        return None
    return rest[0] if rest else 0


def client(
    url: str, labels: Sequence[str], contract: Contract, requests: int, rate: float
) -> Service:
    """Return the client of a live service: of Open Inference Protocol V2 where `url` says so.

    Args:
        url: of `/predict` or of `/v2/models/NAME`.
        labels: the model's classes.
        contract: of the model, for V2.
        requests: most requests in total.
        rate: most requests a second.
    """
    if "/v2/" in url:
        return OipService(url, len(labels), requests, rate, contract=contract, labels=tuple(labels))
    return Service(url, len(labels), requests, rate)
