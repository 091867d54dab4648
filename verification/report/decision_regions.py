"""The report's plots: accuracy curves, matrices, decision regions, images that fool the model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from dverge_serve import images
from dverge_serve.engine.report import Report
from training import pgd
from training.data.splits import Split, to_float
from training.models.ensemble import Ensemble
from training.seeds import generator
from verification.attacks.outcomes import Outcomes
from verification.attacks.target import Scorer
from verification.config import LARGE
from verification.report import plots

SHOWN = 6
AROUND = 3  # images with decision regions
POINTS = 41  # of each axis of a plane
FEWER = 21  # on large images


def illustrate(
    report: Report,
    labels: Sequence[str],
    engine: Scorer,
    members: Sequence[nn.Module] | None,
    split: Split,
    outcome: Outcomes,
) -> dict[str, bytes]:
    """Return the report's plots as PNG bytes by name.

    Args:
        report: the figures.
        labels: class names.
        engine: scores images.
        members: for the gradient of the decision regions; None leaves those out.
        split: the test images.
        outcome: of the model, with the worst images.
    """
    found, eps = {"curves": plots.curves(report)}, max(report.robust_accuracy)
    if (queries := plots.query_curves(report)) is not None:
        found["queries"] = queries
    matrices = report.to_json()["members"]
    if matrices and (maps := plots.heat_maps(matrices)):
        found["matrices"] = maps
    truth = split.labels.cpu().numpy()
    right = np.flatnonzero(outcome.clean)[:AROUND]
    if members is not None and len(right) and report.norm == "Linf":
        answers = plane(engine, members, split.take(torch.from_numpy(right)), 2 * eps)
        found["regions"] = plots.regions(answers, 2 * eps, labels, truth[right].tolist())
    for (radius, _), pixels in sorted(outcome.worst.items(), key=lambda item: item[0]):
        answered = engine.run_all(images.to_float(pixels)).predictions
        fooled = np.flatnonzero(outcome.clean & (answered != truth))[:SHOWN]
        if len(fooled) == min(SHOWN, len(truth)) or (len(fooled) and radius == eps):
            told = [(labels[truth[at]], labels[answered[at]]) for at in fooled]
            clean = split.images.cpu().numpy()[fooled]
            found["pictures"] = plots.pictures(clean, pixels[fooled], told, radius)
            break
    return found


def plane(
    engine: Scorer, members: Sequence[nn.Module], split: Split, reach: float
) -> npt.NDArray[np.int64]:
    """Return the answers of members and ensemble on a plane through each image.

    The plane is spanned by the sign of the ensemble's gradient (of the cross-entropy) and a
    random direction of signs: a point `(a, b)` changes no pixel by more than `|a| + |b|`.

    Returns:
        class indices `[images, members + 1, points, points]`, the ensemble last.
    """
    x0 = to_float(split.images)
    loss = pgd.cross_entropy(Ensemble(members), split.labels)
    draw = generator("plane", device=x0.device)
    along = pgd.gradient(loss, x0).sign()
    aside = torch.randn(x0.shape, generator=draw, device=x0.device).sign()
    points = FEWER if x0[0, 0].numel() > LARGE else POINTS
    axis = np.linspace(-reach, reach, points, dtype=np.float32)
    answers = []
    for image, one, two in zip(x0, along, aside, strict=True):
        grid = (
            image.cpu().numpy()
            + axis[None, :, None, None, None] * one.cpu().numpy()
            + axis[:, None, None, None, None] * two.cpu().numpy()
        )
        scores = engine.run_all(np.clip(grid.reshape(-1, *image.shape), 0, 1))
        each = scores.member_logits.argmax(-1).T
        answers.append(np.concatenate([each, scores.predictions[None]]))
    return np.array(answers).reshape(len(x0), -1, points, points)
