"""Attacking a running service as any client could, within its budget of requests."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from dverge_serve.images import to_float
from dverge_serve.progress import Progress
from training.data.splits import Split
from training.seeds import derive
from verification.attacks.outcomes import Mask, Outcomes, Pixels
from verification.attacks.perturbation import uint8_steps
from verification.attacks.square import square
from verification.metrics.statistics import rate
from verification.service_client import Service

SQUARE_QUERIES = 100  # an image, at most


def attack_service(
    service: Service, split: Split, outcome: Outcomes, served_sha256: str, eps: float, seed: int
) -> dict[str, Any]:
    """Send clean and transferred images, then attack by Square with the requests that are left.

    Args:
        service: to attack.
        split: clean test images and labels.
        outcome: of the model file, with its worst transferred images.
        served_sha256: of that file; the service may serve another.
        eps: the radius; images are sent in 8 bits, so whole steps are used.
        seed: of the choice of images and of Square.

    Returns:
        the report's section `live`.
    """
    labels = split.labels.cpu().numpy()
    sent = chosen(len(labels), service.requests, seed)
    clean = split.images.cpu().numpy()[sent]
    transfer = outcome.worst[eps, "transfer"][sent]
    with Progress("attacking the live service", 2 * len(sent)) as progress:
        right = _right(service, clean, labels[sent], progress)
        robust = right & _right(service, transfer, labels[sent], progress)
    kept = np.flatnonzero(robust)[: max(1, service.left // SQUARE_QUERIES)]
    queries = min(SQUARE_QUERIES, service.left // max(len(kept), 1))
    before = service.asked
    found = square(
        lambda pixels: service.scores(np.rint(pixels * 255).astype(np.uint8)),
        to_float(clean[kept]),
        labels[sent][kept],
        eps=uint8_steps(eps) / 255,
        queries=queries,
        seed=derive(seed, "live", "square"),
    )
    assert service.asked - before == int(found.queries.sum())
    return {
        "eps": eps,
        "model_sha256": service.sha256,
        "same_model": service.sha256 == served_sha256 if service.sha256 else None,
        "exposure": service.exposure,
        "exposed": sorted(service.exposed),
        "requests": service.asked,
        "clean_accuracy": rate(right),
        "transfer": rate(robust),
        "square": {
            "images": len(kept),
            "broken": int(found.broken.sum()),
            "queries_each_at_most": queries,
            "queries": int(found.queries.sum()),
        },
    }


def chosen(count: int, requests: int, seed: int) -> npt.NDArray[np.int64]:
    """Return which of `count` images are sent, in order: as many as a quarter of the requests."""
    order = np.random.default_rng(derive(seed, "live")).permutation(count)
    return np.sort(order[: max(1, requests // 4)])


def _right(
    service: Service, images: Pixels, labels: npt.NDArray[np.int64], progress: Progress
) -> Mask:
    answers = []
    for image in images:
        answers.append(int(service.scores(image[None])[0].argmax()))
        progress.advance()
    return np.asarray(np.array(answers) == labels)
