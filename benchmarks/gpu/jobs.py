"""What is done on the GPU, in order of importance, and where each job leaves what it found."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from dverge_serve.files import pretty_json, write_atomic
from training.config import Config, Data
from training.recipe import load_recipe, parse_settings

Kind = Literal["checks", "steps", "train", "attack"]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One piece of work.

    Args:
        name: also of its run directory.
        kind: `checks` runs the tests that need a GPU; `steps` times one step; `train` makes a run;
            `attack` measures one.
        recipe, settings: of a training.
        surrogate: kind of surrogate that is trained for the recipe, instead of the recipe itself.
        needs: runs that must be finished.
    """

    name: str
    kind: Kind
    recipe: str = "cifar10"
    settings: Mapping[str, Any] = field(default_factory=dict)
    surrogate: str = ""
    needs: tuple[str, ...] = ()


def _attack(run: str) -> Job:
    return Job(name=f"attack-{run}", kind="attack", needs=(run, "surrogate"))


# The exact recipe's surrogate attacks all runs: one attack for all makes their figures comparable.
JOBS = (
    Job(name="checks", kind="checks"),
    Job(name="steps", kind="steps"),
    Job(name="exact", kind="train"),
    Job(name="fast", kind="train", recipe="cifar10-fast"),
    Job(name="surrogate", kind="train", surrogate="standard-3"),
    _attack("exact"),
    _attack("fast"),
    Job(name="five", kind="train", settings={"members": 5}),
    _attack("five"),
)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What all jobs of a chunk share.

    Args:
        work: a folder on this machine for images, runs and findings.
        overrides: `key=value` for every training, to rehearse.
        test_images: attacked.
        layers, rounds, batch: of the step benchmark.
        device: auto, cpu or cuda.
        save_s: seconds between two saved states of a training.
    """

    work: str
    overrides: tuple[str, ...] = ()
    test_images: int = 1000
    layers: tuple[int, ...] = tuple(range(1, 21))
    rounds: int = 5
    batch: int = 128
    device: str = "auto"
    save_s: float = 5.0

    @property
    def images(self) -> Path:
        """The folder with `train/` and `test/`."""
        return Path(self.work) / "images"

    def run(self, name: str) -> Path:
        """Return the run directory of a training."""
        return Path(self.work) / "runs" / name

    def found(self, name: str) -> Path:
        """Return where a job of another kind leaves what it found."""
        return Path(self.work) / "found" / f"{name}.json"

    def done(self, job: Job) -> bool:
        """Return whether nothing is left of a job here."""
        if job.kind == "train":
            return (self.run(job.name) / "checkpoint.json").is_file()
        return bool(self.finding(job.name).get("done"))

    def finding(self, name: str) -> dict[str, Any]:
        """Return what a job has found so far."""
        path = self.found(name)
        found: dict[str, Any] = json.loads(path.read_bytes()) if path.is_file() else {}
        return found

    def find(self, name: str, found: Mapping[str, Any]) -> None:
        """Write down what a job has found so far."""
        write_atomic(self.found(name), pretty_json(dict(found)))

    def config(self, job: Job) -> Config:
        """Return a training's settings: those of the recipe, on a folder of images.

        The folder is left out of them: a run goes on on another machine.
        """
        settings = {"data.name": "imagefolder", **job.settings, **parse_settings(self.overrides)}
        config = load_recipe(job.recipe, settings)
        if not job.surrogate:
            return config
        from verification.surrogates import surrogate_config

        found = surrogate_config(config, job.surrogate)
        assert found is not None
        return found

    def data(self, config: Config, test_limit: int = 0) -> Data:
        """Return where a training's images are here."""
        return replace(config.data, path=str(self.images), test_limit=test_limit)

    def write(self) -> None:
        """Leave the plan for the processes that do the jobs."""
        write_atomic(Path(self.work) / "plan.json", pretty_json(asdict(self)))

    @classmethod
    def read(cls, work: Path) -> Plan:
        """Read what `write` left."""
        table = json.loads((work / "plan.json").read_bytes())
        lists = {key: tuple(table[key]) for key in ("overrides", "layers")}
        return cls(**{**table, **lists})


def job_named(name: str) -> Job:
    """Return the job of that name."""
    return next(job for job in JOBS if job.name == name)
