"""Smoke checks of arithmetic: what the GPU computes is what the CPU computes."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import SGD

from benchmarks.gpu.tiny import random_split, untrained_members
from training.data.splits import to_float
from training.models.ensemble import Ensemble
from training.optimizers import RateOnDevice
from verification.attacks import presets
from verification.attacks.perturbation import encode_fp16
from verification.gradients import flow, ready
from verification.metrics.detection import detector_aware

EPS = 0.03


def environment(device: torch.device) -> str:
    """Name what figures depend on."""
    if device.type != "cuda":
        return f"torch {torch.__version__}"
    of, cudnn = torch.cuda.get_device_properties(0), torch.backends.cudnn
    return (
        f"{of.name} sm{of.major}{of.minor}, torch {torch.__version__}, "
        f"cudnn {cudnn.version()}, nccl {torch.cuda.nccl.version()}, "  # type: ignore[no-untyped-call]
        f"TF32 convolutions {cudnn.allow_tf32}, products {torch.backends.cuda.matmul.allow_tf32}"
    )


def fp32_agrees_with_the_cpu(device: torch.device) -> str:
    """Folded members as verification compares them. No training may have come before."""
    members, x = untrained_members(), torch.rand(64, 3, 32, 32)
    with torch.no_grad():
        here, there = (
            Ensemble([ready(m, on) for m in members]).member_logits(x.to(on)).cpu()
            for on in (torch.device("cpu"), device)
        )
    apart, allowed = float((here - there).abs().max()), 1e-4 * max(1.0, float(here.abs().max()))
    assert apart <= allowed, f"differs by {apart:.2e}, allowed {allowed:.2e}: TF32 is on"
    return f"{apart:.1e} of {allowed:.1e}"


def gradients_flow(device: torch.device) -> str:
    """Find the members' gradients, as the gate `nonzero-gradient` does."""
    members = [ready(member, device) for member in untrained_members("resnet8")]
    split = random_split(8).to(device)
    suite = presets.suite(presets.Variant(preset="quick", classes=10), ["s"])
    zero, broken, _ = flow(members, split, suite)
    assert not zero.any()
    assert not broken.any()
    return f"{len(split)} images"


def every_attack_makes_images(device: torch.device) -> str:
    """Two steps of every attack of the preset `full`, and of the one that knows the alarm."""
    members = [ready(member, device) for member in untrained_members("resnet8")]
    split = random_split(8).to(device)
    ensemble, images = Ensemble(members), to_float(split.images)
    suite = presets.suite(presets.Variant(preset="full", classes=10), ["s"])
    crafted = [attack for attack in suite if attack.kind in ("gradient", "apgd", "noise")]
    for attack in crafted:
        names = {each.name for each in fields(attack)} & {
            "steps",
            "nearest_steps",
            "variance_samples",
        }
        fewer: dict[str, Any] = {name: min(getattr(attack, name), 2) for name in names}
        adversarial = replace(attack, **fewer)(ensemble, images, split.labels, EPS)
        encode_fp16(adversarial, split.images, EPS, attack.norm)
    detector_aware(members, split, EPS, steps=2, seed=0)
    return f"{len(crafted)} attacks"


def to_float_divides_exactly(device: torch.device) -> str:
    """The 256 levels of a pixel are the service's, bit for bit."""
    found = to_float(torch.arange(256, dtype=torch.uint8, device=device)).cpu().numpy()
    off = int((found != np.arange(256, dtype=np.float32) / np.float32(255)).sum())
    assert off == 0, f"{off} of 256 levels differ from true division"
    return "256 levels"


def rate_on_device_is_sgd(device: torch.device) -> str:
    """Four steps with a falling rate end in the weights that PyTorch's SGD ends in."""
    ends = []
    for kind in (SGD, RateOnDevice):
        torch.manual_seed(0)
        net = nn.Sequential(
            *(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 1, 2), nn.BatchNorm2d(32), nn.Flatten()),
            nn.Linear(32 * 225, 10),
        ).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer = kind(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        for step in range(4):
            optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
            optimizer.zero_grad()
            net(torch.rand(8, 3, 31, 31).to(device)).square().mean().backward()
            optimizer.step()
        ends.append(torch.cat([each.detach().flatten() for each in net.parameters()]))
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-6)
    return "4 steps"
