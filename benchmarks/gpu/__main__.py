"""The command line of `benchmarks.gpu`."""

from __future__ import annotations

import argparse
import os

import torch

from benchmarks import gpu
from benchmarks.gpu import smoke, steps
from benchmarks.gpu.checks import CHECKS


def main() -> None:
    """Run a verb."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=gpu.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(required=True, dest="verb", metavar="VERB")
    smoking = verbs.add_parser("smoke", help="every CUDA path once")
    smoking.add_argument("device", nargs="?", choices=["cuda", "cpu"], default="cuda")
    smoking.add_argument("checks", nargs="*", metavar="CHECK", help="names; all by default")
    timing = [steps.parser()]
    verbs.add_parser("steps", help="one step at every layer", parents=timing, add_help=False)
    options = parser.parse_args()
    if options.verb == "steps":
        steps.main(options)
        return
    if options.device == "cpu":  # tiny tensors: more threads cost more than they give
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that checks start
        torch.set_num_threads(1)
    known = {check.__name__: check for check in CHECKS}
    for name in options.checks:
        if name not in known:
            parser.error(f"unknown check {name}; known: {', '.join(known)}")
    wanted = [known[name] for name in options.checks or known]
    raise SystemExit(0 if smoke.run(wanted, torch.device(options.device)) else 1)


if __name__ == "__main__":
    main()
