"""The training loop: standard members first, then the method's own stage, saved as it goes."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import SGD

from dverge_serve.files import canonical_json, sha256
from dverge_serve.progress import Progress, say
from training.accuracy import accuracy
from training.budget import planned, within_budget
from training.config import Config, check_seed
from training.data.class_counts import balance, class_counts
from training.data.near_duplicates import crossing
from training.data.splits import Split, TrainingData, load_training, normalisation
from training.data.streaming import Streamed
from training.device import autocast_dtype, pick_device
from training.epoch_record import label, measures_diversity, note
from training.loss_meter import Losses
from training.methods import TrainingStage, epoch_batches, stage_names, stages
from training.methods.diversity import diversity
from training.methods.last_layers import fit_last_layers
from training.methods.overlap import step_losses
from training.methods.stored_images import StoredImages, check_sources, keep_images
from training.models.build import build_members
from training.models.dropout import seed_dropout
from training.models.member import Member
from training.models.pretrained import Start, skipped
from training.models.state_dict import load_members, members_tensors
from training.optimizers import build_optimizers, load_momentum, momentum_tensors
from training.parallel import cuda_graphs
from training.parallel.topology import SINGLE_PROCESS, ProcessTopology
from training.runs.directory import Run
from training.runs.latest import follow
from training.runs.tensorboard import Log, logged, require_tensorboard
from training.swa import Average

SAVE_EVERY_S = 10.0
DIVERSITY_IMAGES = 256


@dataclass(frozen=True)
class Training:
    """The state of one run that every stage shares.

    Args:
        train, holdout: on the device where training happens.
        start, stored: weights from files, and adversarial images of source models.
        members, optimizers: all of them, of which this process of the `topology` trains its own.
    """

    config: Config
    run: Run
    topology: ProcessTopology
    members: list[Member]
    optimizers: list[SGD]
    train: Split | Streamed
    holdout: Split
    start: Start | None = None
    stored: StoredImages | None = None


def train(
    config: Config,
    out: str | Path,
    *,
    device: str | torch.device = "auto",
    resume: bool = False,
    data: TrainingData | None = None,
    topology: ProcessTopology = SINGLE_PROCESS,
    wait: bool = False,
    surrogate: bool = False,
) -> Run:
    """Train an ensemble into the run directory `out`, or go on where it stopped; return the run.

    Args:
        config: every setting.
        out: the run directory.
        device: where to train: `auto`, `cpu`, `cuda` or a torch device.
        resume: go on in a directory that was begun before.
        data: the images, where the caller has loaded them already.
        topology: of the processes that train together, see `training.parallel.distributed.join`.
        wait: for another process that is training there, rather than refuse.
        surrogate: allow the seeds that are kept for surrogates and source models.

    Raises:
        UserError: a seed that is kept for surrogates, bad data, a directory that cannot be used or
            that another process is using, or a loss that is not a number.
    """
    if not surrogate:
        check_seed(config)
    device, out = pick_device(device), Path(out)
    config = topology.rank0_first(lambda: within_budget(config, data))
    run = Run(follow(out), writes=topology.first)
    if topology.broadcast_from_rank0(lambda: _finished(run, out, config, resume=resume, wait=wait)):
        _say(surrogate, f"{out} is finished: nothing is left to train")
        return run
    # Whatever can be wrong is found before anything is written.
    start = topology.rank0_first(lambda: Start.read(config))
    if config.tensorboard:
        require_tensorboard()
    if data is None:
        data = topology.rank0_first(lambda: load_training(config.data))
        for line in [*balance(data), *crossing(data)]:
            say(line)
    check_sources(config, data, run)
    members, optimizers = prepare(config, data, device, topology=topology, start=start)
    if start is not None:
        _say(surrogate, start.describe(config, members))
    begun = time.time()
    with contextlib.ExitStack() as held:

        def begin() -> tuple[int, int, dict[str, Tensor]] | None:
            held.enter_context(run.locked(wait=wait))
            if run.finished:  # by the process that this one waited for
                return None
            Run.begin(out, config, resume=resume)
            images = [data.labels, data.train.sha256, data.holdout.sha256]
            run.keep_to(sha256(canonical_json(images)), start.sha256 if start else "")
            run.save_probe(data.holdout.images)
            done = skipped(config, members, start)
            if (saved := run.load_state()) is not None:
                return saved
            fit_last_layers(config, members, start, data.train.to(device), "weights")
            return 0, done, members_tensors(members)

        state = topology.broadcast_from_rank0(begin)
        if state is None:
            return run
        first, done, tensors = state
        together = f", {topology.size} processes" if topology.size > 1 else ""
        stands = ("standard",) if skipped(config, members, start) else ()
        plan = planned(config, len(data.train), stands)
        _say(surrogate, f"training '{config.name}' on {device}{together} into {out}: {plan}")
        if first > 0 or done > skipped(config, members, start):
            _say(surrogate, f"going on after epoch {done} of {stage_names(config)[first]} training")
        stored = keep_images(config, data, run, device, train)
        load_members(members, tensors)
        load_momentum(optimizers, tensors)
        parts = data.train.to(device), data.holdout.to(device)
        training = Training(config, run, topology, members, optimizers, *parts, start, stored)
        _run_stages(training, data, first, done, tensors)
        if run.writes:
            _finish(training, data, begun)
    return run


def _finished(run: Run, out: Path, config: Config, *, resume: bool, wait: bool) -> bool:
    """Return whether there is nothing left to do; refuse a directory that cannot be used."""
    Run.check(out, config, resume=resume)
    if run.in_use_or_killed:
        with run.locked(wait=wait):  # told now, before the images are read
            return run.finished
    return run.finished


def _say(surrogate: bool, line: str) -> None:
    """Show a line to the user, who asked for this run; of surrogates, verification speaks."""
    if not surrogate:
        say(line)


def prepare(
    config: Config,
    data: TrainingData,
    device: torch.device,
    draw: str = "weights",
    topology: ProcessTopology = SINGLE_PROCESS,
    start: Start | None = None,
) -> tuple[list[Member], list[SGD]]:
    """Return new members on the device, and an optimiser for each.

    Raises:
        UserError: an unknown architecture, starting weights that do not fit, or arithmetic that
            the hardware lacks.
    """
    members = build_members(config, len(data.labels), *normalisation(config.data, data.train), draw)
    if start is not None:
        start.put_into(members)
    topology.sync_batchnorm(members)
    for member in members:
        member.to(device).to(memory_format=torch.channels_last)
        member.compute = autocast_dtype(config.precision, device)
    on_device = topology.shares == 1 and cuda_graphs.wanted(config, device)
    return members, build_optimizers(members, config.standard, on_device=on_device)


def _run_stages(
    training: Training, data: TrainingData, first: int, done: int, tensors: dict[str, Tensor]
) -> None:
    """Go through the stages from `first` on, of which `done` epochs are done, given its state."""
    config, run, members = training.config, training.run, training.members
    plan = stages(config, members, training.optimizers, training.topology, training.stored)
    run.drop_metrics_after(plan[first].name, done, [stage.name for stage in plan[:first]])
    with logged(run, events=config.tensorboard) as log:
        for position in range(first, len(plan)):
            if done < plan[position].settings.epochs:  # starting weights may stand for a stage
                _run_stage(training, plan[position], position, done, tensors, log)
            if position == 0:
                run.save_members(members, "standard")
            done, tensors = 0, {}
            for optimizer in training.optimizers:
                optimizer.state.clear()  # a new stage begins with no momentum
            if position + 1 < len(plan):
                if plan[position + 1].method.fresh:
                    device = members[0].mean.device
                    new, _ = prepare(config, data, device, "fresh", start=training.start)
                    fit_last_layers(config, new, training.start, training.train, "fresh")
                    load_members(members, members_tensors(new))
                run.save_state(position + 1, 0, members_tensors(members))


def _run_stage(
    training: Training,
    stage: TrainingStage,
    position: int,
    done: int,
    tensors: dict[str, Tensor],
    log: Log,
) -> None:
    config, run, topology = training.config, training.run, training.topology
    settings, images = stage.settings, len(training.train)
    average = Average(settings, training.members, tensors)
    saved = time.monotonic()
    count = -(-images // config.batch_size)
    with Progress(
        label(config, stage.name), settings.epochs * count, start=done * count
    ) as progress:
        for epoch in range(done, settings.epochs):
            begun = time.monotonic()
            losses = Losses(stage.name, epoch, config.members, topology)
            seed_dropout(
                training.members, config.seed, "dropout", stage.name, epoch, *topology.seed_path
            )
            batches = enumerate(topology.shard(epoch_batches(training.train, config, stage, epoch)))
            steps = step_losses(stage, epoch, batches, training.optimizers, count, topology)
            with contextlib.closing(steps):
                for found in steps:
                    losses.add(found)
                    progress.advance()
            topology.sync_members(training.members, training.optimizers)
            average.add(epoch, training.members)
            record = {
                "stage": stage.name,
                "epoch": epoch + 1,
                "losses": losses.means(training.members),
                "holdout_accuracy": accuracy(training.members, training.holdout),
                "lr": settings.lr_at(epoch, (count - 1) / count),  # its last step's
                "images_per_s": round(images / (time.monotonic() - begun), 1),
            }
            if measures_diversity(config, epoch, settings.epochs):
                few = training.holdout.take(slice(DIVERSITY_IMAGES))
                found = diversity(training.members, few, config.dverge, config.seed)
                record["diversity"] = found["nats"]
            log(record)
            progress.advance(0, note(record))
            if time.monotonic() - saved >= SAVE_EVERY_S and epoch + 1 < settings.epochs:
                momentum = momentum_tensors(training.optimizers)
                now = members_tensors(training.members) | momentum | average.tensors()
                run.save_state(position, epoch + 1, now)
                saved = time.monotonic()
    average.put_into(training.members)


def _finish(training: Training, data: TrainingData, begun: float) -> None:
    config, run, members = training.config, training.run, training.members
    run.finish(
        {
            "labels": list(data.labels),
            "preprocess": config.data.preprocess.to_json(),
            "members_sha256": run.save_members(members, "members"),
            "standard_sha256": sha256((run.path / "standard.safetensors").read_bytes()),
            "config_sha256": sha256(canonical_json(config.to_json())),
            "train_sha256": data.train.sha256,
            "train_images": len(data.train),
            "class_counts": class_counts(data),
            "holdout_images": len(data.holdout),
            "holdout_groups": data.groups[1] if data.groups else None,
            "holdout_accuracy": accuracy(members, training.holdout),
            "parameters": sum(p.numel() for member in members for p in member.parameters()),
            "start": training.start.files if training.start else [],
            "skipped_epochs": skipped(config, members, training.start),
            "sources": training.stored.sources if training.stored else [],
            "provenance": {
                "torch": torch.__version__,
                "device": str(members[0].mean.device),
                "threads": torch.get_num_threads(),
                "processes": training.topology.size,
                "precision": "fp32" if members[0].compute is None else "bf16",
                "seconds_since_start_or_resume": round(time.time() - begun, 1),
            },
        }
    )
