"""What several processes do in a test, started by torchrun with OUT MEMBERS VARIANT...

Trains each variant into `OUT/<rank>/<variant>`. Only the first process may write, so no other
folder than `OUT/0` may come to be; how a run ended is noted in `OUT/ended.<rank>.<variant>`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import training.trainer
from dverge_serve.errors import UserError
from tests.training.networks import tiny_config
from training.config import Config
from training.parallel.distributed import join
from training.parallel.topology import SINGLE_PROCESS, ProcessTopology
from training.runs.directory import Run

SHORT: dict[str, Any] = {
    "dverge__steps": 2,
    "adversarial__steps": 2,
    **{f"{stage}__epochs": 1 for stage in ("standard", "dverge", "adversarial", "adp", "gal")},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "standard": {"method": "standard"},
    "dverge": {"method": "dverge"},
    "batch": {"method": "dverge", "dverge__batchnorm": "batch"},
    "dverge+adversarial": {"method": "dverge+adversarial"},
    "adversarial": {"method": "adversarial"},
    "adp": {"method": "adp"},
    "gal": {"method": "gal"},
    "resumed": {"method": "dverge", "dverge__epochs": 3},  # begun by one process
    "broken": {"method": "standard", "standard__lr": 1e30},
}


def variant(name: str, members: int) -> Config:
    """Return the settings of a variant; the members are not all equally deep."""
    architecture = ["resnet8"] * (members - 1) + ["resnet14"]
    return tiny_config(members=members, architecture=architecture, **(SHORT | VARIANTS[name]))


def train_variant(
    name: str, members: int, out: Path, topology: ProcessTopology = SINGLE_PROCESS
) -> Run:
    """Train with members in float64: a sum in another order then turns no sign of a gradient."""
    plain = training.trainer.prepare

    def in_float64(*args: Any, **more: Any) -> Any:
        made, optimizers = plain(*args, **more)
        return [member.double() for member in made], optimizers

    with mock.patch.object(training.trainer, "prepare", in_float64):
        config = variant(name, members)
        device = torch.device("cpu")
        return training.trainer.train(config, out, device=device, resume=True, topology=topology)


def main(out: Path, members: int, names: list[str]) -> None:
    torch.set_num_threads(1)
    with join(variant("dverge", members), torch.device("cpu")) as (topology, _):
        for name in names:
            ended = "finished"
            try:
                train_variant(name, members, out / str(topology.rank) / name, topology)
            except UserError as error:
                ended = f"{type(error).__name__}: {error}"
            (out / f"ended.{topology.rank}.{name}").write_text(ended)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
