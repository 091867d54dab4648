"""One checkpoint, one white-box attack, several losses: how much the loss alone can flatter.

python -m benchmarks.published_losses FILE.pth --data FOLDER [--images 300] [--steps 50] [--json]

PGD on the checkpoint of the paper's published code at eps .03, one random start, steps of eps/5.
All losses are the cross-entropy of the members' mean softmax, written in several ways, beside the
two on mean-logits that verification attacks as well. `clamped` keeps the probability of the right
class within [1e-6, 1 - 1e-6], as code against log(0) often does: where every member is sure of the
image its gradient is exactly zero, and the attack never leaves its start.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.bench import say
from export.published_checkpoint import read_published
from training import pgd
from training.config import Data
from training.data.splits import Split, load_test, to_float
from training.models.ensemble import Ensemble
from training.seeds import generator
from verification.attacks import losses
from verification.attacks.batches import in_batches
from verification.gradients import ready
from verification.metrics.statistics import rate

EPS, CLAMP = 0.03, 1e-6
LOSSES = (
    "ce, mean-softmax, by logsumexp",
    "ce, mean-softmax, by softmax and log",
    "ce, mean-softmax, clamped",
    "ce, mean-logits",
    "cw, mean-logits",
)


def right_share(members: Sequence[nn.Module], x: Tensor, labels: Tensor) -> Tensor:
    """Return the mean softmax probability of the right class, `[N]`."""
    mean = pgd.member_logits(members, x).softmax(-1).mean(0)
    return mean.gather(1, labels[:, None])[:, 0]


def loss_named(name: str, members: Sequence[nn.Module], labels: Tensor) -> pgd.Loss:
    """Return one of `LOSSES`."""
    if name.startswith("cw"):
        return losses.cw_margin(Ensemble(members), labels)
    if name == "ce, mean-logits":
        return pgd.cross_entropy(Ensemble(members), labels)
    if name.endswith("logsumexp"):
        return pgd.cross_entropy(losses.mean_softmax_output(members), labels)
    if name.endswith("clamped"):
        return lambda x: -right_share(members, x, labels).clamp(CLAMP, 1 - CLAMP).log()
    return lambda x: -right_share(members, x, labels).log()


def attacked(name: str, members: Sequence[nn.Module], split: Split, steps: int) -> Tensor:
    """Return which images the mean of logits, and of softmax, still gets right, bool `[2, N]`."""

    def batch(part: Split, start: int) -> Tensor:
        x0 = to_float(part.images)
        adversarial = pgd.pgd_loop(
            loss_named(name, members, part.labels),
            x0,
            eps=EPS,
            step_size=EPS / 5,
            steps=steps,
            start=pgd.random_start(x0, EPS, generator(0, "losses", start)),
        )
        return right(members, x0, part.labels) & right(members, adversarial, part.labels)

    return torch.cat(in_batches(batch, split), 1)


@torch.no_grad()
def right(members: Sequence[nn.Module], x: Tensor, labels: Tensor) -> Tensor:
    """Return which images the mean of logits, and of softmax, gets right, bool `[2, N]`."""
    each = pgd.member_logits(members, x)
    return torch.stack([of.mean(0).argmax(1) == labels for of in (each, each.softmax(-1))])


@torch.no_grad()
def saturated(members: Sequence[nn.Module], split: Split) -> Tensor:
    """Return which clean images have no gradient through the clamp, bool `[N]`."""

    def batch(part: Split, start: int) -> Tensor:
        with torch.no_grad():
            return right_share(members, to_float(part.images), part.labels) > 1 - CLAMP

    return torch.cat(in_batches(batch, split))


def measure(members: Sequence[nn.Module], split: Split, steps: int) -> dict[str, Any]:
    """Return the report."""
    rows = []
    for name in LOSSES:
        logits, softmax = attacked(name, members, split, steps).numpy()
        rows.append({"loss": name, "mean_logits": rate(logits), "mean_softmax": rate(softmax)})
        say(f"{name}: {100 * logits.mean():.1f}")
    return {
        "images": len(split),
        "data_sha256": split.sha256,
        "eps": EPS,
        "steps": steps,
        "saturated": rate(saturated(members, split).numpy()),
        "rows": rows,
    }


def main() -> None:
    """Run the comparison from the command line."""
    parser = argparse.ArgumentParser(description="How much a loss can flatter.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data", required=True, help="a folder with test/<class>/ of CIFAR-10")
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    options = parser.parse_args()
    data = Data(name="imagefolder", path=options.data, test_limit=options.images)
    found = read_published(options.checkpoint)
    members = [ready(member, torch.device("cpu")) for member in found.members]
    report = measure(members, load_test(data)[1], options.steps)
    print("| loss attacked | mean-logits keeps, % | mean-softmax keeps, % |\n|---|---|---|")
    for row in report["rows"]:
        kept = (f"{100 * row[key]['value']:.1f}" for key in ("mean_logits", "mean_softmax"))
        print(f"| {row['loss']} | {' | '.join(kept)} |")
    print(f"\nimages without a gradient through the clamp: {report['saturated']['value']:.3f}")
    if options.json:
        print(json.dumps(report))


if __name__ == "__main__":
    main()
