"""Every setting of a training run, in frozen dataclasses. Torch-free."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any, Literal

from dverge_serve.errors import UserError
from dverge_serve.images import Preprocess
from training.config_parsing import assign, build, check
from training.method_registry import METHODS
from training.schedules import Adp, Adversarial, Dverge, Gal, Schedule, Transfer

MAX_SEED = 2**32 - 1  # seeds beyond are kept for surrogates, so no run can share one
SOURCE_SEED = 2**33  # and beyond this for source models, so no surrogate can share one
EMBEDDED = ("digits",)
# Mode and size of the images of each named set; they are not resized.
NATIVE = {
    "digits": ("L", (8, 8)),
    "cifar10": ("RGB", (32, 32)),
    "cifar100": ("RGB", (32, 32)),
    "fashion-mnist": ("L", (28, 28)),
    "svhn": ("RGB", (32, 32)),
}
DOWNLOADED = ("cifar10", "cifar100", "fashion-mnist", "svhn")
FREE = {
    "data.memory_gb",
    "data.workers",
    "graphs",
    "tensorboard",
}  # how the work is done: may change from one half of a run to the other
DATASETS = (*EMBEDDED, *DOWNLOADED, "imagefolder")


@dataclass(frozen=True, kw_only=True)
class Augment:
    """Random changes of each training image beside crop and flip; 0 switches one off."""

    rotate: float = 0.0  # at most so many degrees either way
    scale: float = 0.0  # larger or smaller by at most this share
    shear: float = 0.0  # at most so many degrees either way
    brightness: float = 0.0  # brighter or darker by at most this share
    contrast: float = 0.0  # more or less by at most this share

    def __post_init__(self) -> None:
        for key in ("rotate", "shear"):
            value = getattr(self, key)
            check(f"data.augment.{key}", value, 0 <= value <= 45, "0 to 45 degrees")
        for key in ("scale", "brightness", "contrast"):
            value = getattr(self, key)
            check(f"data.augment.{key}", value, 0 <= value <= 0.9, "a share in [0, 0.9]")


@dataclass(frozen=True, kw_only=True)
class Data:
    """The data set, and the preprocessing that makes its images the model's input."""

    name: Literal["digits", "cifar10", "cifar100", "fashion-mnist", "svhn", "imagefolder"] = (
        "imagefolder"
    )
    path: str = ""  # imagefolder: a folder with train/<class>/ and test/<class>/, or a CSV file
    mode: Literal["L", "RGB"] = "RGB"
    crop: tuple[int, int] = (32, 32)  # height, width of the model's input in pixels
    resize: tuple[int, int] | None = None  # covered before the crop; none: same as crop
    interpolation: Literal["nearest", "bilinear", "bicubic"] = "bilinear"
    mean: tuple[float, ...] = ()  # per channel, pixels in [0,1]; empty: measured
    std: tuple[float, ...] = ()
    pad: int = 4  # random-crop padding in pixels
    flip: bool = True  # random horizontal flip
    augment: Augment = field(default_factory=Augment)
    holdout: float = 0.1  # share of the training images kept for choosing anything
    # imagefolder: images that belong together, which the hold-out takes or leaves whole. A pattern
    # with one (capture group) on `<class>/<file>`, e.g. '(.+/\d+)_\d+'; of a CSV file, a column
    group: str = ""
    train_limit: int = 0  # use only this many training images; 0: all
    test_limit: int = 0
    # imagefolder: the most memory that decoded training images take; more of them are read from
    # disk as training goes on, which changes no batch. 0: always so; none: half of what is free
    memory_gb: float | None = None
    workers: int | None = None  # processes reading from disk; none: one a core, at most 8

    def __post_init__(self) -> None:
        check("data.holdout", self.holdout, 0.0 < self.holdout <= 0.5, "a share in (0, 0.5]")
        for key in ("pad", "train_limit", "test_limit", "memory_gb", "workers"):
            value = getattr(self, key)
            check(f"data.{key}", value, value is None or value >= 0, "0 or more")
        check("data.crop", self.crop, min(self.crop) >= 8, "at least 8 by 8 pixels")
        if self.name in NATIVE:
            mode, size = NATIVE[self.name]
            told = f"{mode} and {list(size)}, as the images of '{self.name}' are"
            check("data.mode", self.mode, self.mode == mode, told)
            check("data.crop", list(self.crop), self.crop == size, told)
            told = f"none: the images of '{self.name}' are not resized"
            check("data.resize", self.resize, self.resize in (None, size), told)
        self._check_group()
        channels = self.preprocess.shape[0]
        for key in ("mean", "std"):
            value = getattr(self, key)
            check(f"data.{key}", value, len(value) in (0, channels), f"{channels} numbers or none")
        check("data.std", self.std, all(value > 0 for value in self.std), "numbers above 0")
        both = bool(self.mean) == bool(self.std)
        check("data.std", self.std, both, "data.mean and data.std, or neither (measured)")

    def _check_group(self) -> None:
        if not self.group:
            return
        told = f"none: the images of '{self.name}' have no file names"
        check("data.group", self.group, self.name == "imagefolder", told)
        if self.path.lower().endswith(".csv"):
            return
        try:
            count = re.compile(self.group).groups
        except re.error:
            count = 0
        told = r"a regular expression with one (capture group), such as '(.+/\d+)_\d+'"
        check("data.group", self.group, count == 1, told)

    @property
    def preprocess(self) -> Preprocess:
        """The preprocessing these settings name; it travels in the model's metadata."""
        return Preprocess(
            mode=self.mode,
            resize=self.resize or self.crop,
            crop=self.crop,
            interpolation=self.interpolation,
        )


