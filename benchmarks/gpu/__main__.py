"""The command line of `benchmarks.gpu`; what each verb does stands in the package's own words."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from benchmarks import gpu
from dverge_serve.errors import UserError
from dverge_serve.progress import show

FOLDER = "dverge-gpu"  # under --work: its runs are replaced by those of --state


def main() -> None:
    """Run a verb; a user's mistake is one line and exit code 2."""
    show()
    options = _parser().parse_args()
    try:
        options.run(options)
    except UserError as error:
        print(error, file=sys.stderr)
        raise SystemExit(error.exit_code) from None


def _pack(options: argparse.Namespace) -> None:
    from benchmarks.gpu import images

    print(f"{options.file}: {images.pack(options.folder, options.file) / 1e6:.1f} MB")


def _run(options: argparse.Namespace) -> None:
    from benchmarks.gpu.chunk import Chunk, said
    from benchmarks.gpu.jobs import Plan

    plan = Plan(
        work=str(options.work.resolve() / FOLDER),
        overrides=tuple(options.set),
        test_images=options.test_images,
        layers=tuple(int(layer) for layer in options.layers.split(",")),
        rounds=options.rounds,
        batch=options.batch,
        device=options.device,
        save_s=options.save_seconds,
    )
    chunk = Chunk(plan, options.state, options.out, options.only, options.keep_seconds)
    print(said(chunk.run(options.images, options.minutes)))


def _job(options: argparse.Namespace) -> None:
    from benchmarks.gpu import work

    work.do(options.name, options.work)


def _collect(options: argparse.Namespace) -> None:
    from benchmarks.gpu.collect import collect

    for path in collect(options.state, options.results, options.runs):
        print(path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=gpu.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    pack = verbs.add_parser("pack", help="make one file of a folder of images")
    pack.add_argument("folder", type=Path, help="with train/<class>/ and test/<class>/")
    pack.add_argument("file", type=Path)
    pack.set_defaults(run=_pack)

    run = verbs.add_parser("run", help="one chunk")
    run.add_argument("--images", type=Path, required=True, help="a file that `pack` wrote")
    run.add_argument("--state", type=Path, help="what the chunk before returned")
    run.add_argument("--out", type=Path, required=True, help="what this one returns")
    run.add_argument("--minutes", type=float, default=9.0)
    run.add_argument("--only", nargs="*", default=[], metavar="JOB")
    run.add_argument("--device", default="auto")
    run.add_argument("--test-images", type=int, default=1000, help="attacked")
    run.add_argument("--layers", default=",".join(map(str, range(1, 21))), help="of the steps")
    run.add_argument("--rounds", type=int, default=5, help="steps timed at each layer")
    run.add_argument("--batch", type=int, default=128, help="of the steps")
    run.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    run.add_argument("--save-seconds", type=float, default=5.0, help="between saved states")
    run.add_argument("--keep-seconds", type=float, default=30.0, help="between looks at a job")
    run.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()))
    run.set_defaults(run=_run)

    job = verbs.add_parser("job", help="one job of a chunk; `run` starts it")
    job.add_argument("name")
    job.add_argument("--work", type=Path, required=True)
    job.set_defaults(run=_job)

    collect = verbs.add_parser("collect", help="keep the results, and the members in fp16")
    collect.add_argument("state", type=Path)
    collect.add_argument("results", type=Path)
    collect.add_argument("--runs", type=Path, help="whole run directories go here")
    collect.set_defaults(run=_collect)
    return parser


if __name__ == "__main__":
    main()
