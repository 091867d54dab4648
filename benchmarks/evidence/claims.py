"""The verdict on each claim: it holds, it does not, or the cells cannot decide it yet."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.evidence.paired import MARGIN, Difference, share, stack
from benchmarks.evidence.tables import (
    METHODS,
    THREATS,
    Variants,
    common_seeds,
    gradients,
    paired,
    points,
)

MISSING = "**Not told yet**: cells are missing."
EARLIER = ("standard-3", "adp-3", "gal-3")  # the ensemble methods the paper compares with
# Cells in which a member learns from one other a step, and what they are called.
ONE = {"one": "one partner", "mean": "one partner and mean of weights"}
QUARTER = 0.25
GAIN = 0.1  # over DVERGE, under transfer attacks at the largest radius


def more_robust_than_earlier_methods(variants: Variants) -> str:
    """Judge: higher transfer robustness than every earlier method, at a small clean cost."""
    if not all(name in variants for name in (*EARLIER, "dverge-3")):
        return MISSING
    eps = variants["dverge-3"][0]["eps"]
    lost = [
        (METHODS[name], each, found)
        for name in EARLIER
        for each in eps
        if (found := paired(variants, "dverge-3", name, "transfer", each)).low <= 0
    ]
    clean = paired(variants, "dverge-3", "standard-3", "clean")
    cost = f"The cost in clean accuracy against the standard ensemble is {points(clean)} points."
    if not lost:
        return (
            "**Holds**: at every eps DVERGE keeps more under transfer attacks than the standard "
            f"ensemble, ADP and GAL, every interval above zero. {cost}"
        )
    told = "; ".join(f"{name} at eps {each:g}: {points(found)}" for name, each, found in lost)
    return f"**Does not hold everywhere**: not clearly above {told} points. {cost}"


def beside_adversarial_training(variants: Variants) -> str:
    """Compare DVERGE with adversarial training, and with both together."""
    adversarial, both = "adversarial-3", "dverge+adversarial-3"
    if not all(name in variants for name in ("dverge-3", adversarial, both)):
        return MISSING
    eps = max(variants["dverge-3"][0]["eps"])

    def told(ours: str, other: str) -> str:
        clean = points(paired(variants, ours, other, "clean"))
        rest = [
            f"{points(paired(variants, ours, other, threat, eps))} {name} at eps {eps:g}"
            for threat, name in (("transfer", "transfer"), ("white_box", "white-box"))
        ]
        return f"{clean} clean, {', '.join(rest)}"

    return (
        f"Less adversarial training DVERGE has {told('dverge-3', adversarial)}; the two together "
        f"less adversarial training alone {told(both, adversarial)}."
    )


def learns_from_other_networks(variants: Variants) -> list[str]:
    """Judge: who learns from the attacks of some networks resists those of others."""
    if not all(name in variants for name in ("dverge-3", "standard-3")):
        return [MISSING]
    told = []
    for name in ("transfer-3", "dverge+transfer-3"):
        if name not in variants:
            told.append(f"`{name}`: not run yet.")
            continue
        eps = max(variants[name][0]["eps"])
        gained, white = (
            paired(variants, name, "dverge-3", threat, eps) for threat in ("transfer", "white_box")
        )
        clean = paired(variants, name, "standard-3", "clean")
        verdict = "holds" if gained.value >= GAIN and clean.value >= MARGIN else "does not hold"
        told.append(
            f"{METHODS[name]}, seeds: {len(common_seeds(variants, name, 'dverge-3'))}, "
            f"**{verdict}**: at eps {eps:g} {points(gained)} points beside DVERGE under transfer "
            f"attacks and {points(white)} under white-box ones; clean {points(clean)} beside the "
            "standard ensemble."
        )
    return told


def grows_with_members(variants: Variants) -> str:
    """Judge: DVERGE's robustness rises with members, the standard ensemble's does not."""
    ends = [f"{method}-{size}" for method in ("dverge", "standard") for size in (2, 8)]
    if not all(name in variants for name in ends):
        return MISSING
    holds: dict[bool, list[str]] = {True: [], False: []}
    for threat, told in THREATS.items():
        for eps in variants["dverge-2"][0]["eps"]:
            ours, theirs = (
                paired(variants, f"{method}-8", f"{method}-2", threat, eps)
                for method in ("dverge", "standard")
            )
            holds[ours.low > 0 and theirs.value < ours.value / 2].append(f"{told} {eps:g}")
    verdict = "Does not hold" if not holds[True] else "Holds in part" if holds[False] else "Holds"
    rises = "from 2 to 8 members DVERGE gains, and more than twice what the standard ensemble gains"
    where = f"in {', '.join(holds[True]) or 'no column'}"
    return f"**{verdict}**: {rises}, {where}" + (
        f"; not in {', '.join(holds[False])}." if holds[False] else "."
    )


def rules_are_alike(variants: Variants) -> str:
    """Judge: whether any rule of combination is better than the mean of logits."""
    records = variants.get("dverge-3")
    if not records:
        return MISSING
    apart, first, columns = 0.0, 0, 0
    for threat in ("transfer", "white_box"):
        for eps in records[0]["eps"]:
            values = {
                rule: share(stack(records, threat, eps, rule)).value
                for rule in ("mean-logits", "mean-softmax", "vote")
            }
            best = max(values.values())
            apart = max(apart, best - min(values.values()))
            first, columns = first + (values["mean-logits"] == best), columns + 1
    return (
        f"For DVERGE the three rules are at most {100 * apart:.1f} points apart; in {first} of the "
        f"{columns} columns under attack the mean of logits, which is what is served, keeps the "
        "most. No attack here aims at the vote, so its white-box column is an upper bound."
    )


def fast_is_not_inferior(variants: Variants, exact: str, fast: Sequence[str]) -> list[str]:
    """Judge each fast variant against the exact recipe: cost, and what it may have lost."""
    if exact not in variants:
        return [MISSING]
    told = []
    for name in fast:
        if name not in variants:
            told.append(f"`{name}`: not run yet.")
            continue
        spent = gradients(variants[name]) / gradients(variants[exact])
        checks = judged(variants, name, exact)
        failed = [f"{what} {points(found)}" for what, found in checks if not found.not_inferior]
        passed = [what for what, found in checks if found.not_inferior]
        seeds = len(common_seeds(variants, name, exact))
        head = f"`{name}`, {spent:.0%} of the gradient evaluations, seeds: {seeds}, "
        if spent > QUARTER:
            told.append(f"{head}more than a quarter.")
        elif failed:
            held = f"; non-inferior in {', '.join(passed)}" if passed else ""
            told.append(f"{head}**not shown to be non-inferior** in {'; '.join(failed)}{held}.")
        else:
            worst = min(found.low for _, found in checks)
            told.append(
                f"{head}**non-inferior** in clean and in transfer accuracy at every eps (the "
                f"lowest interval ends at {100 * worst:+.1f}, allowed {100 * MARGIN:.0f})."
            )
    return told


def one_partner_is_enough(variants: Variants, pairs: Iterable[tuple[str, str]]) -> list[str]:
    """Judge: one partner a step in place of all is not inferior, and its cost grows linearly.

    Args:
        variants: all there are.
        pairs: one partner, all others, by the number of members.
    """
    there = [pair for pair in pairs if all(name in variants for name in pair)]
    if not there:
        return [MISSING]
    told = []
    for one, every in there:
        failed = [
            f"{what} {points(found)}"
            for what, found in judged(variants, one, every, [*THREATS])
            if not found.not_inferior
        ]
        (name, _, size), seeds = one.rpartition("-"), len(common_seeds(variants, one, every))
        shown = f"**not shown** in {'; '.join(failed)}" if failed else "**holds** in every column"
        told.append(f"{ONE[name]}, {size} members, seeds: {seeds}: {shown}.")
    grown = [
        f"{gradients(variants[f'{name}-8']) / gradients(variants[f'{name}-3']):.1f} times {what}"
        for name, what in (("one", "with one partner"), ("all", "with all others"))
        if f"{name}-8" in variants and f"{name}-3" in variants
    ]
    if grown:
        told.append(f"From 3 to 8 members the cost grows {', '.join(grown)}.")
    return told


def judged(
    variants: Variants, ours: str, other: str, threats: Sequence[str] = ("transfer",)
) -> list[tuple[str, Difference]]:
    """Return the differences that non-inferiority is judged by."""
    return [("clean", paired(variants, ours, other, "clean"))] + [
        (f"{THREATS[threat]} at eps {each:g}", paired(variants, ours, other, threat, each))
        for threat in threats
        for each in variants[ours][0]["eps"]
    ]
