"""The page's tables as Markdown, made from the records."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.evidence.paired import Difference, Share, difference, share, stack
from benchmarks.evidence.record import Record
from benchmarks.evidence.rules import RULES

Variants = Mapping[str, Sequence[Record]]  # name -> one record a seed
METHODS = {
    "standard-3": "standard",
    "adp-3": "ADP",
    "gal-3": "GAL",
    "dverge-3": "**DVERGE**",
    "adversarial-3": "adversarial training",
    "dverge+adversarial-3": "DVERGE + adversarial",
    "transfer-3": "transfer",
    "dverge+transfer-3": "DVERGE + transfer",
}
COSTS = {
    "dverge-3-exact": "exact: 10 steps, 30 + 40 epochs, batch statistics",
    "dverge-3": "recipe `digits`: 3 steps, running statistics",
    "dverge-3-batch": "the same with batch statistics",
    "dverge-3-bf16": "the same in bf16",
    "dverge-3-fast-a": "fast A: 2 steps, one-cycle, 15 + 25 epochs",
    "dverge-3-fast-b": "fast B: 1 step, one-cycle, 12 + 15 epochs",
    "dverge-3-fast-c": "fast C, `digits-fast`: 1 step, one-cycle, 15 + 37 epochs, batches of 32",
    "standard-3": "standard, no second stage",
    "adp-3": "ADP",
    "gal-3": "GAL",
    "adversarial-3": "adversarial training",
    "dverge+adversarial-3": "DVERGE + adversarial",
}
THREATS = {"transfer": "transfer", "white_box": "white-box"}
NONE = "–"


def by_name(records: Iterable[Record], recipe: str) -> dict[str, list[Record]]:
    """Return a recipe's records by variant, seeds in order."""
    found: dict[str, list[Record]] = {}
    for each in sorted(records, key=lambda each: int(each["seed"])):
        if each["recipe"] == recipe:
            found.setdefault(each["name"], []).append(each)
    return found


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def accuracies(variants: Variants, names: Mapping[str, str]) -> str:
    """Return clean, transfer and white-box accuracy of the variants that are there."""
    here = [name for name in names if name in variants]
    if not here:
        return "Not run yet.\n"
    eps = variants[here[0]][0]["eps"]
    columns = [f"{told} {each:g}" for told in THREATS.values() for each in eps]
    rows = []
    for name in here:
        records = variants[name]
        cells = [percent(share(stack(records, "clean")))]
        for threat in THREATS:
            cells += [percent(share(stack(records, threat, each))) for each in eps]
        rows.append([names[name], *cells, str(len(records))])
    return table(["", "clean", *columns, "seeds"], rows)


def differences(variants: Variants, pairs: Mapping[str, tuple[str, str]], head: str) -> str:
    """Return paired differences of variants, in points.

    Args:
        variants: all there are.
        pairs: what a row is called, to the variant and the one it is set against.
        head: of the first column.
    """
    here = {told: pair for told, pair in pairs.items() if all(name in variants for name in pair)}
    if not here:
        return "Not run yet.\n"
    eps = variants[next(iter(here.values()))[0]][0]["eps"]
    columns = [f"{told} {each:g}" for told in THREATS.values() for each in eps]
    rows = []
    for told, (ours, other) in here.items():
        cells = [points(paired(variants, ours, other, "clean"))]
        for threat in THREATS:
            cells += [points(paired(variants, ours, other, threat, each)) for each in eps]
        rows.append([told, *cells, str(len(common_seeds(variants, ours, other)))])
    return table([head, "clean", *columns, "seeds"], rows)


def paired(
    variants: Variants, ours: str, other: str, what: str, eps: float | None = None
) -> Difference:
    """Return the paired difference of two variants over the seeds that both have."""
    seeds = common_seeds(variants, ours, other)
    mine, theirs = ({each["seed"]: each for each in variants[name]} for name in (ours, other))
    one, other_side = (stack([side[seed] for seed in seeds], what, eps) for side in (mine, theirs))
    return difference(one, other_side)


def common_seeds(variants: Variants, ours: str, other: str) -> list[int]:
    """Return the seeds that two variants both have."""
    mine, theirs = ({int(each["seed"]) for each in variants[name]} for name in (ours, other))
    return sorted(mine & theirs)


