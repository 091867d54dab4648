"""The checks of the model itself: its outputs, its clean accuracy, its gradients."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy.stats import binomtest

from dverge_serve.engine.outputs import Scores
from dverge_serve.engine.report import Gate, Verdict
from export.parity import Parity
from verification.attacks.outcomes import Mask
from verification.gates import DOUBT, NO_WEIGHTS, allowed

SAME = 1e-4  # outputs of one image may differ by this much, relative to the largest logit
VARIANT_AGREES = 0.97  # of answers, a precision variant with the weights that give its gradients
# Share of a loss's changes that the gradients on the way may leave unexplained. Networks as they
# are leave 0.001 on half of the images; the gradients of another network, 0.05 to 1. The answers of
# an int8 file move in steps.
UNEXPLAINED, UNEXPLAINED_INT8 = 0.05, 0.4
EXPLAINED_IMAGES = 0.8  # share of the images that must be shown to stay below that


def deterministic(twice: tuple[Scores, Scores], alone: tuple[Scores, Scores]) -> Gate:
    """The same images get the same outputs (small rounding aside), whenever and in whatever batch.

    A random defence must be attacked in expectation; figures of one draw would flatter it. Attacks
    send batches and services single images: an answer that depends on the others in its batch is
    not the one that was attacked.

    Args:
        twice: scores of the clean images, and those of the same images again.
        alone: scores of clean and attacked images in one batch, and of each by itself.
    """
    largest = max(1.0, _largest(twice[0].logits))
    again, by_itself = _apart(*twice), _apart(*alone)
    detail = f"asked twice, logits differ by {again:.2e}, asked one by one by {by_itself:.2e} "
    detail += f"(allowed {SAME * largest:.2e})"
    return Gate("deterministic", max(again, by_itself) <= SAME * largest, "INVALID", detail)


def _apart(first: Scores, second: Scores) -> float:
    """Return the largest difference between logits; the gate `finite` counts the others."""
    apart = np.abs(first.logits.astype(np.float64) - second.logits)
    return float(apart.max(where=np.isfinite(apart), initial=0.0))


def not_probabilities(scores: Scores, foreign: bool = False) -> Gate:
    """The outputs are logits: a softmax in front of the loss would hide its gradient.

    A foreign classifier without gradients may give what it likes.
    """
    if foreign:
        detail = "a foreign classifier: no gradient is taken through its outputs"
        return Gate("not-probabilities", True, "INVALID", detail)
    outputs = [scores.logits, *np.moveaxis(scores.member_logits, 1, 0)]
    count = sum(_looks_like_probabilities(each) for each in outputs)
    detail = f"{count} of {len(outputs)} outputs are never negative and sum to one"
    return Gate("not-probabilities", count == 0, "INVALID", detail)


def better_than_chance(right: Mask, labels: npt.NDArray[np.int64], classes: int) -> Gate:
    """The clean answers are better than a constant answer: an exact one-sided binomial test.

    Whatever holds a model without accuracy under attack, it is no robustness.

    Args:
        right: bool `[n]`, which clean images are answered rightly.
        labels: int64 `[n]`.
        classes: how many there are.
    """
    count, n = int(right.sum()), len(labels)
    chance = max(1 / classes, float(np.bincount(labels).max()) / n)
    p_value = float(binomtest(count, n, chance, alternative="greater").pvalue)
    # A model at chance is broken; one a little above it lacks images that would show it.
    failure: Verdict = "INVALID" if count <= chance * n else "INCONCLUSIVE"
    detail = (
        f"{count} of {n} clean images right; one answer for all is right on {chance:.3f} of them "
        f"(p = {p_value:.2g}, at most {DOUBT:g})"
    )
    return Gate("better-than-chance", p_value <= DOUBT, failure, detail)


def nonzero_gradient(zero: Mask | None, broken: Mask | None) -> Gate:
    """Almost every image has a gradient under some attacked loss.

    Args:
        zero: bool `[n]`: the gradient is zero on every white-box loss.
        broken: bool `[n]`: it is NaN or infinite on one of them.
    """
    name = "nonzero-gradient"
    if zero is None or broken is None:
        return Gate(name, None, "INCONCLUSIVE", NO_WEIGHTS)
    count = int((zero | broken).sum())
    detail = (
        f"{int(zero.sum())} images without a gradient on any loss, "
        f"{int(broken.sum())} with one that is not finite (allowed {allowed(len(zero))})"
    )
    return Gate(name, count <= allowed(len(zero)), "INCONCLUSIVE", detail)


def gradient_is_the_models(
    unexplained: npt.NDArray[np.float64] | None, precision: str = "fp32"
) -> Gate:
    """The gradients that attacks follow add up to the changes of the deployed model's loss.

    A gradient that is not the model's, or that says nothing about its surroundings, is what most
    false defences have in common: quantisers, thermometer codes, winners that take all, noise that
    depends on the pixels.

    Args:
        unexplained: float64 `[n]`, of `path_integrals.unexplained`; None without gradients.
        precision: of the file; an int8 file's answers are steps.
    """
    name = "gradient-is-the-models"
    if unexplained is None:
        return Gate(name, None, "INCONCLUSIVE", NO_WEIGHTS)
    most = UNEXPLAINED_INT8 if precision == "int8" else UNEXPLAINED
    count, n = int((unexplained <= most).sum()), len(unexplained)
    detail = (
        f"on {count} of {n} images the gradients explain the loss of the file at the edge of the "
        f"ball (at most {most:g} left, median {np.median(unexplained):.2g}"
    )
    if EXPLAINED_IMAGES**n > DOUBT:
        return Gate(name, None, "INCONCLUSIVE", f"{detail}); {n} images are too few to tell")
    p_value = float(binomtest(count, n, EXPLAINED_IMAGES, alternative="greater").pvalue)
    detail += f"; more than {EXPLAINED_IMAGES:g} of all: p = {p_value:.2g}, at most {DOUBT:g})"
    return Gate(name, p_value <= DOUBT, "INCONCLUSIVE", detail)


def parity(found: Sequence[Parity] | None) -> Gate:
    """The weights that gave the gradients are those of the model that was scored."""
    if not found:
        return Gate("parity", None, "INVALID", "no weights to compare with")
    worst = max(found, key=lambda each: (not each.holds, each.difference))
    return Gate("parity", worst.holds, "INVALID", f"clean and adversarial images: {worst}")


def variant_parity(agreement: float, precision: str) -> Gate:
    """A precision variant answers as its fp32 weights do, on clean and adversarial images."""
    detail = (
        f"the {precision} file and the fp32 weights agree on {agreement:.4f} of the answers "
        f"(at least {VARIANT_AGREES:g})"
    )
    return Gate("parity", agreement >= VARIANT_AGREES, "INCONCLUSIVE", detail)


def _largest(values: npt.NDArray[np.float32]) -> float:
    known = values[np.isfinite(values)]
    return float(np.abs(known).max()) if known.size else 0.0


def _looks_like_probabilities(outputs: npt.NDArray[np.float32]) -> bool:
    with np.errstate(invalid="ignore"):
        return bool((outputs >= 0).all() and (np.abs(outputs.sum(-1) - 1) < 1e-3).all())
