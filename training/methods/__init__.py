"""Methods: which stages a run goes through, and what one step of each does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import SGD

from training import config
from training.data.splits import Split, batches
from training.data.streaming import Streamed
from training.methods import adp, adversarial, dverge, gal
from training.methods.standard import standard_step as step_alone
from training.models.member import Member
from training.parallel import cuda_graphs as graphs
from training.parallel.topology import ALONE, Batch, Team
from training.seeds import generator

Step = Callable[[int, int, Batch], Tensor]  # epoch, batch number, batch -> own losses [members]


@dataclass(frozen=True)
class Stage:
    """One stage of training.

    Args:
        name: also of its table in the recipe.
        settings: its schedule.
        step: what one batch does.
        fresh: begins from new weights, not from the standard members.
        pairs: whether a step needs target images beside the source.
    """

    name: str
    settings: config.Stage
    step: Step
    fresh: bool = False
    pairs: bool = False


def stages(
    chosen: config.Config,
    members: Sequence[Member],
    optimizers: Sequence[SGD],
    team: Team = ALONE,
) -> list[Stage]:
    """Return the stages of `chosen.method`.

    Every method begins with standard members: DVERGE starts from them, and for all they are the
    undefended control.
    """

    def recorded(work: graphs.Work) -> graphs.Work:
        return graphs.recorded(work, chosen, optimizers, members[0].mean.device)

    @recorded
    def standard(layer: int, batch: Batch) -> Tensor:
        source, labels, _ = batch
        return step_alone(members, optimizers, source, labels, team=team)

    def standard_step(epoch: int, number: int, batch: Batch) -> Tensor:
        return standard(0, batch)

    def diversify(layer: int, batch: Batch, adversary: dverge.Adversary | None = None) -> Tensor:
        source, labels, target = batch
        return dverge.step(
            members,
            optimizers,
            source,
            labels,
            target,
            layer=layer,
            settings=chosen.dverge,
            adversary=adversary,
            team=team,
        )

    diversify_alone = recorded(diversify)  # adversaries draw, which a recording cannot repeat

    def dverge_step(epoch: int, number: int, batch: Batch) -> Tensor:
        source, labels, _ = batch
        when = (epoch,) if chosen.dverge.layer_every == "epoch" else (epoch, number)
        layer = draw_layer(chosen, max(member.depth for member in members), *when)
        if chosen.method == "dverge":
            return diversify_alone(layer, batch)

        def adversary(index: int, member: Member) -> Tensor:
            names: tuple[int | str, ...] = (
                chosen.seed,
                "dverge",
                epoch,
                number,
                index,
                *team.names,
            )
            return adversarial.adversarial_images(
                member, source, labels, chosen.adversarial, *names
            )

        return diversify(layer, batch, adversary)

    def adversarial_step(epoch: int, number: int, batch: Batch) -> Tensor:
        source, labels, _ = batch
        return adversarial.adversarial_step(
            members,
            optimizers,
            source,
            labels,
            settings=chosen.adversarial,
            names=(chosen.seed, "adversarial", epoch, number, *team.names),
            team=team,
        )

    def adp_step(epoch: int, number: int, batch: Batch) -> Tensor:
        source, labels, _ = batch
        return adp.adp_step(members, optimizers, source, labels, settings=chosen.adp, team=team)

    def gal_step(epoch: int, number: int, batch: Batch) -> Tensor:
        source, labels, _ = batch
        return gal.gal_step(members, optimizers, source, labels, settings=chosen.gal, team=team)

    diverging = Stage("dverge", chosen.dverge, dverge_step, pairs=True)
    second = {
        "standard": None,
        "dverge": diverging,
        "dverge+adversarial": diverging,
        "adversarial": Stage("adversarial", chosen.adversarial, adversarial_step, fresh=True),
        "adp": Stage("adp", chosen.adp, adp_step, fresh=True),
        "gal": Stage("gal", chosen.gal, gal_step, fresh=True),
    }[chosen.method]
    first = Stage("standard", chosen.standard, standard_step)
    return [first] if second is None else [first, second]


def epoch_batches(
    split: Split | Streamed, chosen: config.Config, stage: Stage, epoch: int
) -> Iterator[Batch]:
    """Yield source batches, with independently shuffled and augmented targets where needed."""
    names = (chosen.seed, stage.name, epoch)
    sources = batches(split, chosen.batch_size, chosen.data, *names, "source")
    if not stage.pairs:
        for source, labels in sources:
            yield source, labels, source
        return
    targets = batches(split, chosen.batch_size, chosen.data, *names, "target")
    for (source, labels), (target, _) in zip(sources, targets, strict=True):
        yield source, labels, target


def draw_layer(chosen: config.Config, depth: int, *when: int | str) -> int:
    """Return a layer drawn uniformly from 1..depth, the same for all members."""
    draw = generator(chosen.seed, "layer", *when)
    return int(torch.randint(1, depth + 1, (1,), generator=draw))
