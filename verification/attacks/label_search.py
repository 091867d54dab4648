"""Searches that follow labels alone: all images advance together, every query is counted."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from training.seeds import derive
from verification.attacks.attack import Crafted, Model
from verification.attacks.query_attack import Answers, QueryAttack

Floats = npt.NDArray[np.float32]
# One image's search: yields candidates [k, C, H, W] in [0,1], is sent which of them the model
# answers wrongly, bool [k]. It knows neither eps nor budget, and may end.
Search = Generator[Floats, npt.NDArray[np.bool_], None]


@dataclass(frozen=True, kw_only=True)
class LabelAttack(QueryAttack):
    """An attack that is a search along the decision boundary for each image.

    The first wrong candidate inside a ball is the adversarial image of its radius. So one search
    passes every radius, and ends at the smallest one, or when its queries are spent.
    """

    answers: Answers = "labels"
    one_search: ClassVar[bool] = True

    @abstractmethod
    def search(self, clean: Floats, draw: np.random.Generator) -> Search:
        """Search for ever closer images `[C, H, W]` with a wrong answer.

        Args:
            clean: the image, float32 `[C, H, W]` in `[0,1]`.
            draw: the image's own random numbers.
        """

    def run(
        self, model: Model, images: Tensor, labels: Tensor, eps: float, *seed: int | str
    ) -> Crafted:
        """Craft one adversarial version of every image; see `Attack.run`."""
        return self.run_radii(model, images, labels, [eps], *seed)[0]

    @torch.no_grad()
    def run_radii(
        self,
        model: Model,
        images: Tensor,
        labels: Tensor,
        radii: Sequence[float],
        *seed: int | str,
    ) -> list[Crafted]:
        """Craft at every radius by one search; see `Attack.run_radii`.

        An image that no candidate broke stays as it is. The queries at a radius are those up to
        the answer that broke the image there; candidates that a search gives together are asked
        together, and all of them count.

        Args:
            model: returns labels, int64 `[N]`.
        """
        clean, wanted = images.cpu().numpy(), labels.cpu().numpy()
        states = [
            _State(clean[index], self, radii, np.random.default_rng([derive(*seed), index]))
            for index in range(len(clean))
        ]
        while asking := [index for index, state in enumerate(states) if len(state.candidates)]:
            batch = np.concatenate([states[index].candidates for index in asking])
            told = model(torch.from_numpy(batch).to(images.device)).cpu().numpy()
            start = 0
            for index in asking:
                end = start + len(states[index].candidates)
                states[index].hear(told[start:end] != wanted[index])
                start = end
        return [
            Crafted(
                torch.from_numpy(np.stack([state.found[at] for state in states])).to(images.device)
                if states
                else images,
                np.array([state.queries[at] for state in states], dtype=np.int64),
            )
            for at in range(len(radii))
        ]


def as_asked(clean: Floats, candidates: Floats) -> Floats:
    """Return candidates `[k, C, H, W]` as the model is asked for them.

    They are rounded to the float16 changes that are stored, so that the image that is scored and
    saved is the very one that was asked.
    """
    changes = (candidates - clean).astype(np.float16)
    return np.clip(clean + changes.astype(np.float32), 0, 1)


class _State:
    """One image's search: what it asks next, and what it found at each radius."""

    def __init__(
        self,
        clean: Floats,
        attack: LabelAttack,
        radii: Sequence[float],
        draw: np.random.Generator,
    ) -> None:
        self.clean, self.radii, self.linf = clean, radii, attack.norm == "linf"
        self.left = attack.queries
        self.found = [clean] * len(radii)
        self.queries = [0] * len(radii)
        self._open = set(range(len(radii)))  # radii at which the image still stands
        self._search = attack.search(clean, draw)
        self.candidates = self._next(next(self._search)) if self.left else clean[:0]

    def hear(self, wrong: npt.NDArray[np.bool_]) -> None:
        """Take the answers to the candidates, and find the next ones; none at the end."""
        asked, changes = self.candidates, (self.candidates - self.clean).reshape(len(wrong), -1)
        self.left -= len(wrong)
        for at in self._open:
            self.queries[at] += len(wrong)
        if wrong.any():
            size = np.abs(changes).max(1) if self.linf else np.sqrt((changes**2).sum(1))
            for at in list(self._open):
                inside = np.flatnonzero(wrong & (size <= self.radii[at] + 1e-7))
                if len(inside):
                    self.found[at] = asked[inside[0]]
                    self._open.discard(at)
        self.candidates = asked[:0]
        if self._open and self.left:
            try:
                self.candidates = self._next(self._search.send(wrong))
            except StopIteration:
                return

    def _next(self, candidates: Floats) -> Floats:
        return as_asked(self.clean, candidates[: self.left])
