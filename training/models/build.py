"""Members from a run's settings: which network, and its random starting weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from training.config import Config
from training.models.member import Member
from training.models.resnet import resnet_stages
from training.models.torchvision_member import build_torchvision
from training.published_weights import PREFIX
from training.seeds import derive


def build(
    config: Config,
    architecture: str,
    classes: int,
    mean: Sequence[float],
    std: Sequence[float],
) -> Member:
    """Return one member with weights drawn from torch's global generator.

    Raises:
        UserError: an unknown architecture.
    """
    if architecture.startswith(PREFIX):
        name, shape = architecture.removeprefix(PREFIX), config.data.preprocess.shape
        return build_torchvision(name, classes, mean, std, shape)
    channels = config.data.preprocess.shape[0]
    member = Member(resnet_stages(architecture, channels, config.width, classes), mean, std)
    for module in member.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return member


def build_members(
    config: Config,
    classes: int,
    mean: Sequence[float],
    std: Sequence[float],
    draw: str = "weights",
) -> list[Member]:
    """Return the ensemble's members, each with starting weights of its own seed.

    Args:
        config: architecture, or one for each member.
        classes: how many logits.
        mean, std: per channel, for images in `[0,1]`.
        draw: names the random draw; another name gives other weights.
    """
    members = []
    for index, architecture in enumerate(config.architectures):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(config.seed, draw, index))
            members.append(build(config, architecture, classes, mean, std))
        members[-1].freeze_batchnorm = config.freeze_batchnorm and config.pretrained
    return members
