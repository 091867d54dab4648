"""Attacking a running service as any client could, within its budget of requests.

An eighth of the requests sends clean images, an eighth their transferred versions, a quarter
trains a substitute on the answers and an eighth sends the images made with it. What is left goes to
one image after another: by labels where the service tells labels alone, else by scores.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dverge_serve.engine.outputs import softmax
from dverge_serve.errors import UserError
from dverge_serve.progress import Progress
from training.config import Config
from training.data.splits import Split, to_float
from training.models.ensemble import Ensemble
from training.seeds import derive
from verification.attacks.gradient_attack import GradientAttack
from verification.attacks.outcomes import Mask, Outcomes, Pixels
from verification.attacks.perturbation import quantize_uint8, uint8_steps
from verification.attacks.query_attack import Answers, QueryAttack
from verification.attacks.rays import RayS
from verification.attacks.square import Square
from verification.config import SUBSTITUTE
from verification.metrics.statistics import rate
from verification.service_client import RefusedError, Service
from verification.substitute import steal

BY_SCORES = Square(name="square", queries=100)
BY_LABELS = RayS(name="rays", queries=200)
FROM_SUBSTITUTE = GradientAttack(
    name="mpgd", threat="queries", source=SUBSTITUTE, loss="cw", momentum=1.0, steps=20
)


@dataclass(frozen=True)
class Caller:
    """Somebody who may only send images to a service.

    Args:
        holdout: their own images, which the model was not trained on.
        config: of the model, whose architecture they guess.
        seed: of every random draw.
    """

    holdout: Split
    config: Config
    seed: int


def attack_service(
    service: Service,
    split: Split,
    outcome: Outcomes,
    served_sha256: str,
    eps: float,
    caller: Caller,
) -> dict[str, Any]:
    """Send clean and transferred images, steal the model, then attack by queries.

    Args:
        service: to attack.
        split: clean test images and labels.
        outcome: of the model file, with its worst transferred images.
        served_sha256: of that file; the service may serve another.
        eps: the radius; images are sent in 8 bits, so whole steps are used.
        caller: who attacks.

    Returns:
        the report's section `live`.
    """
    sent = chosen(len(split), service.requests, caller.seed)
    part = split.take(torch.from_numpy(sent).to(split.device))
    with Progress("attacking the live service", service.left) as progress:
        live = _Attacked(service, progress)
        labels = part.labels.cpu().numpy()
        right = live.labels(part.images.cpu().numpy()) == labels
        robust = right & (live.labels(outcome.worst[eps, "transfer"][sent]) == labels)
        stolen = _steal(live, part, right, eps, caller)
        standing = part.take(torch.from_numpy(right).to(part.device))
        by_queries = _by_queries(live, standing, eps, caller)
    return {
        "eps": eps,
        "model_sha256": service.sha256,
        "same_model": service.sha256 == served_sha256 if service.sha256 else None,
        "exposure": service.exposure,
        "exposed": sorted(service.exposed),
        "requests": service.asked,
        "clean_accuracy": rate(right),
        "transfer": rate(robust),
        "substitute": stolen,
        "by_queries": by_queries,
    }


def chosen(count: int, requests: int, seed: int) -> npt.NDArray[np.int64]:
    """Return which of `count` images are sent, in order: as many as an eighth of the requests."""
    order = np.random.default_rng(derive(seed, "live")).permutation(count)
    return np.sort(order[: max(1, requests // 8)])


class _Attacked:
    """A service as attacks see it: its answers to 8-bit images, the latest in `last`."""

    def __init__(self, service: Service, progress: Progress) -> None:
        self.service, self._progress = service, progress
        self.last: npt.NDArray[np.float32] = np.zeros((0, 0), np.float32)
        self.begin()

    def begin(self) -> None:
        """Begin to count the queries that the service's watch does not mark."""
        self.unmarked, self._flagged = 0, self.service.flagged

    @property
    def is_marked(self) -> bool:
        """Whether the watch has marked any answer since then."""
        return self.service.flagged > self._flagged

    @property
    def answers(self) -> Answers:
        """What it tells, as far as it has been asked."""
        return "labels" if self.service.exposure == "label" else "scores"

    def scores(self, images: Pixels) -> npt.NDArray[np.float32]:
        """Return log-probabilities `[n, classes]` as far as the service gives them."""
        found = []
        for image in images:
            found.append(self.service.scores(image[None])[0])
            self.unmarked += not self.is_marked
            self._progress.advance()
        self.last = np.array(found, np.float32)
        return self.last

    def labels(self, images: Pixels) -> npt.NDArray[np.int64]:
        """Return the labels that it answers with, `[n]`."""
        return np.asarray(self.scores(images).argmax(1))

    def model(self, images: Tensor) -> Tensor:
        """Return the scores of float images, sent in 8 bits."""
        pixels = (images.cpu().numpy() * 255).round().astype(np.uint8)
        return torch.from_numpy(self.scores(pixels)).to(images.device)

    def probabilities(self, images: Pixels) -> npt.NDArray[np.float64]:
        """Return the probabilities as far as they are told; one-hot where labels alone are."""
        scores = self.scores(images)
        if self.answers == "labels":
            return np.asarray(np.eye(scores.shape[1])[scores.argmax(1)])
        return softmax(scores)


