"""Adversarial images a second: the attack core beside the loops that people write.

python -m benchmarks.attacks [--images 128] [--steps 10] [--seconds 120] [--json]

The same ensemble (three ResNet-20, mean of logits, CIFAR-10 shapes), images, eps and gradient
steps for all, in turns. `plain loop` is PGD as popular libraries write it: the model as it was
trained, in evaluation mode, and `loss.backward()`; `plain loop, input gradient only` asks for the
images' gradient alone. The product folds BatchNorm into the convolutions, keeps no gradient of a
parameter, works channels last and gives whole batches of images to threads: in fp32 for the
model's own gradients (white-box), in bf16 for surrogates' (transfer) where the hardware has it.
pyautoattack's APGD does more at each step (a best point, a falling step size): it is shown,
without a bar.
"""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.bench import bar, machine, ratio, say, turns
from benchmarks.report import busy_percent, finish, parser
from training.data.splits import Split, to_float
from training.device import autocast_dtype
from training.models.build import build_members
from training.models.ensemble import Ensemble
from training.models.member import Member
from training.recipe import load_recipe
from verification.attacks.gradient_attack import GradientAttack
from verification.gradients import ready

EPS, BAR = 0.03, 2.0
LOWERED = "product, transfer (bf16)"
ATTACK = GradientAttack(name="pgd", threat="white_box", source="target", loss="ce")


def trained(count: int) -> list[Member]:
    """Return members with BatchNorm statistics that have seen images; weights are random."""
    config = load_recipe("cifar10", {"members": count})
    members = build_members(config, 10, config.data.mean, config.data.std)
    torch.manual_seed(0)
    for member in members:
        for _ in range(3):
            member.train()(torch.rand(64, 3, 32, 32))
        member.eval()
    return members


def plain(model: nn.Module, images: Tensor, labels: Tensor, steps: int, *, whole: bool) -> Tensor:
    """PGD as popular libraries write it; `whole` also computes the parameters' gradients."""
    adversarial = images + torch.empty_like(images).uniform_(-EPS, EPS)
    adversarial = adversarial.clamp(0, 1).detach()
    for _ in range(steps):
        adversarial.requires_grad_(True)
        loss = F.cross_entropy(model(adversarial), labels)
        if whole:
            model.zero_grad()
            torch.autograd.backward(loss)
            gradient = adversarial.grad
        else:
            (gradient,) = torch.autograd.grad(loss, adversarial)
        assert gradient is not None
        adversarial = adversarial.detach() + EPS / 5 * gradient.sign()
        delta = (adversarial - images).clamp(-EPS, EPS)
        adversarial = (images + delta).clamp(0, 1).detach()
    return adversarial


def product(members: Sequence[nn.Module], split: Split, steps: int) -> Tensor:
    """The same attack as verification makes it."""
    attack, model = replace(ATTACK, steps=steps), Ensemble(members)
    return attack.run(model, to_float(split.images), split.labels, EPS, 0).images


def prepared(members: Sequence[Member], *, lowered: bool) -> list[Member]:
    """Return the members as verification holds them."""
    return [ready(member, torch.device("cpu"), lowered=lowered) for member in members]


def measure(images: int, steps: int, seconds: float) -> dict[str, Any]:
    """Return the report."""
    members = trained(3)
    model = Ensemble(members).eval()
    labels = torch.randint(0, 10, (images,))
    split = Split(torch.randint(0, 256, (images, 3, 32, 32), dtype=torch.uint8), labels)
    x = to_float(split.images)
    ours = prepared(members, lowered=False)
    with torch.no_grad():
        apart = (model(x) - Ensemble(ours)(x)).abs().max()
    assert float(apart) < 1e-2, f"not the same model: {float(apart)}"
    cases: dict[str, Callable[[], Any]] = {
        "plain loop": lambda: plain(model, x, labels, steps, whole=True),
        "plain loop, input gradient only": lambda: plain(model, x, labels, steps, whole=False),
        "product, white-box (fp32)": lambda: product(ours, split, steps),
    }
    skipped = []
    if autocast_dtype("auto", torch.device("cpu")) is not None:
        low = prepared(members, lowered=True)
        cases[LOWERED] = lambda: product(low, split, steps)
    else:
        skipped.append({"name": LOWERED, "why": "this hardware has no bf16"})
    if importlib.util.find_spec("pyautoattack") is not None:
        from pyautoattack.autopgd_base import APGDAttack

        apgd = APGDAttack(model, n_iter=steps, eps=EPS, norm="Linf", seed=0, device="cpu")
        apgd.init_hyperparam(x)
        cases["pyautoattack, one run of APGD"] = lambda: apgd.attack_single_run(x, labels)
    else:
        skipped.append({"name": "pyautoattack", "why": "the extra `audit` is not installed"})
    say(f"{images} images, {steps} steps, {torch.get_num_threads()} threads")
    times = turns(cases, seconds=seconds, least=5)
    rows = [
        {
            "case": name,
            "images_per_s": images / statistics.median(found),
            "times the plain loop": ratio(times, "plain loop", name),
            "turns": len(found),
        }
        for name, found in times.items()
    ]
    here = machine() | {"torch": torch.__version__, "threads": torch.get_num_threads()}
    bars = [
        bar(f"{name}, beside the plain loop", ratio(times, "plain loop", name), "times", BAR)
        for name in times
        if name.startswith("product")
    ]
    return {"machine": here, "rows": rows, "bars": bars, "skipped": skipped}


def main() -> None:
    """Run the benchmark from the command line."""
    arguments = parser(__doc__, "32 images, 2 steps, 10 seconds")
    arguments.add_argument("--images", type=int, default=128)
    arguments.add_argument("--steps", type=int, default=10)
    arguments.add_argument("--seconds", type=float, default=120.0)
    options = arguments.parse_args()
    if options.quick:
        options.images, options.steps, options.seconds = 32, 2, 10.0
    busy = busy_percent()
    report = measure(options.images, options.steps, options.seconds)
    report["machine"] |= {"busy_percent": busy}
    columns = ["case", "images_per_s", "times the plain loop", "turns"]
    finish("attacks", report, columns, options)


if __name__ == "__main__":
    main()
