"""Detection of adversarial images by the disagreement of the members."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from dverge_serve import images
from dverge_serve.engine.outputs import Scores, softmax
from training import pgd
from training.data.splits import Split, to_float
from training.seeds import generator
from verification.attacks import losses
from verification.attacks.batches import in_batches
from verification.attacks.outcomes import Mask, Pixels
from verification.attacks.perturbation import decode_fp16, encode_fp16, quantize_uint8
from verification.attacks.target import Scorer
from verification.metrics.robust_accuracy import clean_scores
from verification.metrics.statistics import auroc, quantile_above, rate

Floats = npt.NDArray[np.float64]
DEPLOYED = "jensen-shannon"
RATES = (0.01, 0.05)
MARGIN_CAP = 1.0  # the margin beyond which the detector-aware attack raises it no further


def vote_split(scores: Scores) -> Floats:
    """Return the share of members that do not vote for the ensemble's answer, `[n]`."""
    return 1.0 - scores.agreement


def member_entropy(scores: Scores) -> Floats:
    """Return the mean entropy of the members' own softmax outputs, `[n]`, nats."""
    found = softmax(scores.member_logits)
    return np.asarray(-(found * _log(found)).sum(-1).mean(1))


def mean_kl(scores: Scores) -> Floats:
    """Return the mean Kullback-Leibler divergence over ordered pairs of members, `[n]`, nats."""
    found = softmax(scores.member_logits)
    members = found.shape[1]
    own = (found * _log(found)).sum(-1)  # [n, members]
    cross = np.einsum("nic,njc->nij", found, _log(found))
    total = members * own.sum(1) - cross.sum((1, 2))
    return np.asarray(total / max(members * (members - 1), 1))


SCORES: dict[str, Callable[[Scores], Floats]] = {
    DEPLOYED: lambda scores: scores.disagreement,
    "vote-split": vote_split,
    "member-entropy": member_entropy,
    "mean-kl": mean_kl,
}


def calibrate(engine: Scorer, holdout: Split, split: Split) -> dict[str, Any]:
    """Choose the threshold of disagreement above which the service calls an image suspicious.

    Args:
        engine: scores the images.
        holdout: clean images that no training saw, for the threshold.
        split: clean test images, for the false-positive rate.

    Returns:
        the threshold that at most 5% of the held-out images exceed (1% from 1,000 images on), and
        the share of the test images that do. None without held-out images.
    """
    share = 0.05 if len(holdout) < 1000 else 0.01
    found: dict[str, Any] = {
        "score": DEPLOYED,
        "threshold": None,
        "false_positive_rate": share,
        "measured_false_positive_rate": rate(np.zeros(0, dtype=bool)),
        "calibration_images": len(holdout),
    }
    if not len(holdout):
        return found
    held, clean = (clean_scores(engine, each).disagreement for each in (holdout, split))
    if np.isfinite(held).all():
        found["threshold"] = quantile_above(held, share)
        found["measured_false_positive_rate"] = rate(clean > found["threshold"])
    return found


def measure(
    engine: Scorer, holdout: Split, split: Split, attacked: Mapping[str, tuple[float, Pixels]]
) -> list[dict[str, Any]]:
    """Measure every score on every kind of attack.

    Only images that fool the model are counted: an attack that fails needs no alarm. Thresholds
    come from held-out clean images; the false-positive rate is measured on clean test images.

    Args:
        engine: scores the images.
        holdout: clean images, for thresholds.
        split: clean test images and labels.
        attacked: attacked versions of the test images, 8 bits, by name with their eps.
    """
    labels = split.labels.cpu().numpy()
    if not len(holdout):
        return []
    held, clean = clean_scores(engine, holdout), clean_scores(engine, split)
    known = {score: (of(held), of(clean)) for score, of in SCORES.items()}
    rows = []
    for name, (eps, pixels) in attacked.items():
        scores = engine.run_all(images.to_float(pixels))
        fooled: Mask = (scores.predictions != labels) & (clean.predictions == labels)
        for score, of in SCORES.items():
            (of_held, of_clean), of_all = known[score], of(scores)
            if not all(np.isfinite(each).all() for each in (of_held, of_clean, of_all)):
                continue
            there = of_all[fooled]
            row = {"attack": name, "eps": eps, "score": score, "auroc": auroc(of_clean, there)}
            for share in RATES:
                threshold = quantile_above(of_held, share)
                row[f"tpr_at_{share:g}"] = rate(there > threshold)
                row[f"fpr_at_{share:g}"] = rate(of_clean > threshold)
            rows.append(row)
    return rows


def detector_aware(
    members: Sequence[nn.Module], split: Split, eps: float, *, steps: int, seed: int
) -> Pixels:
    """Return 8-bit images of an attacker who knows the alarm, uint8 `[N, C, H, W]`.

    The attack raises the margin up to `MARGIN_CAP` and lowers the members' Jensen-Shannon
    divergence: `min(margin, 1) - 5 JS`, sign steps from a random start. Of all steps' images, the
    one that fools the model with the least disagreement is kept.

    Args:
        members: the attacked model's, in evaluation mode.
        split: clean images and labels.
        eps: Linf radius.
        steps: gradient steps.
        seed: of the random starts.
    """

    def batch(part: Split, start: int) -> Tensor:
        draw = generator(seed, "aware", str(eps), start, device=part.images.device)
        return _aware_batch(members, part, eps, steps, draw)

    made = torch.cat(in_batches(batch, split))
    pixels = split.images.cpu().numpy()
    deltas = encode_fp16(made, split.images, eps, "linf")
    return quantize_uint8(decode_fp16(pixels, deltas), pixels, eps)


def _aware_batch(
    members: Sequence[nn.Module], part: Split, eps: float, steps: int, draw: torch.Generator
) -> Tensor:
    """Return the best float images `[N, C, H, W]` of one batch."""
    x0 = to_float(part.images)
    x = pgd.random_start(x0, eps, draw)
    best, least = x, torch.full_like(part.labels, torch.inf, dtype=torch.float32)

    def loss(x: Tensor) -> Tensor:
        stack = pgd.member_logits(members, x)
        margin = losses.margins(stack.mean(0), part.labels).clamp(max=MARGIN_CAP)
        return margin - 5 * _divergence(stack)

    for step in range(steps):
        size = eps * (0.2 if step < steps // 2 else 0.05)
        x = pgd.pgd_loop(loss, x0, eps=eps, step_size=size, steps=1, start=x)
        with torch.no_grad():
            stack = pgd.member_logits(members, x)
            fools = losses.margins(stack.mean(0), part.labels) > 0
            found = _divergence(stack).masked_fill(~fools, torch.inf)
        better = found < least
        best = torch.where(better[:, None, None, None], x, best)
        least = torch.minimum(found, least)
    return torch.where(least.isfinite()[:, None, None, None], best, x)


def _divergence(stack: Tensor) -> Tensor:
    """Return the Jensen-Shannon divergence of `[M, N, K]` logits, `[N]`, differentiable."""
    logs = stack.log_softmax(-1)
    shares = logs.exp()
    mean = shares.mean(0)
    entropy = -(mean * mean.clamp_min(1e-12).log()).sum(-1)
    return entropy + (shares * logs).sum(-1).mean(0)


def _log(shares: Floats) -> Floats:
    return np.log(np.maximum(shares, 1e-300))
