"""How a run stands up to attack, with torch alone: the suite `quick` on the members themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from benchmarks.gpu.jobs import Job, Plan, job_named
from dverge_serve.engine.outputs import Scores
from dverge_serve.files import sha256
from training.data.splits import load_test, to_float
from training.runs.directory import Run
from verification.attacks import presets
from verification.attacks.suite import run_suite
from verification.attacks.target import Target
from verification.gradients import ready
from verification.metrics.robust_accuracy import figures

BATCH = 512


class TorchScorer:
    """Scores images with the members, as the engine would with the exported graph.

    Args:
        members: in evaluation mode.
        device: where they are.
    """

    def __init__(self, members: Sequence[nn.Module], device: torch.device) -> None:
        self._members, self._device = members, device

    @torch.no_grad()
    def run_all(self, images: npt.NDArray[np.float32]) -> Scores:
        """Return the scores of float32 images `[N, C, H, W]` in `[0,1]`."""
        parts = []
        for part in torch.split(torch.from_numpy(images), BATCH):
            each = torch.stack([member(part.to(self._device)) for member in self._members], 1)
            parts.append(Scores(each.mean(1).cpu().numpy(), each.cpu().numpy()))
        return Scores.concatenate(parts)


def measure(plan: Plan, job: Job, device: torch.device) -> None:
    """Attack a run's members and, the same way, its members after stage one.

    Figures stand beside those of `verify-robustness --preset quick` with one surrogate less, on
    the members instead of the exported file.
    """
    torch.backends.cudnn.allow_tf32 = False  # what is scored is scored in fp32
    name, surrogate = job.needs
    run, source = Run.open_finished(plan.run(name)), Run.open_finished(plan.run(surrogate))
    config = plan.config(job_named(name))
    _, split = load_test(plan.data(config, plan.test_images))
    split = split.to(device)
    kind = job_named(surrogate).surrogate
    surrogates = [ready(member, device, lowered=True) for member in source.members()]
    eps = config.verification.eps
    suite = presets.suite(presets.Variant(preset="quick", classes=len(run.labels)), [kind], eps)
    targets = {}
    for which in ("members", "standard"):
        members = [ready(member, device) for member in run.members(which)]
        weights = sha256((run.path / f"{which}.safetensors").read_bytes())
        targets[which] = Target(TorchScorer(members, device), members, weights)
    outcomes = run_suite(
        suite,
        {kind: (surrogates, source.weights_sha256)},
        targets,
        split,
        eps,
        seed=0,
    )
    halves = [ready(member.half().float(), device) for member in run.members()]
    clean = TorchScorer(halves, device).run_all(to_float(split.images).cpu().numpy())
    found: dict[str, Any] = {
        "run": name,
        "images": len(split),
        "surrogate": {
            "kind": kind,
            "seed": source.config.seed,
            "weights_sha256": source.weights_sha256,
            "holdout_accuracy": source.checkpoint["holdout_accuracy"],
        },
        "weights_sha256": run.weights_sha256,
        "figures": figures(outcomes["members"], suite, eps),
        "control": figures(outcomes["standard"], suite, eps),
        "clean_accuracy_fp16": float((clean.predictions == split.labels.cpu().numpy()).mean()),
        "outside": sum(outcome.violations for outcome in outcomes.values()),
        "done": True,
    }
    plan.find(job.name, found)
