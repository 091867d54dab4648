"""What came out so far, as one small JSON, from what lies in the work folder."""

from __future__ import annotations

import json
from typing import Any

from benchmarks.bench import bar
from benchmarks.gpu.jobs import JOBS, Job, Plan

SCHEMA_VERSION = 1
TRIES = 2  # a job that failed so often is given up
STAGE_TWO_EPOCHS, STAGE_TWO_BAR_MIN = 200, 20.0
Table = dict[str, Any]


def empty() -> Table:
    """Return the results before the first chunk."""
    return {"schema_version": SCHEMA_VERSION, "done": False, "jobs": {}, "chunks": []}


def update(results: Table, plan: Plan) -> None:
    """Bring the jobs' entries up to date; those whose files did not travel stay as they were."""
    for job in JOBS:
        entry = results["jobs"].setdefault(job.name, {"done": False, "failures": []})
        if entry["done"]:
            continue
        found = _training(plan, job) if job.kind == "train" else plan.finding(job.name)
        if found:
            entry["found"] = found
        entry["done"] = plan.done(job)
    results["done"] = all(over(results, job) for job in JOBS)
    results["bars"] = bars(results)
    results["carry"] = carried(results)


def over(results: Table, job: Job) -> bool:
    """Return whether nothing will be done about a job any more."""
    entry = results["jobs"].get(job.name, {"done": False, "failures": []})
    if entry["done"] or len(entry["failures"]) >= TRIES:
        return True
    needed = [each for each in JOBS if each.name in job.needs]
    return any(over(results, each) and not finished(results, each.name) for each in needed)


def finished(results: Table, name: str) -> bool:
    """Return whether a job came to its end."""
    return bool(results["jobs"].get(name, {}).get("done"))


def carried(results: Table) -> list[str]:
    """Return the runs that a next chunk still needs: begun and not over, or to be attacked."""
    left = [job for job in JOBS if not over(results, job)]
    wanted = {name for job in left for name in job.needs}
    wanted |= {job.name for job in left if job.kind == "train"}
    begun = [job.name for job in JOBS if "found" in results["jobs"].get(job.name, {})]
    return [name for name in begun if name in wanted]


def _training(plan: Plan, job: Job) -> Table:
    """Return a run's epochs, stage by stage, with the seconds they took over all chunks."""
    run = plan.run(job.name)
    try:
        config = json.loads((run / "config.json").read_bytes())
        lines = (run / "metrics.jsonl").read_bytes().splitlines()
    except FileNotFoundError:
        return {}
    path = run / "checkpoint.json"
    checkpoint = json.loads(path.read_bytes()) if path.is_file() else {}
    count = checkpoint.get("train_images")
    epochs = [json.loads(line) for line in lines if line.endswith(b"}")]
    stages = {
        name: {
            "epochs": len(own),
            "of": config[name]["epochs"],
            "images_per_s": [epoch["images_per_s"] for epoch in own],
            "losses": [[round(loss, 4) for loss in epoch["losses"]] for epoch in own],
            "holdout_accuracy": [round(epoch["holdout_accuracy"], 4) for epoch in own],
            "diversity": [epoch["diversity"] for epoch in own if "diversity" in epoch][-1:],
            "seconds": count and round(sum(count / each["images_per_s"] for each in own), 1),
        }
        for name in dict.fromkeys(epoch["stage"] for epoch in epochs)
        if (own := [epoch for epoch in epochs if epoch["stage"] == name])
    }
    return {"recipe": job.recipe, "config": config, "stages": stages, "checkpoint": checkpoint}


def bars(results: Table) -> list[Table]:
    """Return the bars: of the step benchmark, and of the exact recipe's second stage."""
    jobs = results["jobs"]
    found: list[Table] = list(jobs.get("steps", {}).get("found", {}).get("bars", []))
    stage = jobs.get("exact", {}).get("found", {}).get("stages", {}).get("dverge", {})
    gpu = any("gpu" in chunk.get("machine", {}) for chunk in results["chunks"])
    if gpu and jobs["exact"]["done"] and stage.get("epochs") == STAGE_TWO_EPOCHS:
        name = f"stage two of the exact recipe, {stage['epochs']} epochs"
        spent = stage["seconds"] / 60
        found.append(bar(name, spent, "minutes", STAGE_TWO_BAR_MIN, at_most=True))
    return found
