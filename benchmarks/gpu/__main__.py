"""The command line of `benchmarks.gpu`."""

from __future__ import annotations

import argparse

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
    verbs.add_parser("steps", help="one step at every layer", parents=[steps.parser()])
    options = parser.parse_args()
    if options.verb == "steps":
        steps.main(options)
        return
    known = {check.__name__: check for check in CHECKS}
    for name in options.checks:
        if name not in known:
            parser.error(f"unknown check {name}; known: {', '.join(known)}")
    wanted = [known[name] for name in options.checks or known]
    raise SystemExit(0 if smoke.run(wanted, torch.device(options.device)) else 1)


if __name__ == "__main__":
    main()
