"""What a run tells about each of its epochs."""

from __future__ import annotations

from typing import Any

from training.config import MAX_SEED, SOURCE_SEED, Config


def label(config: Config, stage: str) -> str:
    """Return the words before a stage's progress; networks that nobody asked for are named."""
    if config.seed <= MAX_SEED:
        whose = ""
    else:
        whose = "sources, " if config.seed > SOURCE_SEED else "surrogates, "
    return f"{whose}{stage} training, {config.members} members"


def note(record: dict[str, Any]) -> str:
    """Return an epoch's record in a few words."""
    losses, held, speed = (record[key] for key in ("losses", "holdout_accuracy", "images_per_s"))
    return f"loss {sum(losses) / len(losses):.3f}, held-out {held:.3f}, {speed:.0f} img/s"


def measures_diversity(config: Config, epoch: int, epochs: int) -> bool:
    """Whether the pairs' diversity is measured after this epoch: ten times a stage, and last.

    Never of a member alone, nor of surrogates and sources: nobody asks for theirs.
    """
    if config.members < 2 or config.seed > MAX_SEED:
        return False
    return epoch + 1 == epochs or (epoch + 1) * 10 // epochs > epoch * 10 // epochs