def combination_rules(variants: Variants, names: Mapping[str, str]) -> str:
    """Return every rule's accuracy on the same attacked images."""
    head = ["ensemble", "rule", "clean"]
    rows = []
    for name, told in names.items():
        for rule in RULES:
            records = variants.get(name)
            if not records:
                continue
            eps = records[0]["eps"]
            cells = [percent(share(stack(records, "clean", rule=rule)), bare=True)]
            for threat in THREATS:
                cells += [
                    percent(share(stack(records, threat, each, rule)), bare=True) for each in eps
                ]
            rows.append([told, rule, *cells])
            if len(head) == 3:
                head += [f"{told} {each:g}" for told in THREATS.values() for each in eps]
    return table(head, rows) if rows else "Not run yet.\n"


def alarm(variants: Variants, names: Mapping[str, str]) -> str:
    """Return how well disagreement detects attacked images, pooled over seeds."""
    head = ["ensemble", "attack", "fooled images", "AUROC", "caught at 5%", "false alarms"]
    rows = []
    for name, told in names.items():
        found = [row for each in variants.get(name, ()) for row in each["alarm"]]
        for kind in dict.fromkeys(row["attack"] for row in found):
            same = [row for row in found if row["attack"] == kind]
            what = f"{kind.replace('_', '-')}, eps {same[0]['eps']:g}"
            fooled = sum(row["auroc"]["attacked"] for row in same)
            rows.append(
                [
                    told,
                    what,
                    str(fooled),
                    _weighted([row["auroc"] for row in same], "attacked", "{:.2f}"),
                    _weighted([row["tpr_at_0.05"] for row in same], "n", "{:.0%}"),
                    _weighted([row["fpr_at_0.05"] for row in same], "n", "{:.0%}"),
                ]
            )
    return table(head, rows) if rows else "Not run yet.\n"


def costs(variants: Variants, names: Mapping[str, str], whole: str) -> str:
    """Return gradient evaluations, how they compare, and the seconds of the fastest seed.

    Args:
        variants: all there are.
        names: of the rows, and what they are called.
        whole: the variant whose evaluations are 100%.
    """
    head = ["", "gradient evaluations", "share", "first stage", "second stage", "load before"]
    base = gradients(variants[whole]) if whole in variants else None
    rows = []
    for name, told in names.items():
        if name not in variants:
            continue
        spent = gradients(variants[name])
        fastest = min(variants[name], key=lambda each: sum(each["training"]["seconds"].values()))
        first, *second = fastest["training"]["seconds"].values()
        rows.append(
            [
                told,
                f"{spent / 1e6:.2f} million",
                f"{spent / base:.0%}" if base else NONE,
                f"{first:.0f} s",
                f"{second[0]:.0f} s" if second else NONE,
                f"{fastest['machine']['load_average_before']:.1f}",
            ]
        )
    return table(head, rows) if rows else "Not run yet.\n"


def gradients(records: Sequence[Record]) -> int:
    """Return the gradient evaluations of one run, both stages."""
    return sum(records[0]["training"]["gradient_evaluations"].values())


def searched(found: Mapping[str, Any]) -> str:
    """Return the search's candidates on held-out images, means over its seeds."""
    columns = [key for key in found["rows"][0] if key not in ("candidate", "seed", "gradients")]
    named = ["clean" if column == "clean" else f"transfer {column}" for column in columns]
    head = ["candidate", "gradient evaluations", *named, "seeds"]
    rows = []
    for name in dict.fromkeys(row["candidate"] for row in found["rows"]):
        same = [row for row in found["rows"] if row["candidate"] == name]
        rows.append(
            [
                name,
                f"{same[0]['gradients'] / 1e6:.2f} million",
                *(f"{100 * np.mean([row[c] for row in same]):.1f}" for c in columns),
                str(len(same)),
            ]
        )
    return table(head, rows)


def percent(found: Share, *, bare: bool = False) -> str:
    """Return a share in percent, with its interval unless `bare`."""
    if bare:
        return f"{100 * found.value:.1f}"
    return f"{100 * found.value:.1f} ({100 * found.low:.0f}–{100 * found.high:.0f})"


def points(found: Difference) -> str:
    """Return a difference in points with its interval."""
    return f"{100 * found.value:+.1f} ({100 * found.low:+.1f} to {100 * found.high:+.1f})"


def _weighted(rates: Sequence[Record], weight: str, form: str) -> str:
    """Return the mean of the rates' values, weighted by the images behind each."""
    known = [rate for rate in rates if rate["value"] is not None and rate[weight]]
    if not known:
        return NONE
    total = sum(rate[weight] for rate in known)
    return form.format(sum(rate["value"] * rate[weight] for rate in known) / total)
