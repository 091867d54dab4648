"""What to do about each gate that failed or could not be run, in one line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from dverge_serve.engine.report import Gate

STRONGER = (
    "try a larger `preset`, or more `images`; until it passes, read the figure under all attacks"
)
FAILED = {
    "finite": "find where it overflows: export again with `precision` fp32, or train with a lower "
    "learning rate",
    "deterministic": "remove what is random at inference (dropout, noise, random resizing), and "
    "what depends on the other images of a batch; the attacks here do not average over it",
    "not-probabilities": "export the logits: leave out the softmax at the end of the graph",
    "better-than-chance": "check that class names, their order and the preprocessing are the "
    "model's; train longer; with few test images, add some",
    "nonzero-gradient": "do not rely on the white-box figure: something (rounding, a threshold, "
    "saturation) blocks the gradient; remove it, or go by the attacks that only query",
    "gradient-is-the-models": "do not rely on the white-box figure: look for rounding, top-k, "
    "thresholds or noise in the graph, remove them, or go by the attacks that only query",
    "eps-8bit": "an attack leaves its ball: if it is yours, project its images; else report a bug",
    "parity": "give the `run` that this very file was exported from, or export it again; for fp16 "
    "and int8, verify the fp32 file instead",
    "grows-with-eps": STRONGER,
    "reaches-chance": STRONGER,
    "iterative-beats-single": STRONGER,
    "converged": STRONGER,
    "weaker-never-beats": "do not rely on the white-box figure: gradients seem to be masked; read "
    "the figure under all attacks, and try `preset` full",
    "control-falls": "use `eps` auto, which finds radii at which the control falls, or larger ones",
    "surrogates-close": "give better `surrogates`: a folder of standard runs that are as accurate "
    "as the model",
    "planted-found": "an attack does not do its work on this machine: please report it as a bug",
    "no-leakage": "delete the images that the report names from the training or the test folder, "
    "then train and verify again",
}
WEIGHTS = "give the `run` or `checkpoint` that the file was exported from, or install the extra "
WEIGHTS += "`audit`, which reads the weights from the file"
NOT_RUN = {
    **dict.fromkeys(("grows-with-eps", "iterative-beats-single", "converged"), WEIGHTS),
    **dict.fromkeys(("nonzero-gradient", "parity", "reaches-chance"), WEIGHTS),
    "weaker-never-beats": WEIGHTS,
    "gradient-is-the-models": f"{WEIGHTS}; with few test images, add some",
    "control-falls": "give the `run` of the model, whose undefended members are the control, or "
    "two `surrogates`",
    "surrogates-close": "give `surrogates` among which is a standard ensemble",
    "planted-found": "use more test images, or images that differ more",
}


def advised(gates: Sequence[Gate]) -> list[Gate]:
    """Return the gates, those that did not pass with their next step; one of their own stays."""
    return [
        gate if gate.passed or gate.next_step else replace(gate, next_step=_next_step(gate))
        for gate in gates
    ]


def _next_step(gate: Gate) -> str:
    return FAILED[gate.name] if gate.passed is False else NOT_RUN[gate.name]
