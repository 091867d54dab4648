"""Settings of each stage of training: the schedule, and what each method adds. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from training.config_parsing import check


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """SGD with momentum over one stage of training: its epochs and learning rates."""

    table = "standard"  # its name in recipes; not a setting

    epochs: int = 200  # at most, where there is a budget
    # Gradients of one member on one image, which the epochs of a member may take; 0: any number
    budget: int = 0
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    schedule: Literal["step", "one-cycle"] = "step"
    milestones: tuple[float, ...] = (0.5, 0.75)  # step: shares of the epochs where lr falls
    gamma: float = 0.1  # step: by this factor
    warmup: float = 0.25  # one-cycle: share of the steps with rising lr
    clip_norm: float = 0.0  # most that the norm of a member's gradient may be; 0: any
    average: float = 0.0  # share of the epochs, the last ones, whose weights are averaged; 0: none

    def __post_init__(self) -> None:
        for key, holds, expected in (
            ("epochs", self.epochs >= 1, "1 or more"),
            ("budget", self.budget >= 0, "0 or more"),
            ("lr", self.lr > 0, "above 0"),
            ("momentum", 0 <= self.momentum < 1, "in [0, 1)"),
            ("weight_decay", self.weight_decay >= 0, "0 or more"),
            ("milestones", all(0 <= share <= 1 for share in self.milestones), "shares in [0, 1]"),
            ("gamma", 0 < self.gamma <= 1, "in (0, 1]"),
            ("warmup", 0 <= self.warmup < 1, "in [0, 1)"),
            ("clip_norm", self.clip_norm >= 0, "0 or more"),
            ("average", 0 <= self.average <= 1, "a share in [0, 1]"),
        ):
            check(f"{self.table}.{key}", getattr(self, key), holds, expected)

    def lr_at(self, epoch: int, progress: float) -> float:
        """Return the learning rate `progress` (0..1) of the way through `epoch`."""
        done = (epoch + progress) / self.epochs
        if self.schedule == "step":
            passed = sum(epoch >= share * self.epochs for share in self.milestones)
            return self.lr * self.gamma**passed
        if done < self.warmup:
            return self.lr * done / self.warmup
        return self.lr * max(0.0, (1 - done) / (1 - self.warmup))


@dataclass(frozen=True, kw_only=True)
class Dverge(Schedule):
    """DVERGE: how non-robust features are distilled (paper, eq. 1 and 3)."""

    table = "dverge"

    eps: float = 0.07  # radius of the distillation ball, pixels in [0,1]
    step_size: float = 0.007
    steps: int = 10
    decay: float = 1.0  # of the accumulated gradient
    weight: float = (
        1.0  # dverge+adversarial, dverge+transfer: of DVERGE's sum beside the other loss
    )
    clean_weight: float = 0.0  # of the loss on clean images, beside DVERGE's sum; 0: none
    layer_every: Literal["epoch", "batch"] = "epoch"  # how often a layer is drawn
    # How many others each member learns from in a step, drawn anew each time; 0: from all of them
    partners: int = 0
    # BatchNorm while distilling. `running`: evaluation mode, nothing moves. `batch`: training
    # mode as in the published code, where every distillation pass moves the running statistics.
    batchnorm: Literal["running", "batch"] = "running"

    def __post_init__(self) -> None:
        super().__post_init__()
        check("dverge.eps", self.eps, 0 < self.eps <= 1, "in (0, 1]")
        check("dverge.step_size", self.step_size, 0 < self.step_size <= 1, "in (0, 1]")
        check("dverge.steps", self.steps, self.steps >= 1, "1 or more")
        check("dverge.decay", self.decay, self.decay >= 0, "0 or more")
        check("dverge.clean_weight", self.clean_weight, self.clean_weight >= 0, "0 or more")
        check("dverge.partners", self.partners, self.partners >= 0, "0 or more")

    def partners_of(self, members: int) -> int:
        """Return from how many others each of `members` members learns in a step."""
        return min(self.partners or members, members - 1)


@dataclass(frozen=True, kw_only=True)
class Adversarial(Schedule):
    """Adversarial training (Madry et al., 2018): PGD on each member itself."""

    table = "adversarial"

    eps: float = 8 / 255
    step_size: float = 2 / 255
    steps: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        check("adversarial.eps", self.eps, 0 < self.eps <= 1, "in (0, 1]")
        check("adversarial.step_size", self.step_size, 0 < self.step_size <= 1, "in (0, 1]")
        check("adversarial.steps", self.steps, self.steps >= 1, "1 or more")


@dataclass(frozen=True, kw_only=True)
class Transfer(Schedule):
    """Training on stored adversarial images of other networks (Sitawarin et al., 2024)."""

    table = "transfer"

    # The source models: runs, folders of runs, or weights files of CIFAR ResNets. Empty: they are
    # trained, from seeds that neither runs nor surrogates use
    sources: str | tuple[str, ...] = ""
    networks: int = 5  # how many are trained, where none are named
    copies: int = 4  # adversarial images of each training image from each source
    eps: float = 8 / 255
    step_size: float = 2 / 255
    steps: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        check("transfer.networks", self.networks, 1 <= self.networks <= 1000, "1 to 1000")
        check("transfer.copies", self.copies, self.copies >= 1, "1 or more")
        check("transfer.eps", self.eps, 1 / 255 <= self.eps <= 1, "in [1/255, 1]")
        check("transfer.step_size", self.step_size, 0 < self.step_size <= 1, "in (0, 1]")
        check("transfer.steps", self.steps, self.steps >= 1, "1 or more")


@dataclass(frozen=True, kw_only=True)
class Adp(Schedule):
    """Adaptive diversity promoting (Pang et al., 2019)."""

    table = "adp"

    alpha: float = 2.0  # of the ensemble's entropy
    beta: float = 0.5  # of the log ensemble diversity


@dataclass(frozen=True, kw_only=True)
class Gal(Schedule):
    """Gradient alignment loss (Kariyappa & Qureshi, 2019)."""

    table = "gal"

    weight: float = 0.5  # lambda
