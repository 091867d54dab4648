"""Recorded steps: what is recorded when, what a replay reads, and that it is the same step."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.optim import SGD

from dverge_serve.errors import UserError
from tests.training.networks import tiny_config, tiny_images, tiny_members
from tests.training.tape import Tape
from training import optimizers as optimizing
from training.data.splits import load_training
from training.methods import dverge, dverge_run, epoch_batches, stages
from training.methods.dverge_draws import all_others
from training.models.member import Member
from training.optimizers import RateOnDevice, build_optimizers
from training.parallel import cuda_graphs
from training.parallel.cuda_graphs import WARM_UPS, CudaRecorder, Recorded
from training.parallel.topology import Batch, ProcessTopology
from training.schedules import Dverge
from training.trainer import prepare

CPU = torch.device("cpu")
SETTINGS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2}


def ours(members: Sequence[Member]) -> list[RateOnDevice]:
    return [RateOnDevice(member.parameters(), **SETTINGS) for member in members]


def batch(count: int, seed: int) -> Batch:
    images = tiny_images(count, seed=seed), tiny_images(count, seed=seed + 100)
    return images[0], torch.arange(count) % 4, images[1]


def dverge_work(members: Sequence[Member], optimizers: Sequence[SGD]) -> cuda_graphs.Work:
    def work(layer: int, batch: Sequence[Tensor]) -> list[Tensor]:
        source, labels, target = batch
        settings = Dverge(steps=2)
        losses = dverge.step(
            members, optimizers, source, labels, target, layer=layer, settings=settings
        )
        return [losses]

    return work


def same(one: Sequence[Member], other: Sequence[Member], tolerance: float) -> None:
    for left, right in zip(one, other, strict=True):
        for name, tensor in left.state_dict().items():
            torch.testing.assert_close(
                tensor, right.state_dict()[name], rtol=tolerance, atol=tolerance
            )


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_rate_on_the_device_makes_the_step_of_sgd(momentum: float) -> None:
    one, other = (list(tiny_members(1)[0].parameters()) for _ in range(2))
    plain = SGD(one, lr=1.0, momentum=momentum, weight_decay=0.01)
    paced = RateOnDevice(other, lr=1.0, momentum=momentum, weight_decay=0.01)
    for number, rate in enumerate((0.3, 0.2, 0.05)):
        for parameters, optimizer in ((one, plain), (other, paced)):
            optimizer.param_groups[0]["lr"] = rate
            for parameter in parameters[1:]:  # the first has no gradient
                draw = torch.Generator().manual_seed(number)
                parameter.grad = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
        plain.step()
        paced.step()
        for left, right in zip(one, other, strict=True):
            torch.testing.assert_close(left, right, rtol=0, atol=1e-7)  # a rate is float32


def test_while_a_step_is_recorded_no_rate_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is recorded reads the rate; a value written in its course would be read for ever."""
    parameter = torch.nn.Parameter(torch.ones(1))
    parameter.grad = torch.ones(1)
    optimizer = RateOnDevice([parameter], lr=0.5, momentum=0.0, weight_decay=0.0)
    optimizer.param_groups[0]["lr"] = 0.25
    monkeypatch.setattr(optimizing, "_recording", lambda: True)
    optimizer.step()
    assert parameter.item() == 0.5
    optimizer.send_rate()
    optimizer.step()
    assert parameter.item() == 0.25


def test_each_layer_is_warmed_up_recorded_and_replayed() -> None:
    tape, members = Tape(), tiny_members(2)
    optimizers = ours(members)
    step = Recorded(dverge_work(members, optimizers), optimizers, 4, tape)
    for seed in range(WARM_UPS + 2):
        step(1, batch(4, seed))
    assert tape.asked == ["warm"] * WARM_UPS + ["record", "replay", "replay"]
    step(2, batch(4, 0))
    step(1, batch(4, 0))
    assert tape.asked[-2:] == ["warm", "replay"]


