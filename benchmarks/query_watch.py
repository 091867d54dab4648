"""The watch for attacks by queries: what it sees, what it takes for one, and what it costs.

python -m benchmarks.query_watch DIGITS.onnx [--images 5] [--queries 500] [--tree FOLDER]
    [--signs FOLDER] [--rounds 3] [--seconds 5] [--save] [--json]

Attacks: Square, RayS and HopSkipJump on test images, one at a time, on the given model of the
digits and on the paper's published checkpoint (3 ResNet-20 for CIFAR-10), which is looked for in
$DVERGE_TEST_DATA. Every query is rounded to 8 bits and passes a watch with the default budget.
`over_budget` is the share of the queries that it counts as an attack, `first_after` the queries
before the first of them (median), `broken` the images that the attack breaks where the watch
observes, `broken_refused` where it refuses. The attacker who `evades` knows all of the watch but
its random numbers: it adds a shade of +-LEVELS in 4 x 4 blocks to each query, another one each
time, makes it stronger whenever it is refused, and asks again; an image that is answered wrongly is
asked once more without a shade.

False alarms: images of digits, CIFAR-10 and tracks of traffic signs, as callers might send them.
Cost: the service on 3 ResNet-20, off and observing in turns, under `wrk`. The bars are on processor
time for each image: that is what limits a busy service, and other processes change it least.
"""

from __future__ import annotations

import contextlib
import io
import os
import statistics
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from benchmarks.bench import machine, say
from benchmarks.precision import CHECKPOINT, published
from benchmarks.report import busy_percent, finish, parser
from benchmarks.watch_cost import cost
from dverge_serve.engine.session import Engine
from dverge_serve.images import to_float
from dverge_serve.serving.settings import Settings
from dverge_serve.serving.watch import NearCopies
from export.exporter import export
from training.data.splits import Split, load_test
from training.recipe import load_recipe
from verification.attacks.hop_skip_jump import HopSkipJump
from verification.attacks.perturbation import quantize_uint8
from verification.attacks.query_attack import QueryAttack
from verification.attacks.rays import RayS
from verification.attacks.square import Square

Pixels = npt.NDArray[np.uint8]
ATTACKS: dict[str, type[QueryAttack]] = {"Square": Square, "RayS": RayS, "HSJ": HopSkipJump}
BUDGET = Settings().watch_budget
SHADE, BLOCKS, STRONGER, MOST_SHADE, TRIES = 24.0, 4, 1.5, 128.0, 8
QUALITIES, SIDES = (60, 75, 85, 95), (24, 48, 64)
STREAM = 3000
COLUMNS = ["case", "images", "queries", "near_copies", "over_budget", "first_after"]
COLUMNS += ["broken", "broken_refused", "per_s", "cpu_ms"]


class RefusedError(Exception):
    """The service answered 429, and the attacker gives up."""


