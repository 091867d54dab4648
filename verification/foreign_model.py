"""A foreign classifier: another party's ONNX file behind its contract, with gradients if it can."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dverge_serve import __version__
from dverge_serve.engine.card import Card
from dverge_serve.engine.outputs import Scores
from dverge_serve.engine.session import BATCH, Engine
from dverge_serve.errors import UserError
from dverge_serve.files import canonical_json, sha256
from dverge_serve.images import Preprocess, to_float
from dverge_serve.progress import say
from training.config import EMBEDDED, Config, Data
from training.data.splits import TrainingData, normalisation
from training.recipe import data_overrides, load_recipe
from verification import contract_search
from verification.contract import Contract, looks_like_softmax, shown
from verification.contract_search import Found
from verification.foreign_file import ForeignFile, open_foreign


def open_engine(
    path: Path, labels: Sequence[str], data: str, given: Mapping[str, Any]
) -> ForeignEngine:
    """Return the engine of a foreign classifier, with its contract as far as it is given.

    Args:
        path: the ONNX file.
        labels: its classes in the order of its scores.
        data: the images it was trained for, by name or folder.
        given: fields of the contract; the others are read off the file or are the default.

    Raises:
        UserError: as `open_foreign` and `ForeignEngine` raise it.
    """
    wanted = Contract(**given)
    file = open_foreign(
        path,
        layout=wanted.layout if "layout" in given else None,
        labels_alone=wanted.outputs == "labels",
    )
    known = {"layout": file.layout, "outputs": "logits" if file.classes else "labels"}
    order = tuple(range(len(labels)))
    return ForeignEngine(file, labels, data, Contract(**(known | dict(given)), order=order))


def gives_scores(engine: Engine | ForeignEngine) -> bool:
    """Return whether a model gives scores; a foreign one may give labels alone."""
    return not isinstance(engine, ForeignEngine) or engine.file.classes > 0


class ForeignEngine:
    """A foreign classifier with the engine's interface; its scores count as one member.

    Args:
        file: an opened ONNX file.
        labels: its classes; the contract has their order among the scores.
        data: the images it was trained for, by name or folder: surrogates are trained on them.
        contract: what stands between images and model.
        found: how the contract was found, if it was searched for.

    Raises:
        UserError: another number of classes, or a contract that the file cannot have.
    """

    provider = "CPUExecutionProvider"

    def __init__(
        self,
        file: ForeignFile,
        labels: Sequence[str],
        data: str,
        contract: Contract,
        found: Found | None = None,
    ) -> None:
        self.file, self.contract, self.found = file, contract, found
        self.sha256 = file.sha256
        path, names = file.path, tuple(labels)
        if file.classes and file.classes != len(names):
            raise UserError(f"{path} gives {file.classes} scores", f"{len(names)}, one a label")
        if (contract.outputs == "labels") is bool(file.classes):
            gives = "scores" if file.classes else "labels alone"
            raise UserError(f"{path} gives {gives}", f"`outputs` {contract.outputs}, as asked for")
        for name, values in (("mean", contract.mean), ("std", contract.std)):
            if len(values) not in (1, file.shape[0]):
                what = f"`{name}` {shown(values)} for {file.shape[0]} channels"
                raise UserError(what, "one number, or one each")
        mode = "L" if file.shape[0] == 1 else "RGB"
        size = file.shape[1:]
        self.card = Card(
            name=path.stem,
            labels=names,
            preprocess=Preprocess(mode=mode, resize=size, crop=size),  # type: ignore[arg-type]
            channel_order=mode,
            members=1,
            dataset=data,
            training=_config(data, mode, size).to_json(),
            weights_sha256=sha256(canonical_json([file.weights_sha256, contract.to_json()])),
            tool_version=__version__,
        )

    def run_all(self, images: npt.NDArray[np.float32]) -> Scores:
        """Return the scores of float32 images `[N, C, H, W]` in `[0,1]`."""
        logits = self.contract.decode(self.outputs(images, self.contract))
        return Scores(logits, logits[:, None])

    def outputs(self, images: npt.NDArray[np.float32], contract: Contract) -> npt.NDArray[Any]:
        """Return what the model gives for images `[N, C, H, W]` in `[0,1]` under a contract."""
        step, found = self.file.batch or BATCH, []
        for at in range(0, len(images), step):
            part = contract.encode(images[at : at + step])
            filled = np.resize(part, (self.file.batch or len(part), *part.shape[1:]))
            found.append(self.file.run(filled)[: len(part)])
        return np.concatenate(found)

    def settled(
        self, data: TrainingData, given: Mapping[str, Any], *, search: bool
    ) -> ForeignEngine:
        """Return the classifier for a data set, with all of its contract known.

        The data's classes are found among the model's by their names. Whether scores are a softmax
        is seen on held-out images; with `search` these choose what else is not given.

        Args:
            data: the images it was trained for.
            given: fields of the contract that are fixed.
            search: whether to try the usual contracts.

        Raises:
            UserError: other classes, or no contract that fits.
        """
        names = self.card.labels
        if odd := sorted(set(names) ^ set(data.labels)):
            who = "`labels`" if odd[0] in names else "the data"
            raise UserError(
                f"only {who} has the class '{odd[0]}' ({len(odd)} differ)",
                f"the data's classes ({', '.join(data.labels[:3])}, ...) in the model's order",
            )
        chosen = contract_search.sample(len(data.holdout))
        images = to_float(data.holdout.images.cpu().numpy()[chosen])
        labels = data.holdout.labels.cpu().numpy()[chosen]
        contract = replace(self.contract, order=tuple(names.index(name) for name in data.labels))
        softmax = looks_like_softmax(self.outputs(images, contract))
        if "outputs" not in given and softmax:
            contract = replace(contract, outputs="softmax")
        if contract.outputs == "softmax" and not softmax:
            raise UserError(
                f"{self.file.path} gives scores that are no probabilities", "`outputs` logits"
            )

        def predict(tried: Contract) -> npt.NDArray[np.int64]:
            return np.asarray(tried.decode(self.outputs(images, tried)).argmax(1))

        candidates = [contract]
        if search:
            mean, std = normalisation(Data(), data.train)
            own = {"mean": tuple(mean), "std": tuple(std)}
            candidates = contract_search.candidates(contract, given, self.file.shape[0], own)
        found = contract_search.search(candidates, predict, labels, len(names))
        say(f"input contract: {found}")
        return ForeignEngine(self.file, data.labels, self.card.dataset, found.contract, found)


def _config(data: str, mode: str, size: tuple[int, int]) -> Config:
    """Return how surrogates are trained: by the recipe that goes with the data."""
    recipe = data if data in EMBEDDED else "cifar10-fast" if data == "cifar10" else "images"
    shaped = {"data.mode": mode, "data.crop": list(size), "data.resize": None}
    return load_recipe(recipe, data_overrides(data)).overridden(shaped)
