"""CUDA graphs: a step, or each half of one, recorded once and replayed as one launch.

Small networks finish their operations faster than a host can launch them, so a GPU mostly waits.
A recorded step costs one launch, and its members run beside one another, each on a stream of its
own. What may change from step to step is read from the device: the images, their labels and the
learning rate. What may not, the drawn layer, gets a recording for each value.
"""

from __future__ import annotations

import contextlib
import gc
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.optim import SGD

from dverge_serve.errors import UserError
from training.config import Config
from training.optimizers import RateOnDevice

WARM_UPS = 3  # steps of each kind before it is recorded, on the stream it is recorded from

Item = TypeVar("Item")
Result = TypeVar("Result")
# Layer, inputs whose first axis is the batch -> results; no draw and no wait inside.
Work = Callable[[int, Sequence[Tensor]], list[Tensor]]


def wanted(config: Config, device: torch.device) -> bool:
    """Whether steps are recorded: on a GPU, unless the setting says no."""
    return device.type == "cuda" and config.graphs == "auto"


class CudaRecorder:
    """Records work as CUDA graphs, which share their memory: one replay ends before the next.

    Args:
        device: the GPU.
        lanes: how many members run beside one another.
    """

    def __init__(self, device: torch.device, lanes: int) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        streams = range(lanes)
        self._lanes = [torch.cuda.Stream(device) for _ in streams]  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def warm(self, work: Callable[[], list[Tensor]]) -> list[Tensor]:
        """Do the work on the recording's streams, where libraries prepare what they need."""
        here = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream), _open(self._lanes):
            found = work()
        here.wait_stream(self._stream)
        return found

    def record(self, work: Callable[[], list[Tensor]]) -> Callable[[], list[Tensor]]:
        """Return the replay of the work, whose results are new tensors; nothing is done yet.

        Raises:
            RuntimeError: the work cannot be recorded.
        """
        gc.collect()  # gradients' graphs left over from other streams would spoil the recording
        graph, here = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._stream.device)
        recording = torch.cuda.graph(
            graph,
            pool=self._pool,
            stream=self._stream,
            capture_error_mode="thread_local",  # NCCL's own thread asks for its events meanwhile
        )
        try:
            with recording, _open(self._lanes):
                found = work()
        except BaseException:
            torch.cuda.set_stream(here)  # a recording that cannot be ended stays on its own
            raise

        def replay() -> list[Tensor]:
            graph.replay()
            return [each.clone() for each in found]

        return replay


class Recorded:
    """Work of a step that is done a few times as it is, then recorded, then replayed; by layer.

    A batch of another size than the recipe's is done as it is.

    Args:
        work: the step, or a part of one.
        optimizers: that it uses.
        batch_size: of the batches that are recorded.
        recorder: of the device that they are on.
    """

    def __init__(
        self,
        work: Work,
        optimizers: Sequence[RateOnDevice],
        batch_size: int,
        recorder: CudaRecorder,
    ) -> None:
        self._work, self._optimizers, self._batch_size = work, optimizers, batch_size
        self._recorder = recorder
        self._inputs: list[Tensor] | None = None
        self._seen: Counter[int] = Counter()
        self._replays: dict[int, Callable[[], list[Tensor]]] = {}

    def __call__(self, layer: int, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Do the work and return its results.

        Raises:
            UserError: it cannot be recorded, or the GPU's memory is too small for it.
        """
        for optimizer in self._optimizers:
            optimizer.send_rate()
        if len(inputs[0]) != self._batch_size:
            return self._work(layer, inputs)
        inputs = self._filled(inputs)
        if layer not in self._replays:
            self._seen[layer] += 1
            warming = self._seen[layer] <= WARM_UPS
            try:
                if warming:
                    return self._recorder.warm(lambda: self._work(layer, inputs))
                self._replays[layer] = self._recorder.record(lambda: self._work(layer, inputs))
            except RuntimeError as error:
                # Half a step is made, and after a failed recording the GPU's memory and streams
                # are in no known state: going on would be a guess.
                if warming and not isinstance(error, torch.OutOfMemoryError):
                    raise
                reason = str(error).strip().partition("\n")[0] or type(error).__name__
                raise UserError(
                    f"a step cannot be recorded as a CUDA graph: {reason}",
                    next_step="what was saved stands; go on with `resume` and `overrides` "
                    "graphs=off, which also takes less memory",
                ) from error
        return self._replays[layer]()

    def _filled(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Return the tensors that recordings read, with these inputs in them."""
        if self._inputs is None:
            self._inputs = [torch.empty_like(each) for each in inputs]
        for into, value in zip(self._inputs, inputs, strict=True):
            into.copy_(value)
        return self._inputs


def recorded(
    works: Sequence[Work], config: Config, optimizers: Sequence[SGD], device: torch.device
) -> list[Work]:
    """Return the parts of a step as they are, or where recordings are wanted and can be, recorded.

    Args:
        works: what is exchanged between processes is exchanged between them.
        config: of the run.
        optimizers: of this process's members.
        device: where the members are.
    """
    paced = [each for each in optimizers if isinstance(each, RateOnDevice)]
    if not wanted(config, device) or len(paced) < len(optimizers):
        return list(works)
    recorder = CudaRecorder(device, len(optimizers))
    return [Recorded(work, paced, config.batch_size, recorder) for work in works]


_lanes: list[torch.cuda.Stream] = []  # open while a step is warmed up or recorded


@contextlib.contextmanager
def _open(lanes: Sequence[torch.cuda.Stream]) -> Iterator[None]:
    _lanes[:] = lanes
    try:
        yield
    finally:
        _lanes.clear()


def over_lanes(work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """Return `[work(item) for item in items]`, each on its own stream while lanes are open.

    Tensors that one item leaves for another must live until the step ends: their memory belongs to
    the stream they were made on.
    """
    if not _lanes:
        return [work(item) for item in items]
    here, used, found = torch.cuda.current_stream(), _lanes[: len(items)], []
    for number, item in enumerate(items):
        lane = used[number % len(used)]
        lane.wait_stream(here)
        with torch.cuda.stream(lane):
            found.append(work(item))
    for lane in used:
        here.wait_stream(lane)
    return found