def test_a_smaller_batch_is_done_as_it_is() -> None:
    tape, members = Tape(), tiny_members(2)
    optimizers = ours(members)
    step = Recorded(dverge_work(members, optimizers), optimizers, 4, tape)
    assert step(1, batch(3, 0))[0].shape == (2,)
    assert tape.asked == []


def test_recorded_steps_see_every_batch_and_every_rate() -> None:
    """Over warm-ups, replays and the odd batch: the members SGD would have made."""
    plain, taped = tiny_members(2), tiny_members(2)
    sgd = [SGD(member.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2) for member in plain]
    paced = ours(taped)
    eager = dverge_work(plain, sgd)
    step = Recorded(dverge_work(taped, paced), paced, 4, Tape())
    for number in range(WARM_UPS + 3):
        for optimizer in (*sgd, *paced):
            optimizer.param_groups[0]["lr"] = 0.1 / (1 + number)
        images = batch(3 if number == WARM_UPS else 4, number)
        torch.testing.assert_close(step(3, images), eager(3, images))
    same(plain, taped, 1e-6)


def test_a_replay_finds_the_present_rate() -> None:
    (optimizer,) = optimizers = ours(tiny_members(1))
    step = Recorded(lambda layer, batch: [torch.zeros(1)], optimizers, 4, Tape())
    for number in range(WARM_UPS + 3):
        optimizer.param_groups[0]["lr"] = 1 / (2 + number)
        step(1, batch(4, 0))
        assert [rate.item() for rate in optimizer._rates] == pytest.approx([1 / (2 + number)])


