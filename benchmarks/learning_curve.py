"""How many images are enough: held-out accuracy by the number of training images of a class.

python -m benchmarks.learning_curve [--tree FOLDER] [--counts 10,30,100,200] [--json] [--save]

One standard network of the recipe `traffic-signs`, each time the same number of gradients, so that
a difference is one of images and not of work. The held-out tracks are the same each time; smaller
training sets are parts of the larger ones. A class with fewer images gives all that it has. The
images are `gtsrb.tar.xz` in $DVERGE_TEST_DATA; --tree names them where they are unpacked.
"""

from __future__ import annotations

import os
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.bench import machine, say
from benchmarks.report import busy_percent, finish, parser
from dverge_serve.progress import show
from training.config import Config
from training.data.splits import Split, TrainingData, load_training
from training.recipe import data_overrides, load_recipe
from training.seeds import generator
from training.trainer import train

ARCHIVE = "gtsrb.tar.xz"
MOST_EPOCHS = 400
COLUMNS = ["images_of_a_class", "images", "epochs", "accuracy", "lowest", "highest"]


def first_of_each_class(labels: Tensor, count: int) -> Tensor:
    """Return the rows of at most `count` images of each class, drawn at random; sorted."""
    order = torch.randperm(len(labels), generator=generator("learning curve"))
    rows = [order[labels[order] == label][:count] for label in sorted(set(labels.tolist()))]
    return torch.cat(rows).sort().values


def curve(
    config: Config, data: TrainingData, counts: Sequence[int], seeds: int, folder: Path
) -> list[dict[str, Any]]:
    """Return a row for each count: the mean accuracy over the seeds and its ends.

    Args:
        config: of one standard network.
        data: all images, in memory.
        counts: images of each class.
        seeds: how many networks are trained with each.
        folder: for their runs.
    """
    assert isinstance(data.train, Split)
    rows = []
    for count in counts:
        part = replace(data, train=data.train.take(first_of_each_class(data.train.labels, count)))
        runs = [
            train(replace(config, seed=seed), folder / f"{count}-{seed}", data=part)
            for seed in range(seeds)
        ]
        found = [run.checkpoint["holdout_accuracy"] for run in runs]
        row = {
            "images_of_a_class": count,
            "images": len(part.train),
            "epochs": runs[0].config.standard.epochs,
            "accuracy": sum(found) / len(found),
            "lowest": min(found),
            "highest": max(found),
        }
        rows.append(row)
        say(f"{count} images of a class: held-out accuracy {row['accuracy']:.3f}")
    return rows


def main() -> None:
    """Run the benchmark from the command line."""
    show()
    arguments = parser(__doc__, "two small counts and few gradients")
    arguments.add_argument("--tree", type=Path, help="the images, where they are unpacked already")
    arguments.add_argument("--counts", default="10,30,100,200", help="images of a class")
    arguments.add_argument("--seeds", type=int, default=1, help="networks trained for each count")
    arguments.add_argument("--gradients", type=int, default=100_000, help="of each network")
    chosen = arguments.parse_args()
    counts = [int(count) for count in chosen.counts.split(",")]
    if chosen.quick:
        counts, chosen.gradients = [5, 10], 2000
    here = machine() | {"busy_percent": busy_percent()}
    with tempfile.TemporaryDirectory() as name:
        folder, tree = Path(name), chosen.tree
        if tree is None:
            with tarfile.open(Path(os.environ["DVERGE_TEST_DATA"]) / ARCHIVE) as tar:
                tar.extractall(folder, filter="data")
            tree = folder / "gtsrb"
        changes = {
            "method": "standard",
            "members": 1,
            "standard.epochs": MOST_EPOCHS,
            "standard.budget": chosen.gradients,
        }
        config = load_recipe("traffic-signs", data_overrides(tree) | changes)
        rows = curve(config, load_training(config.data), counts, chosen.seeds, folder / "runs")
    report = {"machine": here, "rows": rows, "bars": [], "skipped": []}
    finish("learning_curve", report, COLUMNS, chosen)


if __name__ == "__main__":
    main()