@dataclass(frozen=True, kw_only=True)
class Verification:
    """Defaults of `verify-robustness` for models of this run."""

    # Linf radii, pixels in [0,1]; numbers, or text such as "8/255"
    eps: tuple[float, ...] = (0.01, 0.02, 0.03)

    def __post_init__(self) -> None:
        ok = bool(self.eps) and all(0 < eps <= 1 for eps in self.eps)
        check("verification.eps", self.eps, ok, "one or more radii in (0, 1]")


@dataclass(frozen=True, kw_only=True)
class Config:
    """All settings of one training run."""

    name: str
    # dverge, standard, adversarial, dverge+adversarial, transfer, dverge+transfer, adp, gal, or one
    # of your own
    method: str = "dverge"
    # resnet<6n+2>, resnet<9n+2>-bottleneck, either with -pad (shortcuts without parameters), -leaky
    # or -pad-leaky behind it, or torchvision:<name>; or a list with one for each member
    architecture: str | tuple[str, ...] = "resnet20"
    # files with starting weights, safetensors or of torch.save: one with all members, which replace
    # ordinary training; one of a single model, from which all begin it; or a list of such.
    # Empty: random
    start: str | tuple[str, ...] = ""
    # torchvision's name for published weights of `architecture`, e.g. DEFAULT or IMAGENET1K_V1: all
    # members begin from them unless `start` names files, and `data` follows their preprocessing
    weights: str = ""
    # With starting weights: BatchNorm keeps their statistics all through training
    freeze_batchnorm: bool = False
    # With starting weights for other classes: new last layers are fitted to the features of so many
    # augmented views of each training image, before training begins. 0: they stay a random draw
    head_views: int = 0
    width: int = 16  # channels of the first third
    members: int = 3
    batch_size: int = 128
    seed: int = 0
    tensorboard: bool = False  # TensorBoard events beside metrics.jsonl (extra `tensorboard`)
    # Of the members' arithmetic; their weights stay fp32. auto: bf16 where the hardware has it.
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    # On a GPU: steps recorded once as CUDA graphs and replayed. off: every operation launched anew.
    graphs: Literal["auto", "off"] = "auto"
    data: Data = field(default_factory=Data)
    standard: Schedule = field(default_factory=Schedule)
    dverge: Dverge = field(default_factory=Dverge)
    adversarial: Adversarial = field(default_factory=Adversarial)
    transfer: Transfer = field(default_factory=Transfer)
    adp: Adp = field(default_factory=Adp)
    gal: Gal = field(default_factory=Gal)
    verification: Verification = field(default_factory=Verification)
    _own: tuple[Schedule, ...] = ()  # settings of methods that were registered

    def __post_init__(self) -> None:
        check("method", self.method, self.method in METHODS, f"one of {', '.join(METHODS)}")
        settings = METHODS[self.method].settings
        known = {*self.__dataclass_fields__, *(own.table for own in self._own)}
        if settings.table not in known:
            object.__setattr__(self, "_own", (*self._own, settings()))
        plain = bool(self.name) and self.name[0] != "." and not set(self.name) & set("/\\")
        check("name", self.name, plain, "a name for a folder, without / or a leading dot")
        check("width", self.width, 1 <= self.width <= 10_000, "1 to 10000")
        least = METHODS[self.method].members
        listed = isinstance(self.architecture, tuple)
        fits = not listed or len(self.architecture) == self.members
        check("architecture", self.architecture, fits, f"one name, or {self.members} of them")
        check("members", self.members, least <= self.members <= 1000, f"{least} to 1000")
        check("batch_size", self.batch_size, 2 <= self.batch_size < 2**31, "2 or more, below 2**31")
        check("seed", self.seed, self.seed >= 0, "0 or more")
        check("head_views", self.head_views, self.head_views >= 0, "0 or more")

    @property
    def pretrained(self) -> bool:
        """Whether members begin from weights that were trained before."""
        named = (self.start,) if isinstance(self.start, str) else self.start
        return bool(self.weights) or any(named)

    @property
    def architectures(self) -> tuple[str, ...]:
        """Each member's architecture."""
        named = self.architecture
        return (named,) * self.members if isinstance(named, str) else named

    def settings_of(self, table: str) -> Schedule:
        """Return the settings of a stage by the name of their table, e.g. `dverge`."""
        own = {settings.table: settings for settings in self._own}
        found: Schedule = own[table] if table in own else getattr(self, table)
        return found

    def to_json(self) -> dict[str, Any]:
        """Return every value, as written into `config.json`."""
        table = dataclasses.asdict(self)
        del table["_own"]
        return table | {own.table: dataclasses.asdict(own) for own in self._own}

    def overridden(self, overrides: dict[str, Any]) -> Config:
        """Return these settings with dotted keys changed, e.g. `{"dverge.epochs": 10}`."""
        table = self.to_json()
        for key, value in overrides.items():
            assign(table, key, value, f"`overrides` {key}")
        return Config.from_json(table, "settings")

    @classmethod
    def from_json(cls, table: dict[str, Any], where: str) -> Config:
        """Read `to_json`'s form, or a recipe's table; `where` names it in messages.

        Raises:
            UserError: an unknown key, a value of the wrong type or out of range.
        """
        kinds = {method.settings.table: method.settings for method in METHODS.values()}
        own = {key: kinds[key] for key in table if key in kinds.keys() - cls.__dataclass_fields__}
        fields = {key: value for key, value in table.items() if key not in own}
        made = tuple(build(kind, table[key], where, f"{key}.") for key, kind in own.items())
        return dataclasses.replace(build(cls, fields, where, ""), _own=made)


def check_seed(config: Config) -> None:
    """Refuse a seed that is kept for surrogates.

    Raises:
        UserError: it is above `MAX_SEED`.
    """
    if config.seed > MAX_SEED:
        raise UserError(
            f"seed {config.seed}", f"0 to {MAX_SEED}; larger ones are kept for surrogates"
        )


def differences(one: Config, other: Config) -> list[str]:
    """Return the dotted keys at which two configurations differ, where a result depends on them."""

    def flatten(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        flat: dict[str, Any] = {}
        for key, value in table.items():
            if isinstance(value, dict):
                flat |= flatten(value, f"{prefix}{key}.")
            else:
                flat[prefix + key] = value
        return flat

    left, right = flatten(one.to_json()), flatten(other.to_json())
    keys = (left.keys() | right.keys()) - FREE
    return sorted(key for key in keys if left.get(key) != right.get(key))
