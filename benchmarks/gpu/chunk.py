"""One chunk: the next jobs, each in a process of its own, until the time is up.

A job's process may be killed at any moment: trainings go on from their last saved state, the step
benchmark from its last row. So the time's end is a kill, and nothing in training knows of chunks.
"""

from __future__ import annotations

import importlib.util
import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.bench import say
from benchmarks.gpu import archive, images, results
from benchmarks.gpu.jobs import JOBS, Job, Plan
from benchmarks.gpu.results import Table
from benchmarks.gpu.work import REPOSITORY
from dverge_serve.errors import UserError
from dverge_serve.files import read_json, write_atomic

RESULTS = "results.json"
NEEDED = (
    *("torch", "torchvision", "safetensors", "rich", "scipy", "sklearn", "psutil", "PIL", "numpy"),
)
TAIL = 12  # lines of what a failed job said


class Chunk:
    """One chunk of work.

    Args:
        plan: what the jobs share.
        state: the folder that an earlier chunk left, or an empty one, or none.
        out: the folder to leave; may be the same.
        only: names of the jobs to do; empty for all.
        keep_s: seconds between two times that a job under way is kept.
    """

    def __init__(
        self,
        plan: Plan,
        state: Path | None,
        out: Path,
        only: Sequence[str] = (),
        keep_s: float = 30.0,
    ) -> None:
        self._plan, self._out, self._keep_s = plan, out, keep_s
        self._begun, self._kept = time.monotonic(), set[Path]()
        unknown = sorted(set(only) - {job.name for job in JOBS})
        if unknown:
            known = ", ".join(job.name for job in JOBS)
            raise UserError(f"unknown job '{unknown[0]}'", f"some of {known}")
        for left in ("runs", "found"):  # by an earlier chunk here, perhaps further than `state`
            shutil.rmtree(Path(plan.work) / left, ignore_errors=True)
        self._jobs = [job for job in JOBS if not only or job.name in only]
        self._results = self._read(state) if state else results.empty()
        self._record: Table = {"command": shlex.join(sys.argv), "worked_on": []}
        self._results["chunks"].append(self._record)

    def run(self, pack: Path, minutes: float) -> Table:
        """Do what can be done in `minutes` from the chunk's beginning; return the results."""
        missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
        if missing:
            raise UserError(
                f"no package {', '.join(missing)} here",
                next_step="carry it along as a wheel and put it on PYTHONPATH",
            )
        end = self._begun + 60 * minutes
        images.unpack(pack, self._plan.images)
        self._plan.write()
        for job in self._jobs:
            if self._ready(job) and time.monotonic() < end:
                self._do(job, end)
        self._keep()
        return self._results

    def _ready(self, job: Job) -> bool:
        done = all(
            self._plan.run(name).joinpath(archive.CHECKPOINT).is_file() for name in job.needs
        )
        return done and not results.over(self._results, job)

    def _do(self, job: Job, end: float) -> None:
        """Do one job, and keep what there is of it every now and then."""
        begun = time.monotonic()
        log = Path(self._plan.work) / "log" / f"{job.name}.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        say(f"{job.name}: {end - begun:.0f} s left")
        command = [sys.executable, "-m", "benchmarks.gpu", "job", job.name]
        with log.open("wb") as said:
            process = subprocess.Popen(
                [*command, "--work", self._plan.work],
                cwd=REPOSITORY,
                stdin=subprocess.PIPE,
                stdout=said,
                stderr=said,
            )
            code = self._wait(process, job, end)
        ended = {None: "out of time", 0: "done"}.get(code, "failed")
        lines = log.read_text(errors="replace").splitlines()[-TAIL:]
        worked = {"job": job.name, "ended": ended, "seconds": round(time.monotonic() - begun, 1)}
        self._record["worked_on"].append(worked)
        if code:
            entry = self._results["jobs"].setdefault(job.name, {"done": False, "failures": []})
            entry["failures"].append({"code": code, "said": lines})
        for line in lines[-3:] if code in (None, 0) else lines:
            say(f"{job.name}: {line}")
        self._keep()

    def _wait(self, process: subprocess.Popen[bytes], job: Job, end: float) -> int | None:
        """Return a job's exit code, or None where its time was up."""
        try:
            while (left := end - time.monotonic()) > 0:
                try:
                    return process.wait(min(left, self._keep_s))
                except subprocess.TimeoutExpired:
                    self._keep()
            return process.poll()
        finally:
            process.kill()
            process.wait()
            if process.stdin:
                process.stdin.close()

    def _keep(self) -> None:
        """Leave everything a next chunk needs, and the results so far."""
        self._out.mkdir(parents=True, exist_ok=True)
        machine = self._plan.finding("machine")
        self._record |= {"seconds": round(time.monotonic() - self._begun, 1), "machine": machine}
        results.update(self._results, self._plan)
        for job in JOBS:
            run = self._plan.run(job.name)
            if job.kind == "train" and (run / "config.json").is_file() and run not in self._kept:
                finished = (run / archive.CHECKPOINT).is_file()
                archive.keep(run, self._out / f"{job.name}.zip")
                self._kept |= {run} if finished else set()  # it will not change any more
        write_atomic(self._out / RESULTS, json.dumps(self._results).encode() + b"\n")

    def _read(self, state: Path) -> Table:
        """Bring back what an earlier chunk left.

        Raises:
            UserError: it is not what a chunk of this version leaves.
        """
        if not (state / RESULTS).is_file():
            if any(state.glob("*.zip")):
                raise UserError(f"no {RESULTS} in {state}", "all that the chunk before returned")
            return results.empty()
        found: dict[str, Any] = read_json(state / RESULTS, "a chunk's results")
        if found.get("schema_version") != results.SCHEMA_VERSION:
            raise UserError(
                f"{state / RESULTS} has version {found.get('schema_version')}",
                f"version {results.SCHEMA_VERSION}",
            )
        missing = [name for name in found["carry"] if not (state / f"{name}.zip").is_file()]
        if missing:
            raise UserError(f"no {missing[0]}.zip in {state}", "all files that results.json names")
        for job in JOBS:
            file = state / f"{job.name}.zip"
            if job.kind == "train" and file.is_file():
                archive.restore(file, self._plan.run(job.name))
            entry = found["jobs"].get(job.name, {})
            if job.kind in ("steps", "attack") and "found" in entry:
                self._plan.find(job.name, entry["found"])
        return found


def said(table: Table) -> str:
    """Return one line on how far the work is."""
    done = [job.name for job in JOBS if results.finished(table, job.name)]
    left = [job.name for job in JOBS if not results.over(table, job)]
    gone = [job.name for job in JOBS if job.name not in done and job.name not in left]
    text = f"done: {', '.join(done) or 'nothing yet'}"
    if gone:
        text += f"; given up: {', '.join(gone)}"
    if left:
        text += f"; more to do: {', '.join(left)}"
    return text + (f"; carry on: {json.dumps(table['carry'])}" if left else "")
