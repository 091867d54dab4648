"""Counting the gradients that are computed, in images through one network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def counted(networks: Iterable[nn.Module]) -> Iterator[Callable[[], int]]:
    """Count the images whose gradients are computed, once for each network.

    Threads may use the networks at the same time; a network that is named twice counts once.

    Args:
        networks: called with images `[N, C, H, W]`.

    Yields:
        a function that returns the number so far.
    """
    seen: list[int] = []

    def note(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        if torch.is_grad_enabled() and inputs[0].requires_grad:
            seen.append(len(inputs[0]))

    hooks = [each.register_forward_pre_hook(note) for each in dict.fromkeys(networks)]
    try:
        yield lambda: sum(seen)
    finally:
        for hook in hooks:
            hook.remove()
