"""What transfer attacks do to all test images of one class: a picture and two counts.

python -m benchmarks.attacked_class MODEL.onnx CLASS PICTURE.png --surrogates FOLDER
    [--run FOLDER] [--eps 8/255]

MI-FGSM from the surrogates (a run, as `dverge verify-robustness` keeps them in its cache) and from
each of its networks alone, with two losses, on the run's test images of the class, rounded to 8
bits. The control is the run's standard ensemble. The counts are of images that no attack fools; the
picture shows the first images that an attack makes the control miss, whatever the model answers:
clean, under the first such attack, and both answers to that.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
import torch
from matplotlib.figure import Figure

from benchmarks.bench import say
from dverge_serve.engine.radius import parse_radius, written
from dverge_serve.engine.session import Engine
from dverge_serve.images import to_float
from training.data.splits import Split, load_test
from training.models.ensemble import Ensemble
from training.runs.directory import Run
from verification.attacks.perturbation import quantize_uint8
from verification.attacks.transfer_presets import MPGD
from verification.report.plots import GRID, STYLE

SHOWN, STEPS = 6, 10
Pixels = npt.NDArray[np.uint8]


def attacked(surrogates: Ensemble, split: Split, eps: float) -> list[Pixels]:
    """Return the images of every attack, uint8 `[n, C, H, W]` each."""
    images, found = torch.from_numpy(to_float(split.images.numpy())), []
    for source in (surrogates, *surrogates):
        for loss in ("ce", "cw"):
            attack = replace(MPGD, steps=STEPS, loss=loss)
            made = attack(Ensemble([source]).eval(), images, split.labels, eps).numpy()
            found.append(quantize_uint8(made, split.images.numpy(), eps))
    return found


def draw(path: Path, rows: list[tuple[Pixels, list[str]]]) -> None:
    """Draw a row of images `[n, C, H, W]` with a title each, for each of `rows`."""
    with mpl.rc_context(STYLE):
        count = len(rows[0][0])
        page = Figure((1.6 * count, 1.75 * len(rows)), dpi=150, layout="constrained")
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
    options.add_argument("model", type=Path, metavar="MODEL.onnx")
    options.add_argument("kind", metavar="CLASS")
    options.add_argument("picture", type=Path, metavar="PICTURE.png")
    options.add_argument("--surrogates", type=Path, required=True)
    options.add_argument("--run", type=Path, default=Path("runs/latest"))
    options.add_argument("--eps", default="8/255")
    chosen = options.parse_args()
    run, eps = Run.open_finished(chosen.run), parse_radius(chosen.eps)
    control, surrogates = run.ensemble("standard"), Run.open_finished(chosen.surrogates).ensemble()
    labels, test = load_test(run.config.data)
    truth = labels.index(chosen.kind)
    split = test.take(torch.nonzero(test.labels == truth).flatten())
    clean = split.images.numpy()

    def answers(pixels: Pixels) -> npt.NDArray[np.int64]:
        images = to_float(pixels)
        with torch.no_grad():
            other = control(torch.from_numpy(images)).argmax(dim=1).numpy()
        return np.stack([engine.run_all(images).predictions, other])

    with Engine(chosen.model, device="cpu") as engine:
        right = answers(clean) == truth
        stands, shown, said = right.copy(), clean.copy(), np.full(right.shape, -1)
        for pixels in attacked(surrogates, split, eps):
            found = answers(pixels)
            first = right.all(axis=0) & (said[1] < 0) & (found[1] != truth)
            shown[first], said[:, first] = pixels[first], found[:, first]
            stands &= found == truth
    for name, before, after in zip(("ensemble", "control"), right, stands, strict=True):
        say(
            f"{name}: of {len(clean)} images of '{chosen.kind}', {before.sum()} right when clean, "
            f"{after.sum()} after every attack at eps {written(eps)}"
        )
    rows = np.flatnonzero(said[1] >= 0)[:SHOWN]
    if not len(rows):
        raise SystemExit("no attack makes the control miss one: there is nothing to show")
    told = [f"control: {labels[said[1, at]]}\nensemble: {labels[said[0, at]]}" for at in rows]
    draw(chosen.picture, [(clean[rows], [chosen.kind] * len(rows)), (shown[rows], told)])


if __name__ == "__main__":
    main()
