"""A Bento: this package and one model with what belongs to it, as BentoML ships services."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

from dverge_serve.engine.provenance import provenance_path, read_provenance
from dverge_serve.engine.report import read_report
from dverge_serve.engine.session import Engine
from dverge_serve.engine.signature import PARTS, SUFFIX, signature_path
from dverge_serve.errors import UserError
from dverge_serve.files import sha256 as file_sha256
from dverge_serve.files import write_atomic
from dverge_serve.serving.launch import SERVICE

PACKAGE = Path(__file__).parents[1]
MODEL = "model.onnx"
REPORTS = (".report.json", ".report.html")
BESIDE = tuple(f"model{suffix}" for suffix in (*PARTS, SUFFIX))
REQUIREMENTS = "requirements.txt"
CONTAINER = "Dockerfile"
# `bentoml containerize` works too, but the image that it makes is never asked whether it is ready.
DOCKERFILE = """# docker build --tag dverge .    (in this folder; no BentoML needed)
FROM python:{python}-slim
COPY requirements.txt /tmp/
RUN pip install --no-cache-dir -r /tmp/requirements.txt && useradd --uid 10001 dverge
COPY . /bento
USER 10001
WORKDIR /bento
# CONTAINERIZED: listen on every address, as containers must. BentoML's own notes go to /tmp.
ENV BENTOML_CONTAINERIZED=true BENTOML_HOME=/tmp/bentoml PYTHONDONTWRITEBYTECODE=1
EXPOSE 3000
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s \\
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:3000/readyz')"]
CMD ["bentoml", "serve"]
"""


def write_bento(model: Path, out: Path) -> list[Path]:
    """Write the folder that a Bento is built from: `bentofile.yaml` and what it names.

    The package is copied from where it is installed, so no source tree is needed; the model is
    checked first. What belongs to it comes along, signature included; a report only if it is about
    this very file.

    Args:
        model: the model file.
        out: a folder that is not there, empty, was written by this, or holds the model alone.

    Returns:
        the files beside the package.

    Raises:
        UserError: the model cannot be served, `out` holds something else, or the model is signed
            under another name than the one it gets here.
    """
    with Engine(model, device="cpu") as engine:
        card, sha256 = engine.card, engine.sha256
    _check_folder(out)
    # Read before anything is written: the model may lie in this very folder.
    data = model.read_bytes()
    if file_sha256(data) != sha256:
        raise UserError(f"{model} changed while it was read", "a file that nobody writes to")
    signed = signature_path(model).is_file()
    if signed and model.name != MODEL:
        raise UserError(
            f"{model} is signed under this name", f"a file called {MODEL}", "rename it and sign it"
        )
    about = read_report(model, sha256) is not None
    if signed and not about and any(model.with_suffix(each).exists() for each in REPORTS):
        raise UserError(
            f"{model} is signed with the report of another file",
            "its own report",
            "verify it and sign it again",
        )
    suffixes = (*(PARTS if about else PARTS[len(REPORTS) :]), SUFFIX)
    sources = {f"model{suffix}": model.with_suffix(suffix) for suffix in suffixes}
    beside = {name: path.read_bytes() for name, path in sources.items() if path.is_file()}
    if not signed and read_provenance(model, sha256) is None:  # it is about another file
        beside.pop(provenance_path(out / MODEL).name, None)
    written = [out / "bentofile.yaml", out / MODEL, out / REQUIREMENTS, out / CONTAINER]
    write_atomic(out / MODEL, data)
    write_atomic(out / REQUIREMENTS, "".join(f"{each}\n" for each in requirements(signed)).encode())
    python = ".".join(str(part) for part in sys.version_info[:2])
    write_atomic(out / CONTAINER, DOCKERFILE.format(python=python).encode())
    for name in BESIDE:
        if name in beside:
            write_atomic(out / name, beside[name])
            written.append(out / name)
        else:
            (out / name).unlink(missing_ok=True)
    package = out / PACKAGE.name
    shutil.rmtree(package, ignore_errors=True)
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    # JSON is YAML; no quoting rules of our own.
    name = re.sub(r"[^a-z0-9._-]+", "-", card.name.lower()).strip("-._")[:60] or "dverge"
    file = {
        "service": SERVICE,
        "name": name,
        "description": f"{card.name}: {card.members} members, {card.precision}, sha256 {sha256}",
        "include": [f"{PACKAGE.name}/**", *(path.name for path in written)],
        # Locking asks the network, and would pin what the host has already.
        "python": {"requirements_txt": REQUIREMENTS, "lock_packages": False},
    }
    write_atomic(written[0], (json.dumps(file, indent=2) + "\n").encode())
    return written


def build(folder: Path) -> str:
    """Build the Bento in BentoML's store and return its tag. Needs no network.

    Raises:
        UserError: BentoML refuses; the error has its last line.
    """
    command = [sys.executable, "-m", "bentoml", "build", "--output", "tag", str(folder)]
    environment = {**os.environ, "BENTOML_DO_NOT_TRACK": "True", "PYTHONPATH": str(folder)}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    tag = re.search(r"__tag__:(\S+)", done.stdout)
    if done.returncode or not tag:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["it said nothing"]
        raise UserError(f"`bentoml build` failed ({lines[-1][:200]})", "a folder it can build")
    return tag[1]


def requirements(signed: bool = False) -> list[str]:
    """Return what the package needs at run time, as its own metadata says.

    Args:
        signed: with what checks the model's signature.

    Raises:
        UserError: the package is neither installed nor in a source tree.
    """
    try:
        declared = [each.partition(";") for each in metadata.requires("dverge-serve") or []]
        return [
            name if "extra ==" in marker else f"{name}{semicolon}{marker}"
            for name, semicolon, marker in declared
            if "extra ==" not in marker
            or (signed and re.search("""extra == ['"]sign['"]$""", marker))
        ]
    except metadata.PackageNotFoundError:
        pass
    try:  # a source tree that was never installed
        table = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))
        project = table["project"]
        extra = project["optional-dependencies"]["sign"] if signed else []
        return [*project["dependencies"], *extra]
    except (OSError, KeyError) as error:
        raise UserError(
            "dverge-serve is not installed", "an installed package", "pip install dverge-serve"
        ) from error


def _check_folder(out: Path) -> None:
    """Refuse a folder with files of others, which would be overwritten or packed."""
    models = {MODEL, *BESIDE}
    packed = models | {"bentofile.yaml", REQUIREMENTS, CONTAINER, PACKAGE.name}
    found = {path.name for path in out.iterdir()} if out.is_dir() else set()
    file = out / "bentofile.yaml"
    written = file.is_file() and json.dumps(SERVICE) in file.read_text()
    if (out.exists() and not out.is_dir()) or not found <= (packed if written else models):
        raise UserError(
            f"{out} holds something else", "a new or empty folder", "give another `out`"
        )
