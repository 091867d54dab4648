"""The whole of training: standard members first, then DVERGE, saved so that a kill loses little."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import SGD

from dverge_serve.errors import UserError
from dverge_serve.files import canonical_json, sha256
from dverge_serve.progress import Progress
from training import config as configuration
from training import data as datasets
from training.config import Config
from training.data import Split, TrainingData
from training.diversity import diversity
from training.members import Member, build_members, mean_logits
from training.methods import Batch, Stage, stages
from training.run import Run, load_members, members_tensors

SAVE_EVERY_S = 10.0
EVALUATION_BATCH = 512
DIVERSITY_IMAGES = 256


def pick_device(name: str) -> torch.device:
    """Return the device for `auto`, `cpu` or `cuda`.

    Raises:
        UserError: another name, or a GPU asked for where there is none.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"device '{name}'", "auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("no CUDA GPU is usable here", "a GPU", "use --device cpu or auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def arithmetic(precision: str, device: torch.device) -> torch.dtype | None:
    """Return what the members' operations are cast to: bfloat16, or None for float32.

    Raises:
        UserError: bf16 asked for where the hardware lacks it.
    """
    if device.type == "cuda":
        able = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        able = bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())
    if precision == "bf16" and not able:
        raise UserError(f"precision bf16, which this {device.type} lacks", "fp32 or auto")
    return torch.bfloat16 if able and precision != "fp32" else None


def train(
    config: Config,
    out: Path,
    *,
    device: torch.device,
    resume: bool = False,
    data: TrainingData | None = None,
) -> Run:
    """Train an ensemble into the run directory `out`, or go on where it stopped.

    Args:
        config: every setting.
        out: the run directory.
        device: where to train.
        resume: go on in a directory that was begun before.
        data: the images, where the caller has loaded them already.

    Raises:
        UserError: bad data, a directory that cannot be used, or a loss that is not a number.
    """
    Run.check(out, config, resume=resume)
    if resume and Run(out).finished:
        return Run.begin(out, config, resume=True)
    # Whatever can be wrong is found before anything is written.
    data = data or datasets.load_training(config.data)
    members, optimizers = prepare(config, data, device)
    run = Run.begin(out, config, resume=resume)
    begun = time.time()
    train_split, holdout = data.train.to(device), data.holdout.to(device)
    run.keep_to(sha256(canonical_json([data.labels, data.train.sha256, data.holdout.sha256])))
    run.save_probe(data.holdout.images)
    plan = stages(config, members, optimizers)

    first, done = 0, 0
    if state := run.load_state():
        first, done, tensors = state
        load_members(members, tensors)
        _load_momentum(optimizers, tensors)
    run.drop_metrics_after(plan[first].name, done, [stage.name for stage in plan[:first]])
    for position in range(first, len(plan)):
        stage = plan[position]
        _run_stage(run, config, stage, position, done, members, optimizers, train_split, holdout)
        if position == 0:
            run.save_members(members, "standard")
        done = 0
        for optimizer in optimizers:
            optimizer.state.clear()  # a new stage begins with no momentum
        if position + 1 < len(plan):
            if plan[position + 1].fresh:
                new, _ = prepare(config, data, device, "fresh")
                load_members(members, members_tensors(new))
            run.save_state(position + 1, 0, members_tensors(members))
    _finish(run, config, data, members, begun)
    return run


def prepare(
    config: Config, data: TrainingData, device: torch.device, draw: str = "weights"
) -> tuple[list[Member], list[SGD]]:
    """Return new members on the device, and an optimiser for each.

    Raises:
        UserError: an unknown architecture, or arithmetic that the hardware lacks.
    """
    mean, std = _normalisation(config, data.train)
    members = build_members(config, len(data.labels), mean, std, draw)
    compute = arithmetic(config.precision, device)
    for member in members:
        member.to(device).to(memory_format=torch.channels_last)
        member.compute = compute
    return members, _optimizers(members, config.standard)


def accuracy(members: Sequence[Member], split: Split) -> float:
    """Return the share of `split` that the mean of the members' logits gets right."""
    if not len(split):
        return float("nan")
    right = 0
    for member in members:
        member.eval()
    with torch.no_grad():
        for start in range(0, len(split), EVALUATION_BATCH):
            part = split.take(slice(start, start + EVALUATION_BATCH))
            logits = mean_logits(members, datasets.to_float(part.images))
            right += int((logits.argmax(1) == part.labels).sum())
    return right / len(split)


