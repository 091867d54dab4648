"""`runs/latest`: a link to the newest run."""

from __future__ import annotations

from pathlib import Path

from dverge_serve.files import write_atomic


def name_latest(run: Path) -> None:
    """Let `runs/latest` name this run: a link, or a text file where links fail."""
    if run.parent.name != "runs":
        return
    latest = run.parent / "latest"
    if latest.is_dir() and not latest.is_symlink():
        return
    link = latest.with_name(".latest.part")
    try:
        link.unlink(missing_ok=True)
        link.symlink_to(run.name)
        link.replace(latest)
    except OSError:
        write_atomic(latest, run.name.encode())


def follow(path: str | Path) -> Path:
    """Return the run that `runs/latest` names, a link or a text file; other paths as they are."""
    path = Path(path)
    if path.is_symlink():
        return path.parent / path.readlink()
    if path.name == "latest" and path.is_file():
        return path.parent / path.read_text(encoding="utf-8").strip()
    return path
