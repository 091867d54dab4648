"""What transferred attacks do to the images of one class: a picture and two counts.

python -m benchmarks.attacked_class MODEL.onnx CLASS PICTURE.png [--run FOLDER] [--eps 8/255]

`dverge verify-robustness` keeps the attacked images beside the model; the control is the standard
ensemble of the run. The picture shows the first test images of the class that both answer rightly:
clean, attacked, and both answers to the attacked one. The attack shown is the first that fools the
control, whatever the model answers to it. The counts are of images that no transferred attack
fools.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
import torch
from matplotlib.figure import Figure

from benchmarks.bench import say
from dverge_serve.engine.radius import parse_radius, written
from dverge_serve.engine.session import Engine
from dverge_serve.images import to_float
from training.runs.directory import Run
from verification.report.evidence import evidence_folder, read_evidence
from verification.report.plots import GRID, STYLE

SHOWN = 6
Pixels = npt.NDArray[np.uint8]


def answers(engine: Engine, control: torch.nn.Module, pixels: Pixels) -> list[npt.NDArray[Any]]:
    """Return the class indices that the model and the control answer, `[n]` each."""
    images = to_float(pixels)
    with torch.no_grad():
        other = control(torch.from_numpy(images)).argmax(dim=1).numpy()
    return [engine.run_all(images).predictions, other]


def draw(path: Path, rows: list[tuple[Pixels, list[str]]]) -> None:
    """Draw a row of images `[n, C, H, W]` with a title each, for each of `rows`."""
    with mpl.rc_context(STYLE):
        count = len(rows[0][0])
        page = Figure((1.35 * count, 1.75 * len(rows)), dpi=150, layout="constrained")
        for row, (stack, titles) in enumerate(rows):
            for at in range(count):
                axes = page.add_subplot(len(rows), count, row * count + at + 1)
                axes.imshow(stack[at].transpose(1, 2, 0).squeeze(), cmap="gray", vmin=0, vmax=255)
                axes.set_title(titles[at], fontsize=7, pad=3)
                axes.set_xticks([])
                axes.set_yticks([])
                axes.spines[:].set_color(GRID)
        page.savefig(path, metadata={"Software": None})


def main() -> None:
    """Run it."""
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("model", type=Path)
    options.add_argument("kind", metavar="CLASS")
    options.add_argument("picture", type=Path, metavar="PICTURE.png")
    options.add_argument("--run", type=Path, default=Path("runs/latest"))
    options.add_argument("--eps", default="8/255")
    chosen = options.parse_args()
    control = Run.open_finished(chosen.run).ensemble("standard")
    folder = evidence_folder(chosen.model)
    index = json.loads(chosen.model.with_suffix(".report.json").read_bytes())["evidence"]
    eps = parse_radius(chosen.eps)
    with Engine(chosen.model, device="cpu") as engine:
        labels = engine.card.labels
        kept = read_evidence(folder, index["images"])
        of_class = np.flatnonzero(kept["labels"] == labels.index(chosen.kind))
        truth, clean = kept["labels"][of_class], kept["images"][of_class]
        right = [found == truth for found in answers(engine, control, clean)]
        stands = [each.copy() for each in right]
        shown, said = clean.copy(), np.full((2, len(clean)), -1)
        for entry in index["adversarial"]:
            if " from " not in entry["attack"] or not np.isclose(entry["eps"], eps):
                continue
            change = read_evidence(folder, entry)["delivered"][of_class]
            attacked = (clean.astype(np.int16) + change).astype(np.uint8)
            found = answers(engine, control, attacked)
            first = (said[1] < 0) & (found[1] != truth)
            shown[first] = attacked[first]
            said[:, first] = np.stack(found)[:, first]
            for model, answer in enumerate(found):
                stands[model] &= answer == truth
    rows = np.flatnonzero(right[0] & right[1] & (said[1] >= 0))[:SHOWN]
    if not len(rows):
        raise SystemExit(f"no transferred attack makes the control miss '{chosen.kind}'")
    told = [f"control: {labels[said[1, at]]}\nensemble: {labels[said[0, at]]}" for at in rows]
    draw(chosen.picture, [(clean[rows], [chosen.kind] * len(rows)), (shown[rows], told)])
    for name, before, after in zip(("ensemble", "control"), right, stands, strict=True):
        say(
            f"{name}: of {len(clean)} images of '{chosen.kind}', {before.sum()} right when clean, "
            f"{after.sum()} after every transferred attack at eps {written(eps)}"
        )


if __name__ == "__main__":
    main()
