"""The sections of the report's page, each from its part of the report."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from verification.report.markup import interval, percent, plot, scrolled, table, versions


def accuracy(report: dict[str, Any]) -> str:
    """Return accuracy at every radius, with intervals, beside the control's."""
    control = report["control"]
    other = control["robust_accuracy"] if control else [None] * len(report["robust_accuracy"])
    rows = [
        ["clean", interval(report["clean_accuracy"]), "", "", ""]
        + ([percent(control["clean_accuracy"])] if control else ["-"])
    ]
    for row, against in zip(report["robust_accuracy"], other, strict=True):
        rows.append(
            [
                f"{row['eps']:g}",
                interval(row["transfer"]),
                interval(row["white_box"]),
                interval(row["all"]),
                versions(row["all"]),
                percent(against["transfer"]) if against else "-",
            ]
        )
    head = ["eps", "transfer", "white-box", "all attacks", "float / delivered", "control, transfer"]
    note = (
        "<p>An image counts as robust only if it is answered rightly untouched and after every "
        "attack, both as computed (float) and rounded to the 8 bits a server receives "
        "(delivered). Intervals are Wilson 95%.</p>"
    )
    return table(head, rows, numbers=range(6)) + note


def against(report: dict[str, Any]) -> str:
    """Return the comparison with another model, where one was asked for."""
    found = report["against"]
    if not found:
        return ""
    rows = [
        [
            row["what"].replace("_", "-"),
            f"{row['eps']:g}" if row["eps"] else "",
            str(row["only_this"]),
            str(row["only_other"]),
            f"{row['p_value']:.3g}",
        ]
        for row in found["comparison"]
    ]
    head = ["", "eps", "only this model is right", "only the other is", "p (McNemar)"]
    return f"<h2>Against {escape(found['file'])}</h2>" + table(head, rows, numbers=range(1, 5))


def each_attack(report: dict[str, Any]) -> str:
    """Return how much every attack alone leaves."""
    rows = []
    for attack in report["attacks"]:
        cells = [attack["name"], attack["threat"].replace("_", "-")]
        for row in report["robust_accuracy"]:
            found = (row["all"] or {}).get("attacks", {}).get(attack["name"])
            cells.append(_alone(found, report["outcomes"]["model"], attack["name"], row["eps"]))
        rows.append(cells)
    eps = [f"eps {row['eps']:g}" for row in report["robust_accuracy"]]
    return (
        table(["attack", "threat", *eps], rows, numbers=range(2, 2 + len(eps)))
        + "<p>Images answered rightly untouched and under this attack alone, %. Of attacks "
        "that were run only on images that had survived the others: how many of those "
        "stood.</p>"
    )


def _alone(found: float | None, outcome: dict[str, Any], attack: str, eps: float) -> str:
    """Return what an attack alone leaves; run on some images alone, how many of those stood."""
    lines = [
        each["images"]
        for each in outcome["survived"]
        if (each["attack"], each["eps"]) == (attack, eps)
    ]
    ran = sum(each != "-" for each in lines[0]) if lines else 0
    if found is None or not ran:
        return "-"
    if ran == len(lines[0]):
        return f"{100 * found:.1f}"
    stood = sum(set(image) == {"1"} for image in zip(*lines, strict=True))
    return f"{stood} of {ran}"


def alarm(report: dict[str, Any]) -> str:
    """Return how well disagreement finds attacked images."""
    found = report["disagreement"]
    rows = [
        [
            row["attack"].replace("_", "-"),
            row["score"],
            interval(row["auroc"], 3, 1),
            interval(row["tpr_at_0.01"]),
            interval(row["tpr_at_0.05"]),
            str(row["auroc"]["attacked"]),
        ]
        for row in found["alarm"]
    ]
    if found["threshold"] is None:
        return (
            "<p>No threshold: there are no clean images that no training saw and no attack uses. "
            "With <code>--images N</code> the other test images serve.</p>"
        )
    share, realised = 100 * found["false_positive_rate"], found["measured_false_positive_rate"]
    span = f"{100 * realised['low']:.1f} to {100 * realised['high']:.1f}"
    text = (
        f"<p>The service calls an image suspicious where the members' Jensen-Shannon divergence "
        f"exceeds {found['threshold']:.4f}, which at most {share:g}% of "
        f"{found['calibration_images']} clean images that no training saw do; of the test images "
        f"{percent(realised)} do ({span}). How well that and other scores "
        "find attacked images that fool the model, at the largest eps; <em>detector-aware</em> "
        "attackers know the alarm and lower that divergence while they attack (not the other "
        "scores).</p>"
    )
    head = ["attack", "score", "AUROC", "found at 1% false alarms", "at 5%", "images"]
    return text + (table(head, rows, numbers=range(2, 6)) if rows else "")


