"""The processes that train one run together, and this one's place among them.

Members are independent between exchanges of images, so they are spread over the processes: each
distils for its own members, all get the images of all, each trains its own members on the full
batch. More processes than members share the batches besides. One process is a grid of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from dverge_serve.errors import PeerError, UserError
from training.models.member import Member
from training.parallel.sync_batchnorm import share_statistics

Batch = tuple[Tensor, Tensor, Tensor]  # source images, their labels, independent target images
T = TypeVar("T")


@dataclass(frozen=True)
class ProcessTopology:
    """The grid of processes that train one run, and this one's place in it; by default it is alone.

    The processes stand in a grid: a row for each block of members, a column for each share of the
    batch. All hold all members, each trains those of its row.

    Args:
        rank: 0 for the first process, which alone writes and shows progress.
        blocks: how many blocks the members are spread over.
        shares: how many shares each batch is cut into.
        column: the processes of this one's share, with which it exchanges images.
        row: the processes of this one's members, with which it averages gradients.
    """

    rank: int = 0
    blocks: int = 1
    shares: int = 1
    column: dist.ProcessGroup | None = None
    row: dist.ProcessGroup | None = None

    @property
    def first(self) -> bool:
        """Whether this process writes and shows progress."""
        return self.rank == 0

    @property
    def size(self) -> int:
        """How many processes there are."""
        return self.blocks * self.shares

    @property
    def share(self) -> int:
        """Which share of each batch is this process's."""
        return self.rank % self.shares

    @property
    def seed_path(self) -> tuple[int, ...]:
        """What this process adds to seed paths: each share of a batch has its own draws."""
        return (self.share,) if self.share else ()

    def local_members(self, members: int) -> range:
        """Return the indices of the members, of `members` in all, that this process trains."""
        return self._block(self.rank // self.shares, members)

    def shard(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield this process's share of each batch.

        All shares are equally large: images that would make one larger are left out, at most
        `shares - 1` of a batch, and a batch too small for all is passed over.
        """
        for source, labels, target in batches:
            size = len(labels) // self.shares
            own = slice(self.share * size, (self.share + 1) * size)
            if size:
                yield source[own], labels[own], target[own]

    def exchange(self, own: Sequence[Tensor], members: int) -> list[Tensor]:
        """Return every member's tensor; own ones keep their graph, others' are constants.

        Args:
            own: one for each member of this process, all of one shape.
            members: how many there are in all.
        """
        if self.column is None:
            return list(own)
        mine = dict(zip(self.local_members(members), own, strict=True))
        found, under_way = [], []
        for index in range(members):
            if index in mine:
                tensor = mine[index].detach().contiguous()
            else:
                tensor = torch.empty_like(own[0], memory_format=torch.contiguous_format).detach()
            owner = self._owner(index, members)
            under_way.append(dist.broadcast(tensor, owner, self.column, async_op=True))
            found.append(mine.get(index, tensor))
        for one in under_way:
            assert one is not None  # this process is in the group
            one.wait()
        return found

    def mean(self, tensor: Tensor) -> Tensor:
        """Return the mean over the shares of a batch, elementwise."""
        if self.row is None:
            return tensor
        total = tensor.detach().clone()
        dist.all_reduce(total, group=self.row)
        return total / self.shares

    def losses(self, own: Tensor, members: int) -> Tensor:
        """Return every member's loss on the whole batch, given those of this process's members."""
        return torch.stack(self.exchange(list(self.mean(own)), members))

    def average_gradients(self, optimizer: Optimizer) -> None:
        """Give an optimiser's parameters the gradient of the whole batch."""
        if self.row is None:
            return
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = [p.grad for p in parameters if p.grad is not None]
        if gradients:
            flat = self.mean(torch.cat([gradient.flatten() for gradient in gradients]))
            _copy_back(flat, gradients)

    def sync_members(self, members: Sequence[Member], optimizers: Sequence[Optimizer]) -> None:
        """Bring every process's copies of the members, and of their momentum, up to date."""
        if self.column is None:
            return
        for index, (member, optimizer) in enumerate(zip(members, optimizers, strict=True)):
            tensors = [*member.state_dict().values(), *_momentum(optimizer)]
            # float64 holds float32 weights and BatchNorm's counts alike, exactly.
            flat = torch.cat([tensor.detach().flatten().double() for tensor in tensors])
            dist.broadcast(flat, self._owner(index, len(members)), self.column)
            _copy_back(flat, tensors)

    def sync_batchnorm(self, members: Sequence[Member]) -> None:
        """Let BatchNorm normalise by the whole batch where this process sees only a share of it."""
        if self.row is None:
            return
        for member in members:
            share_statistics(member, self.row)

    def broadcast_from_rank0(self, work: Callable[[], T]) -> T:
        """Return what `work` returned on the first process, the only one that runs it.

        Raises:
            PeerError: `work` failed there; the first process raises the error itself.
        """
        if self.size == 1:
            return work()
        box: list[tuple[T] | None] = [None]
        try:
            if self.first:
                box = [(work(),)]
        finally:
            dist.broadcast_object_list(box, 0)
        if box[0] is None:
            raise PeerError
        return box[0][0]

    def rank0_first(self, work: Callable[[], T]) -> T:
        """Return `work()`, done by the first process before the others: a download happens once."""
        done: list[T] = []
        self.broadcast_from_rank0(lambda: done.append(work()))
        return done[0] if done else work()

    def fail(self, error: UserError) -> NoReturn:
        """Raise `error` on the first process and a PeerError on the others, which all call this."""
        raise error if self.first else PeerError

    def _block(self, block: int, members: int) -> range:
        return range(block * members // self.blocks, (block + 1) * members // self.blocks)

    def _owner(self, index: int, members: int) -> int:
        blocks = (block for block in range(self.blocks) if index in self._block(block, members))
        return next(blocks) * self.shares + self.share


SINGLE_PROCESS = ProcessTopology()


def _momentum(optimizer: Optimizer) -> list[Tensor]:
    """Return the momentum of every parameter; of other processes' members, a place for it."""
    return [
        optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))
        for group in optimizer.param_groups
        if group["momentum"]
        for parameter in group["params"]
    ]


def _copy_back(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    with torch.no_grad():
        sizes = [tensor.numel() for tensor in tensors]
        for tensor, part in zip(tensors, torch.split(flat, sizes), strict=True):
            tensor.copy_(part.view(tensor.shape))
