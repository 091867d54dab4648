"""The checks an evaluation must pass before its figures mean anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from export.parity import Parity
from verification.suite import VERSIONS, Attack, Outcomes

Verdict = Literal["VALID", "INCONCLUSIVE", "INVALID"]
CONTROL_KEEPS = 0.5  # share of its clean accuracy the control may keep at the largest eps


@dataclass(frozen=True)
class Gate:
    """One check's result.

    Args:
        name: the check.
        passed: None where it could not be run.
        failure: what the evaluation becomes if it fails (or cannot be run: INCONCLUSIVE).
        detail: the figures behind it, for people.
    """

    name: str
    passed: bool | None
    failure: Verdict
    detail: str

    def to_json(self) -> dict[str, Any]:
        """Return the form kept in the report."""
        return asdict(self)


def verdict(gates: Sequence[Gate]) -> Verdict:
    """Return what the gates make of the evaluation: the worst that any of them says."""
    if any(gate.passed is False and gate.failure == "INVALID" for gate in gates):
        return "INVALID"
    return "VALID" if all(gate.passed for gate in gates) else "INCONCLUSIVE"


def finite(outcomes: Sequence[Outcomes]) -> Gate:
    """No output was NaN or infinite; such an output is never a success of an attack."""
    count = sum(int(outcome.invalid.sum()) for outcome in outcomes)
    return Gate("finite", count == 0, "INVALID", f"{count} images had outputs that are not finite")


def eps_8bit(outcomes: Sequence[Outcomes]) -> Gate:
    """Every adversarial image lay in its ball and in the box, as floats and after rounding."""
    count = sum(outcome.outside for outcome in outcomes)
    return Gate("eps-8bit", count == 0, "INVALID", f"{count} images lay outside their ball")


def parity(found: Sequence[Parity] | None) -> Gate:
    """The weights that gave the gradients are the model that was scored."""
    if not found:
        return Gate("parity", None, "INVALID", "no weights to compare with")
    worst = max(found, key=lambda each: (not each.holds, each.difference))
    return Gate("parity", worst.holds, "INVALID", f"clean and adversarial images: {worst}")


def control_falls(control: Outcomes | None, suite: Sequence[Attack], eps: Sequence[float]) -> Gate:
    """The undefended control falls to the transfer attacks.

    If it does not, the surrogates are too far from the model to say anything about it.
    """
    name = "control-falls"
    if control is None:
        return Gate(name, None, "INCONCLUSIVE", "no undefended control of this model's own run")
    transfer = [attack for attack in suite if attack.threat == "transfer"]
    kept, clean = control.robust(transfer, max(eps), VERSIONS).mean(), control.clean.mean()
    detail = (
        f"at eps {max(eps):g} the control keeps {kept:.3f} of {clean:.3f} clean; "
        f"at most {CONTROL_KEEPS * clean:.3f} shows that the attacks bite"
    )
    return Gate(name, bool(kept <= CONTROL_KEEPS * clean), "INCONCLUSIVE", detail)


def weaker_never_beats(outcome: Outcomes, suite: Sequence[Attack], eps: Sequence[float]) -> Gate:
    """Noise and transfer break almost nothing that white-box attacks do not.

    Otherwise gradients are masked and the white-box figure flatters. The images count as broken
    either way.
    """
    name = "weaker-never-beats"
    weak = [attack for attack in suite if attack.threat != "white_box"]
    strong = [attack for attack in suite if attack.threat == "white_box"]
    if not all((attack.name, e, "float") in outcome.survived for attack in strong for e in eps):
        return Gate(name, None, "INCONCLUSIVE", "white-box attacks were not run")
    allowed = max(2.0, 0.01 * len(outcome.clean))
    worst, at = 0, eps[0]
    for each in eps:
        only_weak = outcome.robust(strong, each, VERSIONS) & ~outcome.robust(weak, each, VERSIONS)
        if int(only_weak.sum()) > worst:
            worst, at = int(only_weak.sum()), each
    detail = f"{worst} images at eps {at:g} broken only by weaker attacks (allowed {allowed:g})"
    return Gate(name, worst <= allowed, "INCONCLUSIVE", detail)
