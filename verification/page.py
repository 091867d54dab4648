"""The report as one self-contained page: the verdict first."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

CSS = """
:root{--ink:#1f2933;--muted:#52606d;--line:#d9dee4;--soft:#f5f7fa;--ok:#1b6e3c;--bad:#a61b1b;
--wait:#8a5a00}
*{box-sizing:border-box}
body{margin:0;font:16px/1.55 system-ui,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;
color:var(--ink);background:#fff}
main{max-width:60rem;margin:0 auto;padding:1.5rem 1.25rem 4rem}
h1{font-size:1.45rem;line-height:1.25;margin:0 0 .25rem;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:2.25rem 0 .5rem;padding-top:.75rem;border-top:1px solid var(--line)}
p,ul{max-width:46rem}
.sub{color:var(--muted);margin:0 0 1rem;overflow-wrap:anywhere}
.verdict{border:1px solid var(--line);border-left:.5rem solid var(--wait);padding:.75rem 1rem;
background:var(--soft);margin:1rem 0}
.verdict strong{font-size:1.3rem;letter-spacing:.02em}
.VALID{border-left-color:var(--ok)}.VALID strong{color:var(--ok)}
.INVALID{border-left-color:var(--bad)}.INVALID strong{color:var(--bad)}
.INCONCLUSIVE strong{color:var(--wait)}
.verdict p{margin:.25rem 0 0}
.wide{overflow-x:auto;margin:.5rem 0 1rem}
table{border-collapse:collapse;width:100%;font-size:.9rem}
th,td{text-align:left;padding:.35rem .6rem;border-bottom:1px solid var(--line);vertical-align:top}
th{font-weight:600;color:var(--muted);white-space:nowrap}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
td small{color:var(--muted)}
code{font:.85em ui-monospace,Consolas,monospace;overflow-wrap:anywhere}
.ok{color:var(--ok)}.bad{color:var(--bad);font-weight:600}.wait{color:var(--wait);font-weight:600}
figure{margin:.75rem 0 1.25rem}
figure img{max-width:100%;height:auto;display:block}
figcaption{color:var(--muted);font-size:.88rem;max-width:46rem;margin-top:.35rem}
details summary{cursor:pointer;color:var(--muted)}
@media print{body{font-size:10.5pt}main{max-width:none;padding:0}h2{break-after:avoid}
figure,tr,.verdict{break-inside:avoid}.wide{overflow:visible}table{font-size:8.5pt}}
@media(max-width:30rem){main{padding:1rem .8rem 3rem}table{font-size:.82rem}
th,td{padding:.3rem .4rem}}
"""
MEANS = {
    "VALID": "The evaluation passed its own checks; the figures below mean what they say.",
    "INCONCLUSIVE": "At least one check failed or could not be run: the figures may flatter the "
    "model and must not be relied on.",
    "INVALID": "A check shows that evaluation or model is broken: the figures mean nothing.",
}
CAPTIONS = {
    "curves": "Accuracy on the test images as the attacker is allowed more change. Bands are "
    "Wilson 95% intervals. The control is the same kind of ensemble without the defence.",
    "matrices": "Left: how often an image made to fool one member (row) also fools another "
    "(column), on images that all get right. Right: how differently two members see.",
    "regions": "What each member answers around a test image (the cross): one colour a class, "
    "the horizontal axis along the sign of the ensemble's gradient, in units of pixel change.",
    "pictures": "Test images, versions that fool the model, and what was changed (grey is none).",
}


def page(report: dict[str, Any], plots: Mapping[str, bytes]) -> bytes:
    """Return the report as UTF-8 HTML that fetches nothing and runs nothing.

    Args:
        report: as written to `model.report.json`.
        plots: PNG bytes by name (`curves`, `matrices`, `regions`, `pictures`).
    """
    digest = base64.b64encode(hashlib.sha256(CSS.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'"
    )
    model = report["model"]
    title = f"Robustness of {model['file']}"
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="sub">model {escape(model["name"])}, {model["members"]} members, '
        f"{escape(model['precision'])}; sha256 <code>{model['sha256']}</code></p>",
        f'<div class="verdict {report["verdict"]}"><strong>{report["verdict"]}</strong>'
        f"<p>{MEANS[report['verdict']]}</p>{_failed(report)}</div>",
        "<h2>In plain words</h2>",
        *(f"<p>{sentence}</p>" for sentence in summary(report)),
        _plot("curves", plots),
        "<h2>Accuracy under attack</h2>",
        _accuracy(report),
        _against(report),
        "<h2>Each attack alone</h2>",
        _each_attack(report),
        "<h2>Disagreement as an alarm</h2>",
        _alarm(report),
        _members(report, plots),
        _plot("pictures", plots, heading="What an attack looks like"),
        "<h2>Checks of this evaluation</h2>",
        _gates(report),
        _live(report),
        "<h2>What was done</h2>",
        _threat(report),
        _parameters(report),
        "<h2>Out of scope</h2>",
        _list(report["out_of_scope"]),
        "<h2>Check it yourself</h2>",
        _replay(report),
    ]
    head = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{CSS}</style></head><body><main>"
    )
    return (head + "\n".join(part for part in body if part) + "</main></body></html>\n").encode()


def summary(report: dict[str, Any]) -> list[str]:
    """Return the report in sentences for people who sign, as HTML."""
    row, n = report["robust_accuracy"][-1], report["data"]["n"]
    clean = report["clean_accuracy"]
    said = [
        f"On {n} test images that no training saw, the model answers {_percent(clean)} rightly "
        f"when nobody interferes."
    ]
    change = (
        f"{100 * row['eps']:.3g}% of the pixel range" if _linf(report) else f"{row['eps']:g} (L2)"
    )
    if row["transfer"]:
        said.append(
            f"Where an attacker who has models of their own, but not this one, may change every "
            f"pixel by up to {change}, it still answers {_percent(row['transfer'])} rightly."
        )
    if row["white_box"]:
        said.append(
            f"An attacker who holds the model's weights leaves {_percent(row['white_box'])}. "
            "Diversity defends against transferred attacks; keep the weights secret."
        )
    else:
        said.append("What an attacker with the weights could do was not measured.")
    if report["control"] and report["control"]["what"] == "own":
        other = report["control"]["robust_accuracy"][-1]["transfer"]
        said.append(
            f"The same ensemble without the defence keeps {_percent(other)} under the same "
            "transferred attacks."
        )
    return said


def _failed(report: dict[str, Any]) -> str:
    names = [gate["name"] for gate in report["gates"] if not gate["passed"]]
    return f"<p>Not passed: {escape(', '.join(names))}.</p>" if names else ""


def _accuracy(report: dict[str, Any]) -> str:
    control = report["control"]
    other = control["robust_accuracy"] if control else [None] * len(report["robust_accuracy"])
    rows = [
        ["clean", _interval(report["clean_accuracy"]), "", "", ""]
        + ([_percent(control["clean_accuracy"])] if control else ["-"])
    ]
    for row, against in zip(report["robust_accuracy"], other, strict=True):
        rows.append(
            [
                f"{row['eps']:g}",
                _interval(row["transfer"]),
                _interval(row["white_box"]),
                _interval(row["all"]),
                _versions(row["all"]),
                _percent(against["transfer"]) if against else "-",
            ]
        )
    head = ["eps", "transfer", "white-box", "all attacks", "float / delivered", "control, transfer"]
    note = (
        "<p>An image counts as robust only if it is answered rightly untouched and after every "
        "attack, both as computed (float) and rounded to the 8 bits a server receives "
        "(delivered). Intervals are Wilson 95%.</p>"
    )
    return _table(head, rows, numbers=range(6)) + note


def _against(report: dict[str, Any]) -> str:
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
    return f"<h2>Against {escape(found['file'])}</h2>" + _table(head, rows, numbers=range(1, 5))


def _each_attack(report: dict[str, Any]) -> str:
    rows = []
    for attack in report["attacks"]:
        cells = [attack["name"], attack["threat"].replace("_", "-")]
        for row in report["robust_accuracy"]:
            found = (row["all"] or {}).get("attacks", {}).get(attack["name"])
            cells.append("-" if found is None else f"{100 * found:.1f}")
        rows.append(cells)
    eps = [f"eps {row['eps']:g}" for row in report["robust_accuracy"]]
    return (
        _table(["attack", "threat", *eps], rows, numbers=range(2, 2 + len(eps)))
        + "<p>Images answered rightly untouched and under this attack alone, %. Attacks marked "
        "“standing only” below were run only on images that had survived the others.</p>"
    )


def _alarm(report: dict[str, Any]) -> str:
    found = report["disagreement"]
    rows = [
        [
            row["attack"].replace("_", "-"),
            row["score"],
            _interval(row["auroc"], 3, 1),
            _interval(row["tpr_at_0.01"]),
            _interval(row["tpr_at_0.05"]),
            str(row["auroc"]["attacked"]),
        ]
        for row in found["alarm"]
    ]
    share = 100 * found["false_positive_rate"]
    text = (
        f"<p>The service calls an image suspicious where the members' Jensen-Shannon divergence "
        f"exceeds {found['threshold']:.4f}, which {share:g}% of {found['calibration_images']} "
        "held-out clean images do. How well that and other scores find attacked images that fool "
        "the model, at the largest eps; <em>detector-aware</em> attackers know the alarm and "
        "lower that divergence while they attack (not the other scores).</p>"
    )
    head = ["attack", "score", "AUROC", "found at 1% false alarms", "at 5%", "images"]
    return text + (_table(head, rows, numbers=range(2, 6)) if rows else "")


def _members(report: dict[str, Any], plots: Mapping[str, bytes]) -> str:
    if not report["members"]:
        return ""
    norms = ", ".join(f"{norm:.3g}" for norm in report["members"].get("gradient_norms", []))
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
        + _plot("matrices", plots)
        + f"<p>Mean length of each member's margin gradient: {norms}. One that is far longer than "
        "the others leads every attack.</p>"
        + _plot("regions", plots)
        + _table(head, rows, numbers=range(1, 5))
    )


def _gates(report: dict[str, Any]) -> str:
    words = {True: ("passed", "ok"), False: ("FAILED", "bad"), None: ("not run", "wait")}
    rows = []
    for gate in report["gates"]:
        word, kind = words[gate["passed"]]
        rows.append(
            f"<tr><td><code>{escape(gate['name'])}</code></td>"
            f'<td class="{kind}">{word}</td><td>{escape(gate["detail"])}</td></tr>'
        )
    head = "<tr><th>check</th><th>result</th><th>found</th></tr>"
    return f'<div class="wide"><table>{head}{"".join(rows)}</table></div>'


def _live(report: dict[str, Any]) -> str:
    if "live" not in report:
        return ""
    rows = [[key.replace("_", " "), str(value)] for key, value in report["live"].items()]
    return "<h2>The live service</h2>" + _table(["", ""], rows)


def _threat(report: dict[str, Any]) -> str:
    rows = [[key.replace("_", " "), str(value)] for key, value in report["threat_model"].items()]
    data = report["data"]
    rows += [
        ["images", f"{data['n']} of {data['name']}, {data['part']} part"],
        ["seed", str(report["seed"])],
        ["preset", report["preset"]],
        ["gradients from", report["model"]["gradients"]],
        ["time, machine", f"{report['run']['seconds']} s, {report['run']['machine']}"],
    ]
    rows += [[f"surrogate {s['name']}", _surrogate(s)] for s in report["surrogates"]]
    hashes = {
        "data": data["sha256"],
        "training data": data["train_sha256"],
        "configuration": report["configuration_sha256"],
    }
    rows += [[f"sha256 of {name}", value] for name, value in hashes.items()]
    return _table(["", ""], rows)


def _surrogate(found: dict[str, Any]) -> str:
    return (
        f"{found['method']}, {found['architecture']}, {found['members']} members, "
        f"held-out accuracy {found['holdout_accuracy']:.3f}, "
        f"sha256 {found['weights_sha256'][:16]}"
    )


def _parameters(report: dict[str, Any]) -> str:
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
    table = _table(["attack", *(key.replace("_", " ") for key in keys)], rows)
    return f"<details open><summary>Every attack's parameters</summary>{table}</details>"


def _replay(report: dict[str, Any]) -> str:
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


def _plot(name: str, plots: Mapping[str, bytes], heading: str = "") -> str:
    if name not in plots:
        return ""
    data = base64.b64encode(plots[name]).decode()
    above = f"<h2>{escape(heading)}</h2>" if heading else ""
    return (
        f'{above}<figure><img alt="{escape(CAPTIONS[name])}" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(CAPTIONS[name])}</figcaption></figure>"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{' class=n' if at in numbers else ''}>{escape(cell)}</{tag}>"
            for at, cell in enumerate(row)
        )

    top = f"<tr>{cells('th', head)}</tr>" if any(head) else ""
    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="wide"><table>{top}{body}</table></div>'


def _list(items: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul>"


def _linf(report: dict[str, Any]) -> bool:
    return bool(report["threat_model"]["norm"] == "Linf")


def _percent(rate: dict[str, Any] | None) -> str:
    return "-" if not rate or rate["value"] is None else f"{100 * rate['value']:.1f}%"


def _interval(rate: dict[str, Any] | None, places: int = 1, times: int = 100) -> str:
    if not rate:
        return "not run"
    if rate["value"] is None:
        return "-"
    value, low, high = (f"{times * rate[key]:.{places}f}" for key in ("value", "low", "high"))
    return f"{value} ({low}-{high})"


def _versions(rate: dict[str, Any] | None) -> str:
    return f"{100 * rate['float']:.1f} / {100 * rate['delivered']:.1f}" if rate else "-"
