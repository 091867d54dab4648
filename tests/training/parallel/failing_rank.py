"""A training whose second process fails alone while the first waits for it, as if over NCCL.

Gloo stands in for NCCL. As NCCL would, it waits for ever when a process that failed leaves its
groups or ends in the ordinary way.
"""

from __future__ import annotations

import atexit
import signal
import time
from datetime import timedelta
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from dverge_serve.cli import main
from dverge_serve.errors import UserError
from training.parallel.topology import ProcessTopology

make_group = dist.new_group


def group_over_gloo(ranks: list[int], timeout: timedelta, backend: str) -> Any:
    assert (backend, timeout) == ("nccl", timedelta(minutes=10))
    return make_group(ranks, timeout, "gloo")


def wait_for_ever(*_: object) -> None:
    time.sleep(3600)


def train(*_: Any, topology: ProcessTopology, **__: Any) -> None:
    if topology.rank == 1:
        raise UserError("image 3 is broken")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun sends it; what is said must be seen
    dist.all_reduce(torch.ones(1), group=topology.column)


def properties(device: torch.device) -> SimpleNamespace:
    return SimpleNamespace(uuid=f"GPU-{dist.get_rank()}")


if __name__ == "__main__":
    atexit.register(wait_for_ever)
    with (
        mock.patch("torch.cuda.is_available", return_value=True),
        mock.patch("torch.cuda.device_count", return_value=1),  # each process sees its own alone
        mock.patch("torch.cuda.set_device"),
        mock.patch("torch.cuda.get_device_properties", properties),
        mock.patch("torch.distributed.new_group", group_over_gloo),
        mock.patch("torch.distributed.destroy_process_group", wait_for_ever),
        mock.patch("training.trainer.train", train),
    ):
        main()