@dataclass
class Service:
    """A model behind a watch, as one attack sees it: queries in 8 bits, all of them counted."""

    engine: Engine
    label: int
    refuses: bool
    shade: float = 0.0
    draw: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    watch: NearCopies = field(default_factory=lambda: NearCopies(BUDGET))
    queries: int = 0
    copies: int = 0
    over: int = 0
    first_after: int | None = None

    def __call__(self, images: Tensor) -> Tensor:
        """Return the scores of images `[N, C, H, W]` in `[0,1]`, asked one after the other."""
        asked = np.rint(images.numpy() * 255)
        return torch.from_numpy(np.concatenate([self._asked(image) for image in asked]))

    def _asked(self, image: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        if not self.shade:
            return self._answer(image)
        for _ in range(TRIES):
            try:
                found = self._answer(image + self._shadow(image.shape))
            except RefusedError:
                self.shade = min(STRONGER * self.shade, MOST_SHADE)
                continue
            if found.argmax() != self.label:  # is it the shade that is answered wrongly?
                with contextlib.suppress(RefusedError):
                    found = self._answer(image)
            return found
        raise RefusedError

    def _shadow(self, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
        blocks = self.draw.uniform(-self.shade, self.shade, (BLOCKS, BLOCKS)).astype(np.float32)
        size = -(-max(shape[1:]) // BLOCKS)
        return np.kron(blocks, np.ones((size, size), np.float32))[: shape[1], : shape[2]]

    def _answer(self, image: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        sent = np.clip(np.rint(image), 0, 255).astype(np.uint8)[None]
        (seen,) = self.watch.see(sent)
        self.queries += 1
        self.copies += seen.copies > 0
        if seen.wait_s:
            self.over += 1
            if self.first_after is None:
                self.first_after = self.queries - 1
            if self.refuses:
                raise RefusedError
        return self.engine.run_all(to_float(sent)).logits


def attacks(name: str, engine: Engine, split: Split, eps: float, queries: int) -> Iterator[Any]:
    """Yield a row for each attack, by one who knows of no watch, and by one who evades it."""
    for kind, attack in ATTACKS.items():
        made = attack(name=kind, queries=queries)
        for evades, shade in (("", 0.0), (", evades", SHADE)):
            observed = [run(made, engine, split, eps, at, shade, False) for at in range(len(split))]
            refused = [run(made, engine, split, eps, at, shade, True) for at in range(len(split))]
            seen = [service for service, _ in observed]
            asked = sum(each.queries for each in seen)
            first = [each.first_after for each in seen if each.first_after is not None]
            row = {
                "case": f"{name}, eps {eps:.3g}: {kind}{evades}",
                "images": len(split),
                "queries": asked,
                "near_copies": sum(each.copies for each in seen) / asked,
                "over_budget": sum(each.over for each in seen) / asked,
                "first_after": statistics.median(first) if first else None,
                "broken": sum(broken for _, broken in observed),
                "broken_refused": sum(broken for _, broken in refused),
            }
            say(str(row))
            yield row


def run(
    attack: QueryAttack,
    engine: Engine,
    split: Split,
    eps: float,
    at: int,
    shade: float,
    refuses: bool,
) -> tuple[Service, bool]:
    """Attack one image; return the service that was asked, and whether the image is broken."""
    one = split.take(torch.tensor([at]))
    service = Service(engine, int(one.labels), refuses, shade, np.random.default_rng([at, 1]))
    clean = to_float(one.images.numpy())
    try:
        made = attack.run(
            attack.seen(service), torch.from_numpy(clean), one.labels, eps, "watch", at
        ).images.numpy()
    except RefusedError:
        return service, False
    sent = quantize_uint8(made, one.images.numpy(), eps)
    return service, bool(engine.run_all(to_float(sent)).predictions[0] != one.labels[0])


def right(engine: Engine, split: Split, count: int) -> Split:
    """Return the first images that the model answers rightly."""
    labels = split.labels.numpy()
    rows = np.flatnonzero(engine.run_all(to_float(split.images.numpy())).predictions == labels)
    return split.take(torch.from_numpy(rows[:count]))


def stream(name: str, images: Iterable[Pixels]) -> dict[str, Any]:
    """Return the row of images that are no attack, sent in this order."""
    watch = NearCopies(BUDGET)
    seen = [watch.see(image[None])[0] for image in images]
    row = {
        "case": name,
        "queries": len(seen),
        "near_copies": sum(each.copies > 0 for each in seen) / len(seen),
        "over_budget": sum(each.wait_s > 0 for each in seen) / len(seen),
    }
    say(f"{row}, most of one image: {max(each.copies for each in seen)}")
    return row


def tracks(signs: Path) -> Iterator[Pixels]:
    """Yield the frames of every track of traffic signs, in order, at 32 x 32."""
    for path in sorted(signs.glob("train/*/*")):
        with Image.open(path) as image:
            small = image.convert("RGB").resize((32, 32), Image.Resampling.BILINEAR)
        yield np.asarray(small).transpose(2, 0, 1)


def versions(images: Pixels) -> Iterator[Pixels]:
    """Yield each image as it is, as JPEG of several qualities, and from thumbnails."""
    for pixels in images:
        yield pixels
        picture = Image.fromarray(pixels.transpose(1, 2, 0))
        for quality in QUALITIES:
            file = io.BytesIO()
            picture.save(file, "JPEG", quality=quality)
            yield np.asarray(Image.open(file).convert("RGB")).transpose(2, 0, 1)
        for side in SIDES:
            small = picture.resize((side, side), Image.Resampling.BICUBIC)
            yield np.asarray(small.resize(picture.size, Image.Resampling.BICUBIC)).transpose(
                2, 0, 1
            )


def measure(options: Any, folder: Path) -> dict[str, Any]:
    """Return the report."""
    here = machine() | {"busy_percent": busy_percent()}
    data = Path(os.environ.get("DVERGE_TEST_DATA", "nowhere"))
    rows: list[dict[str, Any]] = []
    skipped: list[dict[str, str]] = []
    config = load_recipe("digits").data
    _, digits = load_test(config)
    with Engine(options.model, device="cpu", threads=1) as engine:
        some = right(engine, digits, options.images)
        rows += attacks("digits", engine, some, 0.2, options.queries)
    rows.append(stream("digits, all test images", digits.images.numpy()))
    if (data / CHECKPOINT).is_file():
        source = published(data, options.tree, folder)
        export(source, folder / "cifar10.onnx")
        _, photos = load_test(source.config.data)
        images = photos.images.numpy()[np.random.default_rng(0).permutation(len(photos))[:STREAM]]
        with Engine(folder / "cifar10.onnx", device="cpu", threads=1) as engine:
            order = torch.from_numpy(np.random.default_rng(1).permutation(len(photos))[:100])
            some = right(engine, photos.take(order), options.images)
            rows += attacks("CIFAR-10", engine, some, 8 / 255, options.queries)
        rows.append(stream("CIFAR-10, different images", images))
        rows.append(stream("CIFAR-10, 8 versions of each image", versions(images[:200])))
        signs = options.signs
        if signs is None:
            with tarfile.open(data / "gtsrb.tar.xz") as tar:
                tar.extractall(folder, filter="data")
            signs = folder / "gtsrb"
        rows.append(stream("traffic signs, tracks in order", tracks(signs)))
    else:
        skipped.append({"name": "CIFAR-10, traffic signs", "why": "DVERGE_TEST_DATA lacks them"})
    served, bars = cost(folder, options.rounds, options.seconds)
    return {"machine": here, "rows": rows + served, "bars": bars, "skipped": skipped}


def main() -> None:
    """Run the benchmark from the command line."""
    arguments = parser(__doc__, "one image, 100 queries, one round of one second")
    arguments.add_argument("model", type=Path, help="a model of the recipe `digits`")
    arguments.add_argument("--images", type=int, default=5, help="attacked, of each data set")
    arguments.add_argument("--queries", type=int, default=500, help="most for one image")
    arguments.add_argument("--tree", type=Path, help="CIFAR-10, where it is unpacked")
    arguments.add_argument("--signs", type=Path, help="traffic signs, where they are unpacked")
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--seconds", type=int, default=5)
    options = arguments.parse_args()
    if options.quick:
        options.images, options.queries, options.rounds, options.seconds = 1, 100, 1, 1
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        report = measure(options, Path(name))
    finish("query_watch", report, COLUMNS, options)


if __name__ == "__main__":
    main()