def _steal(live: _Attacked, part: Split, right: Mask, eps: float, caller: Caller) -> dict[str, Any]:
    """Train a substitute on the answers and send the images that fool it."""
    queries = max(2, live.service.requests // 4)
    found = steal(
        live.probabilities,
        caller.holdout,
        caller.config,
        classes=live.last.shape[1],
        queries=queries,
        answers=live.answers,
        seed=caller.seed,
    )
    ensemble, x = Ensemble(found.members).eval(), to_float(part.images)
    made = FROM_SUBSTITUTE.run(ensemble, x, part.labels, eps, caller.seed, "live").images
    clean, labels = part.images.cpu().numpy(), part.labels.cpu().numpy()
    robust = right & (live.labels(quantize_uint8(made.cpu().numpy(), clean, eps)) == labels)
    return {"answers": found.answers, "queries": found.queries, "robust": rate(robust)}


def _by_queries(live: _Attacked, right: Split, eps: float, caller: Caller) -> dict[str, Any]:
    """Attack one image after another while there are requests for a whole attack.

    Args:
        live: the service.
        right: images that it answers rightly untouched; they are taken in random order.
        eps: the radius.
        caller: who attacks.
    """
    attack: QueryAttack = BY_LABELS if live.answers == "labels" else BY_SCORES
    most = min(attack.queries, live.service.left)
    attack = replace(attack, queries=most)
    order = np.random.default_rng(derive(caller.seed, "live", "queries")).permutation(len(right))
    tried, broken, refused, before = 0, 0, 0, live.service.asked
    marks: list[int] = []  # queries of an image before its first that the service marks or refuses
    for index in order:
        if not most or live.service.left < most:
            break
        one = right.take(slice(int(index), int(index) + 1))
        names = (caller.seed, "live", attack.name, int(index))
        reach = uint8_steps(eps) / 255
        clean = to_float(one.images)
        live.begin()
        try:
            made = attack.run(attack.seen(live.model), clean, one.labels, reach, *names).images
        except RefusedError:
            tried, refused = tried + 1, refused + 1
            marks.append(live.unmarked)
            continue
        except UserError:
            if live.service.left:
                raise
            break  # it was busy, and asking again took the requests that this image needed
        tried += 1
        if live.is_marked:
            marks.append(live.unmarked)
        # An image leaves the attack when it is broken: the last answer says whether it is. A search
        # by labels may end on a wrong answer outside the ball, and returns the clean image then.
        wrong = live.last[-1].argmax() != one.labels[0].item()
        broken += int(wrong and not torch.equal(made, clean))
    return {
        "attack": attack.name,
        "answers": attack.answers,
        "images": tried,
        "broken": broken,
        "queries_each_at_most": most,
        "queries": live.service.asked - before,
        "flagged_images": len(marks),
        "flagged_after": min(marks, default=None),
        "refused": refused,
    }
