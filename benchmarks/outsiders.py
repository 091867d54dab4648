"""What other people's attack libraries break that ours do not.

python -m benchmarks.outsiders MODEL.onnx ... [--run DIR ...] [--preset quick] [--eps 0.05,0.1]
    [--images N] [--threats white_box,transfer] [--save] [--json]

Every model is attacked twice, at the same radii and on the same test images: with the preset's own
attacks, by `run_suite`, nothing cached; and with foolbox, the Adversarial Robustness Toolbox and
pyautoattack (the reference AutoAttack), each on what the ones before it left. Whatever anybody
makes is scored by the engine in the model file, as floats and rounded to 8 bits, and counts in
both. `gap` is the share of the images that only the others broke, with its Wilson 95% interval; it
must be at most one point. `transfer` is the same for attacks without the weights: noise,
universal patterns and those from our surrogates; there the others are torchattacks' MI-DI and VMI,
and AutoAttack's APGD, from each surrogate and from all their networks as one ensemble.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torchattacks
from art.attacks.evasion import AutoProjectedGradientDescent
from art.estimators.classification import PyTorchClassifier
from foolbox.attacks import LinfAdamPGD, LinfPGD
from foolbox.models.pytorch import PyTorchModel
from pyautoattack.autopgd_base import APGDAttack
from torch import Tensor, nn

from benchmarks.bench import bar, machine, say
from benchmarks.report import busy_percent, finish, parser
from dverge_serve import images
from dverge_serve.engine.outputs import Scores
from training import pgd
from training.data.splits import Split, to_float
from training.models.ensemble import Ensemble
from verification.attacked_models import find_targets
from verification.attacks.attack import Attack, Threat
from verification.attacks.autoattack import AutoAttack
from verification.attacks.outcomes import Mask
from verification.attacks.perturbation import quantize
from verification.attacks.suite import run_suite
from verification.attacks.target import Scorer, Target
from verification.config import VerificationConfig
from verification.context import Context, find_context
from verification.metrics.statistics import rate

ALLOWED = 0.01  # of the images may be broken by the others alone
COLUMNS = ["model", "threat", "eps", "ours", "theirs", "union", "gap", "gap_high"]
COLUMNS += ["ours_s", "theirs_s", "found_by"]
Craft = Callable[[Tensor, Tensor], Tensor]  # images, labels -> adversarial images


@dataclass(frozen=True)
class Effort:
    """How hard the others try: `full`, or little with `--quick`."""

    steps: int
    restarts: int
    autoattack: bool


FULL, LITTLE = Effort(100, 3, autoattack=True), Effort(10, 1, autoattack=False)


def white_box(model: nn.Module, eps: float, effort: Effort) -> Iterator[tuple[str, Craft]]:
    """Yield the others' white-box attacks in their strongest settings, the cheap ones first."""
    seen = PyTorchModel(model, bounds=(0, 1), device="cpu")
    yield from _foolbox(seen, eps, effort)
    for loss in ("cross_entropy", "difference_logits_ratio"):
        yield f"ART AutoPGD, {loss}", _art(model, eps, loss, effort)
    if effort.autoattack:
        standard = AutoAttack(name="autoattack", threat="white_box", source="target")
        yield "pyautoattack, standard", lambda x, y: standard(model, x, y, eps)


def _foolbox(seen: PyTorchModel, eps: float, effort: Effort) -> Iterator[tuple[str, Craft]]:
    for kind in (LinfPGD, LinfAdamPGD):
        attack = kind(steps=effort.steps).repeat(effort.restarts)

        def craft(x: Tensor, y: Tensor, attack: Any = attack) -> Tensor:
            found: Tensor = attack(seen, x, y, epsilons=eps)[1]
            return found

        yield f"foolbox {kind.__name__}", craft


def _art(model: nn.Module, eps: float, loss: str, effort: Effort) -> Craft:
    def craft(x: Tensor, y: Tensor) -> Tensor:
        seen = PyTorchClassifier(
            model,
            loss=nn.CrossEntropyLoss(),
            input_shape=tuple(x.shape[1:]),
            nb_classes=model(x[:1]).shape[1],
            clip_values=(0.0, 1.0),
            device_type="cpu",
        )
        attack = AutoProjectedGradientDescent(
            seen,
            eps=eps,
            eps_step=2 * eps,
            max_iter=effort.steps,
            nb_random_init=effort.restarts,
            batch_size=len(x),
            loss_type=loss,
            verbose=False,
        )
        return torch.from_numpy(attack.generate(x.numpy(), y.numpy()))

    return craft