@pytest.mark.parametrize(
    ("fails", "error"),
    [
        ("record", RuntimeError("operation not permitted when stream is capturing\nand more")),
        ("record", torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")),
        ("warm", torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")),
    ],
)
def test_a_step_that_cannot_be_recorded_ends_the_training(fails: str, error: Exception) -> None:
    tape = Tape(fails=fails, error=error)
    step = Recorded(lambda layer, batch: [torch.zeros(1)], ours(tiny_members(1)), 4, tape)
    for number in range(WARM_UPS if fails == "record" else 0):
        step(1, batch(4, number))
    with pytest.raises(UserError, match="graphs=off") as caught:
        step(1, batch(4, 9))
    assert str(error).partition("\n")[0] in str(caught.value)
    assert "and more" not in str(caught.value)
    assert tape.asked[-1] == fails


def test_any_other_error_of_a_warm_up_is_its_own() -> None:
    optimizers = ours(tiny_members(1))
    tape = Tape(fails="warm", error=RuntimeError("shapes differ"))
    step = Recorded(lambda layer, batch: [torch.zeros(1)], optimizers, 4, tape)
    with pytest.raises(RuntimeError, match="shapes differ"):
        step(1, batch(4, 0))


def test_a_recording_that_fails_gives_the_stream_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """As PyTorch's: where it cannot be ended, its stream stays the current one."""
    current, given = ["default"], {}

    @contextlib.contextmanager
    def graph(graph: object, **settings: object) -> Iterator[None]:
        given.update(settings)
        current[0] = "recording"
        yield
        current[0] = "default"

    def work() -> list[Tensor]:
        raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr("torch.cuda.Stream", lambda device: SimpleNamespace(device=device))
    monkeypatch.setattr("torch.cuda.graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr("torch.cuda.CUDAGraph", lambda: None)
    monkeypatch.setattr("torch.cuda.current_stream", lambda device: current[0])
    monkeypatch.setattr("torch.cuda.set_stream", lambda stream: current.__setitem__(0, stream))
    monkeypatch.setattr("torch.cuda.graph", graph)
    with pytest.raises(RuntimeError, match="during capture"):
        CudaRecorder(torch.device("cuda"), 1).record(work)
    assert current == ["default"]
    assert given["capture_error_mode"] == "thread_local"


def test_a_recording_that_fails_half_way_leaves_batchnorm_its_momentum(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (member,) = tiny_members(1)

    def fail(*given: object) -> Tensor:
        raise RuntimeError("not now")

    monkeypatch.setattr(member, "features", fail)
    images = tiny_images(4)
    with pytest.raises(RuntimeError, match="not now"):
        dverge.distill(member, images, images, layer=4, settings=Dverge(batchnorm="batch"))
    norms = [each for each in member.modules() if isinstance(each, torch.nn.BatchNorm2d)]
    assert {norm.momentum for norm in norms} == {0.1}


def test_nothing_is_recorded_without_a_gpu_nor_where_the_setting_says_no() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert not cuda_graphs.wanted(tiny_config(), cpu)
    assert cuda_graphs.wanted(tiny_config(), cuda)
    assert not cuda_graphs.wanted(tiny_config(graphs="off"), cuda)
    members, optimizers = prepare(tiny_config(), load_training(tiny_config().data), cpu)
    assert [type(each) for each in optimizers] == [SGD] * 2
    work = dverge_work(members, optimizers)
    assert cuda_graphs.recorded([work], tiny_config(), optimizers, cpu) == [work]
    # Processes that share batches train with SGD as it is, on GPUs too.
    assert cuda_graphs.recorded([work], tiny_config(), optimizers, cuda) == [work]


@pytest.mark.parametrize(("blocks", "shares", "kind"), [(2, 1, RateOnDevice), (2, 2, SGD)])
def test_processes_that_share_no_batch_can_record(
    blocks: int, shares: int, kind: type[SGD], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_graphs, "wanted", lambda *_: True)
    config, topology = tiny_config(), ProcessTopology(0, blocks, shares)
    _, optimizers = prepare(config, load_training(config.data), CPU, topology=topology)
    assert {type(each) for each in optimizers} == {kind}


class Watched(ProcessTopology):
    """A place of a process that has all members, and says when images are exchanged."""

    def exchange(self, own: Sequence[Tensor], members: int) -> list[Tensor]:
        tape.asked.append("exchange")
        return super().exchange(own, members)


tape = Tape()


@pytest.mark.parametrize("batchnorm", ["running", "batch"])
def test_images_are_exchanged_between_the_two_recordings_of_a_step(
    batchnorm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What updates is recorded once, not for each layer; the members are those of eager steps."""
    monkeypatch.setattr(cuda_graphs, "wanted", lambda config, device: config.graphs == "auto")
    monkeypatch.setattr(cuda_graphs, "CudaRecorder", lambda *_: tape)
    layers, trained = [1] * (WARM_UPS + 2) + [3], []
    monkeypatch.setattr(dverge_run, "layer_of", lambda *given: layers[given[-1]])
    for graphs in ("auto", "off"):
        tape.asked.clear()
        config = tiny_config(
            graphs=graphs, dverge__steps=2, dverge__batchnorm=batchnorm, batch_size=4
        )
        members = tiny_members(2)
        optimizers = build_optimizers(members, config.dverge, on_device=True)
        make = dverge_run.make_step(config, members, optimizers, Watched())
        losses = [make(0, number, batch(4, number)) for number in range(len(layers))]
        trained.append((members, torch.stack(losses)))
        if graphs == "auto":
            assert tape.asked == [
                *["warm", "exchange", "warm"] * WARM_UPS,
                *["record", "replay", "exchange", "record", "replay"],
                *["replay", "exchange", "replay"],
                *["warm", "exchange", "replay"],
            ]
    (taped, first), (plain, second) = trained
    assert torch.equal(first, second)
    same(taped, plain, 0)


def test_without_open_lanes_items_are_done_in_turn() -> None:
    assert cuda_graphs.over_lanes(lambda item: item * 2, [1, 2, 3]) == [2, 4, 6]


# What follows needs a GPU; `python -m benchmarks.gpu smoke` runs it there.
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")


def on_gpu(members: Sequence[Member]) -> list[Member]:
    return [member.cuda().to(memory_format=torch.channels_last) for member in members]


@needs_gpu
@pytest.mark.parametrize("batchnorm", ["running", "batch"])
@pytest.mark.parametrize("layer", [1, 4, 8])
def test_a_graph_makes_the_step_that_was_recorded(batchnorm: str, layer: int) -> None:
    """In float64, from the same state and batches: parameters and buffers within 1e-8."""
    plain, recorded = on_gpu(tiny_members(3)), on_gpu(tiny_members(3))
    settings = Dverge(steps=3, batchnorm="batch" if batchnorm == "batch" else "running")
    results = []
    for members, record in ((plain, False), (recorded, True)):
        optimizers = ours(members)

        recorder = CudaRecorder(torch.device("cuda"), 3) if record else Tape()
        distil, update = (
            Recorded(half, optimizers, 4, recorder)
            for half in dverge.halves(members, optimizers, settings=settings)
        )
        losses = []
        for number in range(WARM_UPS + 3):
            for optimizer in optimizers:
                optimizer.param_groups[0]["lr"] = 0.1 / (1 + number)
            source, labels, target = (each.cuda() for each in batch(4, number))
            made = distil(layer, (source, target))
            learned = (made[other] for others in all_others(3) for other in others)
            (found,) = update(0, (source, labels, *learned))
            losses.append(found)
        results.append(torch.stack(losses))
    torch.testing.assert_close(*results, rtol=1e-8, atol=1e-8)
    same(plain, recorded, 1e-8)


@needs_gpu
@pytest.mark.parametrize("method", ["adversarial", "dverge+adversarial", "adp", "gal"])
def test_methods_that_are_not_recorded_follow_the_rate(method: str) -> None:
    config = tiny_config(method=method, precision="fp32", adp__epochs=2, gal__epochs=2)
    device, data = torch.device("cuda"), load_training(config.data)
    members, optimizers = prepare(config, data, device)
    stage = stages(config, members, optimizers)[-1]
    images = next(epoch_batches(data.train.to(device), config, stage, 0))
    for optimizer in optimizers:
        optimizer.param_groups[0]["lr"] = 0.0
    before = [member.state_dict()["stages.0.conv.weight"].clone() for member in members]
    stage.step(0, 0, images)
    for member, weight in zip(members, before, strict=True):
        assert torch.equal(member.state_dict()["stages.0.conv.weight"], weight)


@needs_gpu
@pytest.mark.parametrize("precision", ["fp32", "auto"])
def test_a_recorded_epoch_is_an_eager_one(precision: str) -> None:
    """Through the product's own stages, batches and optimisers, the last batch a partial one."""
    device, results = torch.device("cuda"), []
    for setting in ("off", "auto"):
        config = tiny_config(graphs=setting, precision=precision, batch_size=12, width=8)
        data = load_training(config.data)
        members, optimizers = prepare(config, data, device)
        plan = stages(config, members, optimizers)
        split, losses = data.train.to(device), []
        for stage in plan:
            for optimizer in optimizers:
                optimizer.state.clear()
            for epoch in range(2):
                for number, images in enumerate(epoch_batches(split, config, stage, 0)):
                    losses.append(stage.step(epoch, number, images))
        results.append(torch.stack(losses))
    # Sums in another order at first; steps on signs of gradients tell such differences apart.
    head = len(results[0]) // 4
    torch.testing.assert_close(results[1][:head], results[0][:head], rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(results[1].mean(0), results[0].mean(0), rtol=0.1, atol=0.1)


@needs_gpu
def test_no_step_waits_for_the_gpu() -> None:
    """A transfer to the host inside a step raises here."""
    config = tiny_config(precision="fp32")
    device = torch.device("cuda")
    data = load_training(config.data)
    members, optimizers = prepare(config, data, device)
    for stage in stages(config, members, optimizers):
        images = next(epoch_batches(data.train.to(device), config, stage, 0))
        for number in range(WARM_UPS + 1):
            stage.step(0, number, images)
        try:
            with warnings.catch_warnings():  # it warns that it is a prototype
                warnings.simplefilter("ignore")
                torch.cuda.set_sync_debug_mode("error")
            stage.step(0, 0, images)
        finally:
            torch.cuda.set_sync_debug_mode("default")