def _run_stage(
    run: Run,
    config: Config,
    stage: Stage,
    position: int,
    done: int,
    members: Sequence[Member],
    optimizers: Sequence[SGD],
    train_split: Split,
    holdout: Split,
) -> None:
    settings = stage.settings
    saved = time.monotonic()
    label = f"{stage.name} training, {len(members)} members"
    count = -(-len(train_split) // config.batch_size)
    with Progress(label, settings.epochs * count, start=done * count) as progress:
        for epoch in range(done, settings.epochs):
            begun = time.monotonic()
            total, seen = torch.zeros(len(members), device=train_split.images.device), 0
            for number, batch in enumerate(epoch_batches(train_split, config, stage, epoch)):
                rate = settings.lr_at(epoch, number / count)
                for optimizer in optimizers:
                    for group in optimizer.param_groups:
                        group.update(
                            lr=rate, momentum=settings.momentum, weight_decay=settings.weight_decay
                        )
                total += stage.step(epoch, number, batch)
                seen += 1
                progress.advance()
            losses = (total / max(seen, 1)).tolist()
            _refuse_nan(stage.name, epoch, losses)
            held = accuracy(members, holdout)
            speed = len(train_split) / (time.monotonic() - begun)
            record = {
                "stage": stage.name,
                "epoch": epoch + 1,
                "losses": losses,
                "holdout_accuracy": held,
                "images_per_s": round(speed, 1),
            }
            if len(members) > 1 and _measures_diversity(epoch, settings.epochs):
                few = holdout.take(slice(DIVERSITY_IMAGES))
                record["diversity"] = diversity(members, few, config.dverge, config.seed)["nats"]
            run.log(record)
            note = f"loss {sum(losses) / len(losses):.3f}, held-out {held:.3f}, {speed:.0f} img/s"
            progress.advance(0, note)
            if time.monotonic() - saved >= SAVE_EVERY_S and epoch + 1 < settings.epochs:
                tensors = {**members_tensors(members), **_momentum(optimizers)}
                run.save_state(position, epoch + 1, tensors)
                saved = time.monotonic()


def epoch_batches(split: Split, config: Config, stage: Stage, epoch: int) -> Iterator[Batch]:
    """Yield source batches, with independently shuffled and augmented targets where needed."""
    names = (config.seed, stage.name, epoch)
    sources = datasets.batches(split, config.batch_size, config.data, *names, "source")
    if not stage.pairs:
        for source, labels in sources:
            yield source, labels, source
        return
    targets = datasets.batches(split, config.batch_size, config.data, *names, "target")
    for (source, labels), (target, _) in zip(sources, targets, strict=True):
        yield source, labels, target


def _measures_diversity(epoch: int, epochs: int) -> bool:
    """Whether the pairs' diversity is measured after this epoch: ten times a stage, and last."""
    return epoch + 1 == epochs or (epoch + 1) * 10 // epochs > epoch * 10 // epochs


def _refuse_nan(stage: str, epoch: int, losses: list[float]) -> None:
    for index, loss in enumerate(losses):
        if loss != loss or loss in (float("inf"), float("-inf")):
            raise UserError(
                f"the loss of member {index} became {loss} in {stage} epoch {epoch + 1}",
                "a finite loss",
                f"lower {stage}.lr and train into another --out",
            )


def _normalisation(config: Config, train: Split) -> tuple[list[float], list[float]]:
    if config.data.mean and config.data.std:
        return list(config.data.mean), list(config.data.std)
    # Counting levels is exact, whatever the thread count, and needs no wider copy of the images.
    levels = torch.arange(256, dtype=torch.float64)
    counts = [
        torch.bincount(channel.flatten(), minlength=256).double()
        for channel in train.images.cpu().unbind(1)
    ]
    shares = torch.stack([count / count.sum() for count in counts])
    mean = (shares * levels).sum(1)
    std = ((shares * levels**2).sum(1) - mean**2).clamp_min(1.0).sqrt()
    return [round(v / 255, 4) for v in mean.tolist()], [round(v / 255, 4) for v in std.tolist()]


def _optimizers(members: Sequence[Member], settings: configuration.Stage) -> list[SGD]:
    return [
        SGD(
            member.parameters(),
            lr=settings.lr,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
        )
        for member in members
    ]


def _momentum(optimizers: Sequence[SGD]) -> dict[str, Tensor]:
    return {
        f"momentum{index}.{number}": buffer.cpu().contiguous()
        for index, optimizer in enumerate(optimizers)
        for number, parameter in enumerate(optimizer.param_groups[0]["params"])
        if (buffer := optimizer.state[parameter].get("momentum_buffer")) is not None
    }


def _load_momentum(optimizers: Sequence[SGD], tensors: dict[str, Tensor]) -> None:
    for index, optimizer in enumerate(optimizers):
        for number, parameter in enumerate(optimizer.param_groups[0]["params"]):
            if (stored := tensors.get(f"momentum{index}.{number}")) is not None:
                optimizer.state[parameter]["momentum_buffer"] = stored.to(parameter.device)


def _finish(
    run: Run, config: Config, data: TrainingData, members: Sequence[Member], begun: float
) -> None:
    holdout = data.holdout.to(members[0].mean.device)
    run.finish(
        {
            "labels": list(data.labels),
            "preprocess": config.data.preprocess.to_json(),
            "members_sha256": run.save_members(members, "members"),
            "standard_sha256": sha256((run.path / "standard.safetensors").read_bytes()),
            "config_sha256": sha256(canonical_json(config.to_json())),
            "train_sha256": data.train.sha256,
            "train_images": len(data.train),
            "holdout_images": len(data.holdout),
            "holdout_accuracy": accuracy(members, holdout),
            "parameters": sum(p.numel() for member in members for p in member.parameters()),
            "provenance": {
                "torch": torch.__version__,
                "device": str(members[0].mean.device),
                "threads": torch.get_num_threads(),
                "precision": "fp32" if members[0].compute is None else "bf16",
                "seconds_since_start_or_resume": round(time.time() - begun, 1),
            },
        }
    )
