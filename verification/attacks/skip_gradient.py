"""Residual branches of a network, and attacks that let gradients pass around them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

SHORTCUTS = ("shortcut", "downsample")  # what a residual block calls the path around its branch


@contextlib.contextmanager
def skip_gradient(members: Sequence[nn.Module], gamma: float) -> Iterator[int]:
    """Scale the gradient of every residual branch by `gamma`: SGM (Wu et al., 2020).

    Gradients then flow mostly through the skip connections; values do not change. Hooks sit on
    the last layer of each branch, in any network whose blocks name their other path `shortcut`
    or `downsample`, and are gone when the block ends.

    Yields:
        how many branches there are.
    """
    hooks = [end.register_forward_hook(_scale(gamma)) for end in residual_ends(members)]
    try:
        yield len(hooks)
    finally:
        for hook in hooks:
            hook.remove()


def residual_ends(members: Sequence[nn.Module]) -> list[nn.Module]:
    """Return the last layer of every residual branch: its BatchNorm, or what it was folded to."""
    ends: list[nn.Module] = []
    for member in members:
        for block in member.modules():
            children = dict(block.named_children())
            if not any(hasattr(block, name) for name in SHORTCUTS):
                continue
            layers = (nn.BatchNorm2d, nn.Identity, nn.Conv2d)
            branch = [
                child
                for name, child in children.items()
                if name not in SHORTCUTS and isinstance(child, layers)
            ]
            ends += branch[-1:]
    return ends


def _scale(gamma: float) -> Callable[[nn.Module, Any, Tensor], None]:
    def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda found: gamma * found)  # type: ignore[no-untyped-call]

    return hook