def transfer(model: nn.Module, eps: float, effort: Effort) -> Iterator[tuple[str, Craft]]:
    """Yield the others' attacks on one surrogate."""
    size = {"eps": eps, "alpha": eps / 5, "steps": effort.steps // 2, "decay": 1.0}
    yield "torchattacks MI-DI", torchattacks.DIFGSM(model, **size)
    yield "torchattacks VMI", torchattacks.VMIFGSM(model, **size | {"steps": 10}, N=10)
    apgd = APGDAttack(model, n_iter=effort.steps, eps=eps, norm="Linf", seed=0, device="cpu")
    apgd.init_hyperparam(torch.zeros(1, 1, 1, 1))
    yield "pyautoattack APGD", lambda x, y: apgd.attack_single_run(x, y)[0]


def theirs(
    engine: Scorer, split: Split, eps: float, attacks: Iterator[tuple[str, Craft]], right: Mask
) -> tuple[Mask, dict[str, Mask]]:
    """Return what stands after all attacks, bool `[n]`, and what each of them broke first."""
    standing, broke = right.copy(), {}
    for name, craft in attacks:
        rows = np.flatnonzero(standing)
        if not len(rows):
            break
        part = split.take(torch.from_numpy(rows))
        with torch.random.fork_rng():
            torch.manual_seed(0)
            made = craft(to_float(part.images), part.labels).detach()
        made = pgd.project(made, to_float(part.images), eps)
        wrong = np.zeros(len(rows), dtype=bool)
        for version in (made.numpy(), images.to_float(quantize(made, part.images, eps).numpy())):
            wrong |= engine.run_all(version).predictions != part.labels.numpy()
        broke[name] = np.zeros(len(standing), dtype=bool)
        broke[name][rows[wrong]] = True
        standing &= ~broke[name]
        say(f"  eps {eps:g}: {name} broke {wrong.sum()} of {len(rows)}")
    return standing, broke


@dataclass(frozen=True)
class Unnamed:
    """An engine without its hash: nothing that is made with it is cached."""

    engine: Scorer

    def run_all(self, images: npt.NDArray[np.float32]) -> Scores:
        """Return the scores of float32 images `[N, C, H, W]` in `[0,1]`."""
        return self.engine.run_all(images)


def ours(context: Context, target: Target, suite: Sequence[Attack]) -> tuple[list[Mask], float]:
    """Return what stands at each radius after the preset's attacks, and the seconds they took."""
    sources = {each.name: (each.members, "") for each in context.surrogates}  # no hash: no cache
    target = replace(target, engine=Unnamed(target.engine))
    if all(attack.threat == "white_box" for attack in suite):
        target = replace(target, weights="")
    begun = time.perf_counter()
    found = run_suite(suite, sources, {"model": target}, context.split, context.eps, seed=0)
    seconds = time.perf_counter() - begun
    return [found["model"].robust(suite, eps) for eps in context.eps], seconds


def compare(context: Context, threat: Threat, effort: Effort) -> Iterator[dict[str, Any]]:
    """Yield one row for each radius."""
    target = find_targets(context)[0]["model"]
    assert target.members is not None, "the run of this model was not found: give --run"
    suite = [attack for attack in context.suite if attack.threat == threat]
    kept, seconds = ours(context, target, suite)
    scores = context.engine.run_all(images.to_float(context.split.images.numpy()))
    right = np.asarray(scores.predictions == context.split.labels.numpy())
    for eps, stands in zip(context.eps, kept, strict=True):
        if threat == "white_box":
            attacks = white_box(Ensemble(target.members).eval(), eps, effort)
        else:
            sources = {each.name: list(each.members) for each in context.surrogates}
            every = list({id(each): each for own in sources.values() for each in own}.values())
            if len(every) > max(map(len, sources.values())):
                sources["all of them"] = every
            attacks = (
                (f"{name} from {source}", craft)
                for source, members in sources.items()
                for name, craft in transfer(Ensemble(members).eval(), eps, effort)
            )
        begun = time.perf_counter()
        left, broke = theirs(context.engine, context.split, eps, attacks, right)
        gap = rate(stands & ~left)
        found = {name: int((mask & stands).sum()) for name, mask in broke.items()}
        yield {
            "model": context.config.model.name,
            "threat": threat,
            "eps": eps,
            "ours": float(stands.mean()),
            "theirs": float(left.mean()),
            "union": float((stands & left).mean()),
            "gap": gap["value"],
            "gap_low": gap["low"],
            "gap_high": gap["high"],
            "ours_s": seconds / len(kept),
            "theirs_s": time.perf_counter() - begun,
            "found_by": ", ".join(f"{name}: {count}" for name, count in found.items() if count),
        }


def main() -> None:
    """Run the benchmark from the command line; exit 1 if a gap exceeds one point."""
    arguments = parser(__doc__, "24 images, 10 steps, no AutoAttack")
    arguments.add_argument("models", nargs="+", type=Path)
    arguments.add_argument("--run", nargs="+", type=Path, default=[], help="of each model")
    arguments.add_argument("--preset", default="quick")
    arguments.add_argument("--eps", default="", help="radii with commas; the recipe's")
    arguments.add_argument("--images", type=int)
    arguments.add_argument("--threats", default="white_box", help="white_box,transfer: or one")
    options = arguments.parse_args()
    effort = LITTLE if options.quick else FULL
    known: tuple[Threat, ...] = ("white_box", "transfer")
    threats = [each for each in known if each in options.threats.split(",")]
    busy = busy_percent()
    rows: list[dict[str, Any]] = []
    for index, model in enumerate(options.models):
        context = find_context(
            VerificationConfig(
                model=model,
                preset=options.preset,
                run=options.run[index] if options.run else None,
                eps=tuple(float(each) for each in options.eps.split(",") if each),
                images=24 if options.quick else options.images,
                device="cpu",
            )
        )
        for threat in threats:
            say(f"{model}, {threat}")
            rows += compare(context, threat, effort)
    bars = [
        bar(
            f"{row['model']}, {row['threat']}, eps {row['eps']:g}",
            row["gap"],
            "of the images",
            ALLOWED,
            at_most=True,
        )
        for row in rows
    ]
    here = machine() | {"busy_percent": busy, "threads": torch.get_num_threads()}
    report = {"machine": here, "rows": rows, "bars": bars, "skipped": []}
    finish("outsiders", report, COLUMNS, options)
    if not all(each["holds"] for each in bars):
        sys.exit(1)


if __name__ == "__main__":
    main()
