"""Several processes on one run: `torchrun --nproc-per-node K -m dverge_serve train`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist

from dverge_serve.errors import UserError
from dverge_serve.progress import Progress
from training.config import Config
from training.parallel.topology import ALONE, Team

# A process that ends is noticed at once, by torchrun and by its closed connections. Waiting alone
# is no sign of trouble: the first process may be downloading a data set.
PATIENCE = timedelta(days=1)


@contextlib.contextmanager
def join(config: Config, device: torch.device) -> Iterator[tuple[Team, torch.device]]:
    """Join the processes that torchrun started with this one; without it, be alone.

    Args:
        config: of the run.
        device: where to train; of several GPUs, each process gets its own.

    Returns:
        this process's place, and its device.

    Raises:
        UserError: a number of processes that the members cannot be spread over; another process
            ended.
    """
    launched = "TORCHELASTIC_RUN_ID" in os.environ
    world = int(os.environ["WORLD_SIZE"]) if launched else 1
    if world == 1:
        yield ALONE, device
        return
    rank, local = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    blocks = min(world, config.members)
    place = Team(rank, blocks, world // blocks)
    _refuse_misfits(place, world, config)
    Progress.shown = Progress.shown and place.first
    backend = "gloo"
    if device.type == "cuda":
        device = torch.device("cuda", local % torch.cuda.device_count())
        torch.cuda.set_device(device)
        # NCCL wants a GPU for each process; gloo lets several share one.
        if int(os.environ["LOCAL_WORLD_SIZE"]) <= torch.cuda.device_count():
            backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=PATIENCE)
    try:
        yield _grid(place), device
    except RuntimeError as error:
        if not _lost(error):
            raise
        raise UserError(
            "another process of this training ended",
            next_step="what was saved stands; the same command with --resume goes on",
        ) from error
    finally:
        dist.destroy_process_group()


def _refuse_misfits(place: Team, world: int, config: Config) -> None:
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


def _grid(place: Team) -> Team:
    """Return the place with its groups; every process makes all of them, in the same order."""
    columns = [
        _group([block * place.shares + share for block in range(place.blocks)])
        for share in range(place.shares)
    ]
    rows = [
        _group([block * place.shares + share for share in range(place.shares)])
        for block in range(place.blocks)
    ]
    return replace(
        place,
        column=columns[place.share] if place.blocks > 1 else None,
        row=rows[place.rank // place.shares] if place.shares > 1 else None,
    )


def _group(ranks: list[int]) -> dist.ProcessGroup | None:
    """Return the group of these ranks; None where this process is not among them."""
    group = dist.new_group(ranks, timeout=PATIENCE)
    return group if isinstance(group, dist.ProcessGroup) else None


def _lost(error: RuntimeError) -> bool:
    """Whether a collective failed, which it does when another process is gone."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)