def members(report: dict[str, Any], plots: Mapping[str, bytes]) -> str:
    """Return what the members share and how their combinations compare."""
    if not report["members"]:
        return ""
    lengths = report["members"].get("gradient_norms", [])
    norms = ", ".join("not a number" if norm is None else f"{norm:.3g}" for norm in lengths)
    rows = [
        [
            row["what"].replace("_", "-"),
            f"{row['eps']:g}" if row["eps"] else "",
            f"{100 * row['mean_logits']:.1f}",
            f"{100 * row['mean_softmax']:.1f}",
            f"{100 * row['answers_differ']:.1f}",
        ]
        for row in report["combination"]
    ]
    head = ["images", "eps", "mean of logits, %", "mean of softmax, %", "answers differ, %"]
    return (
        "<h2>The members</h2>"
        + plot("matrices", plots)
        + f"<p>Mean length of each member's margin gradient: {norms}. One that is far longer than "
        "the others leads every attack.</p>"
        + plot("regions", plots)
        + table(head, rows, numbers=range(1, 5))
    )


def gates(report: dict[str, Any]) -> str:
    """Return every check with its result."""
    words = {True: ("passed", "ok"), False: ("FAILED", "bad"), None: ("not run", "wait")}
    rows = []
    for gate in report["gates"]:
        word, kind = words[gate["passed"]]
        rows.append(
            f'<th scope="row"><code>{escape(gate["name"])}</code></th>'
            f'<td class="{kind}">{word}</td><td>{escape(gate["detail"])}</td>'
        )
    head = ("check", "result", "found")
    top = "".join(f'<th scope="col">{name}</th>' for name in head)
    return scrolled([top, *rows], ", ".join(head))


def live(report: dict[str, Any]) -> str:
    """Return what the attack on a running service found, where one was asked for."""
    if "live" not in report:
        return ""
    found = report["live"]
    if "error" in found:
        return f"<h2>The live service</h2><p>It stopped answering: {escape(found['error'])}</p>"
    square = found["square"]
    rows = [
        ["eps", f"{found['eps']:g}"],
        ["it serves", "this very file" if found["same_model"] else "ANOTHER model file"],
        ["it exposes", f"{found['exposure']}: {', '.join(found['exposed'])}"],
        ["requests made", str(found["requests"])],
        ["clean accuracy, %", interval(found["clean_accuracy"])],
        ["transfer-robust accuracy, %", interval(found["transfer"])],
        [
            "Square, by its answers alone",
            f"broke {square['broken']} of {square['images']} images in {square['queries']} "
            f"queries, {square['queries_each_at_most']} an image at most",
        ],
    ]
    return "<h2>The live service</h2>" + table(["", ""], rows)


def threat(report: dict[str, Any]) -> str:
    """Return what the attacker knows, the data, the seeds and the hashes."""
    words = report["threat_model"] | {
        "eps": ", ".join(f"{eps:g}" for eps in report["threat_model"]["eps"])
    }
    rows = [[key.replace("_", " "), value] for key, value in words.items()]
    data = report["data"]
    rows += [
        ["images", f"{data['n']} of {data['name']}, {data['part']} part"],
        ["seed", str(report["seed"])],
        ["preset", report["preset"]],
        ["gradients from", report["model"]["gradients"]],
        ["time, machine", f"{report['run']['seconds']} s, {report['run']['machine']}"],
    ]
    rows += [["not run", f"{each['what']}: {each['why']}"] for each in report["left_out"]]
    rows += [[f"surrogate {s['name']}", _surrogate(s)] for s in report["surrogates"]]
    hashes = {
        "data": data["sha256"],
        "training data": data["train_sha256"],
        "configuration": report["configuration_sha256"],
    }
    rows += [[f"sha256 of {name}", value] for name, value in hashes.items()]
    return table(["", ""], rows)


def _surrogate(found: dict[str, Any]) -> str:
    return (
        f"{found['method']}, {found['architecture']}, {found['members']} members, "
        f"held-out accuracy {found['holdout_accuracy']:.3f}, "
        f"sha256 {found['weights_sha256'][:16]}"
    )


def parameters(report: dict[str, Any]) -> str:
    """Return the parameters in which the attacks differ."""
    keys = [
        key
        for key in report["attacks"][0]
        if key not in ("name", "gate", "control", "norm")
        and len({str(attack[key]) for attack in report["attacks"]}) > 1
    ]
    rows = [
        [attack["name"], *("" if attack[key] is None else str(attack[key]) for key in keys)]
        for attack in report["attacks"]
    ]
    shown = table(["attack", *(key.replace("_", " ") for key in keys)], rows)
    return f"<details open><summary>Every attack's parameters</summary>{shown}</details>"


def replay(report: dict[str, Any]) -> str:
    """Return how to score the saved images again, and what the terms mean."""
    stem = report["model"]["file"].removesuffix(".onnx")
    return (
        f"<p>The adversarial images are in <code>{escape(stem)}.report/</code>. This scores them "
        "again on the model file and compares every figure:</p>"
        f"<p><code>dverge replay {escape(stem)}.report.json</code></p>"
        "<p>Terms follow NIST AI 100-2 (evasion; black-box and white-box) and MITRE ATLAS "
        "AML.T0043. This report supports evidence for robustness requirements such as EU AI Act "
        "Art. 15(5); it does not certify anything.</p>"
        f'<p class="sub">dverge-serve {escape(report["tool_version"])}, '
        f"{escape(report['run']['finished'])}</p>"
    )
