"""Distributed training: `torchrun --nproc-per-node K -m dverge_serve train`."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist

from dverge_serve.errors import Exit, UserError
from dverge_serve.progress import Progress
from training.config import Config
from training.parallel.topology import SINGLE_PROCESS, ProcessTopology

# Over Gloo a process that ends is noticed at once, by its closed connections. Waiting alone is no
# sign of trouble: the first process may be downloading a data set. NCCL notices nothing, but what
# goes over it is a step's: images, gradients, weights. No process is ever minutes behind there.
PATIENCE = {"gloo": timedelta(days=1), "nccl": timedelta(minutes=10)}


@contextlib.contextmanager
def join(config: Config, device: torch.device) -> Iterator[tuple[ProcessTopology, torch.device]]:
    """Join the processes that torchrun started with this one; without it, be alone.

    Args:
        config: of the run.
        device: where to train; of several GPUs, each process gets its own.

    Returns:
        this process's place, and its device.

    Raises:
        UserError: a number of processes that the members cannot be spread over; another process
            ended.
        PeerError: in all processes but the first, where the first raises an error of its own.
    """
    launched = "TORCHELASTIC_RUN_ID" in os.environ
    world = int(os.environ["WORLD_SIZE"]) if launched else 1
    if world == 1:
        yield SINGLE_PROCESS, device
        return
    rank, local = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    blocks = min(world, config.members)
    place = ProcessTopology(rank, blocks, world // blocks)
    _refuse_misfits(place, world, config)
    Progress.shown = Progress.shown and place.first
    if device.type == "cuda":
        device = torch.device("cuda", local % torch.cuda.device_count())
        torch.cuda.set_device(device)
    dist.init_process_group("gloo", timeout=PATIENCE["gloo"])
    backend = _backend(device)
    try:
        yield _grid(place, backend), device
    except BaseException as error:
        told = error
        if _lost(error):
            told = UserError(
                "another process of this training ended",
                next_step="what was saved stands; train again with `resume` to go on",
            )
        if backend == "nccl":
            atexit.register(_end_without_goodbye, _exit_code(told))
        else:
            dist.destroy_process_group()
        if told is error:
            raise
        raise told from error
    dist.destroy_process_group()


def _backend(device: torch.device) -> str:
    """Return what moves tensors: NCCL if every process has a GPU of its own, else Gloo."""
    own = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""
    every = [""] * dist.get_world_size()
    dist.all_gather_object(every, own)
    return "nccl" if own and len(set(every)) == len(every) else "gloo"


def _end_without_goodbye(code: int) -> None:
    """End this process, which failed, whatever NCCL still waits for.

    Leaving a group waits for the others, which may wait for this process in a collective; torchrun
    would never see that it failed, nor end them.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _exit_code(error: BaseException) -> int:
    if isinstance(error, UserError):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return Exit.INTERRUPTED
    return Exit.USER if isinstance(error, torch.OutOfMemoryError) else Exit.BUG


def _refuse_misfits(place: ProcessTopology, world: int, config: Config) -> None:
    if place.size != world:
        place.fail(
            UserError(
                f"{world} processes for {config.members} members",
                f"1 to {config.members} processes, or a multiple of {config.members}",
                "change torchrun's --nproc-per-node",
            )
        )
    if config.batch_size < place.shares:
        place.fail(
            UserError(
                f"batch_size = {config.batch_size} for {place.shares} processes a member",
                "an image or more for each",
            )
        )


def _grid(place: ProcessTopology, backend: str) -> ProcessTopology:
    """Return the place with its groups; every process makes all of them, in the same order."""
    columns = [
        _group([block * place.shares + share for block in range(place.blocks)], backend)
        for share in range(place.shares)
    ]
    rows = [
        _group([block * place.shares + share for share in range(place.shares)], backend)
        for block in range(place.blocks)
    ]
    return replace(
        place,
        column=columns[place.share] if place.blocks > 1 else None,
        row=rows[place.rank // place.shares] if place.shares > 1 else None,
    )


def _group(ranks: list[int], backend: str) -> dist.ProcessGroup | None:
    """Return the group of these ranks; None where this process is not among them."""
    group = dist.new_group(ranks, PATIENCE[backend], backend)
    return group if isinstance(group, dist.ProcessGroup) else None


def _lost(error: BaseException) -> bool:
    """Whether a collective failed, which it does when another process is gone."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error)
    )
