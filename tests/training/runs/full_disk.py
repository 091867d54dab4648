"""Trains on a disk of its own that is too small, then on one that is not: `unshare -rm python ...`.

Prints three lines of JSON: the error, what is left beside it, and the run's sha256 once there is
room.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch

from dverge_serve.errors import UserError
from tests.training.networks import tiny_config
from training.runs.directory import Run
from training.trainer import train

WIDTH = 16  # three files of the members need 630 kB each
CPU = torch.device("cpu")


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    mount = ["mount", "-t", "tmpfs", "-o", "size=1600k", "tmpfs", str(folder)]
    if subprocess.run(mount, stderr=subprocess.DEVNULL).returncode:
        sys.exit(77)
    out, config = folder / "run", tiny_config(width=WIDTH)
    try:
        train(config, out, device=CPU)
    except UserError as error:
        print(json.dumps({"exit_code": error.exit_code, "said": str(error)}))
    state = Run(out).load_state()
    stage = state and state[0]
    print(json.dumps({"stage": stage, "files": sorted(path.name for path in out.iterdir())}))
    subprocess.run(["mount", "-o", "remount,size=20m", str(folder)], check=True)
    print(json.dumps(train(config, out, device=CPU, resume=True).weights_sha256))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
