"""One DVERGE step beside the published procedure's, at every layer, in one run.

python -m benchmarks.train_step [--rounds 1] [--layers 1,10,20] [--device auto] [--json] [--save]

ResNet-20, three members, batch 128, the recipe `cifar10`. The product at its default settings
(bf16 where the hardware has it, running statistics while distilling), the same in fp32, and to the
letter in both (batch statistics, which move at every pass). All take turns; the ratio is the sum
of the baseline's seconds over the sum of the product's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import published_step
from benchmarks.bench import bar, machine, say
from benchmarks.report import busy_percent, finish, parser
from training.device import autocast_dtype, pick_device
from training.methods import dverge
from training.models.build import build_members
from training.models.member import Member
from training.recipe import load_recipe

DEFAULT_BAR, FP32_BAR, CUDA_BAR = 4.0, 2.5, 10.0
SIDES: dict[str, dict[str, Any]] = {
    "published": {"precision": "fp32"},
    "product": {"dverge.batchnorm": "running"},
    "product_fp32": {"dverge.batchnorm": "running", "precision": "fp32"},
    "letter": {},
    "letter_fp32": {"precision": "fp32"},
}
OURS = tuple(SIDES)[1:]


class Side:
    """Members and optimisers of one side, and the seconds of a step."""

    def __init__(self, name: str, device: torch.device) -> None:
        config = load_recipe("cifar10", SIDES[name])
        self.ours, self.settings, self.device = name != "published", config.dverge, device
        self.members: list[Member] = build_members(config, 10, config.data.mean, config.data.std)
        for member in self.members:
            member.to(device)
            if self.ours:
                member.to(memory_format=torch.channels_last)
                member.compute = autocast_dtype(config.precision, device)
        self.optimizers = [
            torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
            for m in self.members
        ]

    def seconds(self, source: Tensor, labels: Tensor, target: Tensor, layer: int) -> float:
        """Return what one step at `layer` takes."""
        kind = torch.channels_last if self.ours else torch.contiguous_format
        source, target = (x.contiguous(memory_format=kind) for x in (source, target))
        step: Callable[..., Any] = dverge.step if self.ours else published_step.step
        self._wait()
        begun = time.perf_counter()
        step(
            self.members,
            self.optimizers,
            source,
            labels,
            target,
            layer=layer,
            settings=self.settings,
        )
        self._wait()
        return time.perf_counter() - begun

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def measure(
    layers: list[int], rounds: int, device: torch.device, batch: int = 128
) -> list[dict[str, Any]]:
    """Return a row for each layer: seconds of each side, summed over the rounds."""
    torch.manual_seed(0)
    source, target = (torch.rand(batch, 3, 32, 32, device=device) for _ in range(2))
    labels = torch.randint(0, 10, (batch,), device=device)
    sides = {name: Side(name, device) for name in SIDES}
    for name in SIDES:
        sides[name].seconds(source[:16], labels[:16], target[:16], 1)  # warm up
    rows: list[dict[str, Any]] = []
    for layer in layers:
        row: dict[str, Any] = {"layer": layer, **dict.fromkeys(SIDES, 0.0)}
        for turn in range(rounds):
            for name in list(SIDES)[:: 1 if turn % 2 else -1]:
                row[name] += sides[name].seconds(source, labels, target, layer)
        row |= {f"x_{name}": row["published"] / row[name] for name in OURS}
        rows.append(row)
        say(f"layer {layer}: " + ", ".join(f"{name} {row[f'x_{name}']:.2f}x" for name in OURS))
    return rows


def main() -> None:
    """Run the benchmark from the command line."""
    arguments = parser(__doc__, "layers 1, 10 and 20")
    arguments.add_argument("--rounds", type=int, default=1, help="steps at each layer")
    arguments.add_argument("--layers", default=",".join(map(str, range(1, 21))))
    arguments.add_argument("--batch", type=int, default=128)
    arguments.add_argument("--device", default="auto")
    options = arguments.parse_args()
    if options.quick:
        options.layers = "1,10,20"
    here = machine() | {"torch": torch.__version__, "threads": torch.get_num_threads()}
    here |= {"busy_percent": busy_percent()}
    device = pick_device(options.device)
    layers = [int(layer) for layer in options.layers.split(",")]
    rows = measure(layers, options.rounds, device, options.batch)
    total = {name: sum(row[name] for row in rows) for name in SIDES}
    times = {name: total["published"] / total[name] for name in OURS}
    rows.append({"layer": "all", **total, **{f"x_{name}": times[name] for name in OURS}})
    default, fp32 = times["product"], times["product_fp32"]
    bars, skipped = [], []
    lowered = autocast_dtype("auto", device) is not None
    if device.type == "cuda":
        bars.append(bar("a step on CUDA, all layers", default, "times", CUDA_BAR))
    elif lowered:
        bars.append(bar("a step in bf16, all layers", default, "times", DEFAULT_BAR))
    else:
        skipped.append({"name": "a step in bf16", "why": "this hardware has no bf16"})
    if device.type == "cpu":
        bars.append(bar("a step in fp32, all layers", fp32, "times", FP32_BAR))
    columns = ["layer", *SIDES, *(f"x_{name}" for name in OURS)]
    report = {"machine": here, "rows": rows, "bars": bars, "skipped": skipped}
    finish("train_step", report, columns, options)


if __name__ == "__main__":
    main()
