"""The copy of a model file, and of its report, that workers load."""

from __future__ import annotations

import shutil
from pathlib import Path

from dverge_serve.engine.report import report_path
from dverge_serve.engine.signature import verify
from dverge_serve.engine.trust import Trust
from dverge_serve.errors import UserError
from dverge_serve.files import sha256


def copy_model(model: Path, copy: Path, trust: Trust | None) -> None:
    """Copy a model and the report beside it, if there is one.

    Args:
        model: the file.
        copy: where to.
        trust: whose signature they must have; None if they need none. The bytes of the copy are
            compared with it, so that nobody can exchange a file in between.

    Raises:
        UserError: a file cannot be read or written, or is not signed by whom it must be.
    """
    signed = verify(model, trust) if trust else None
    try:
        report_path(copy).unlink(missing_ok=True)
        copies = {model: copy}
        if report_path(model).is_file():
            copies[report_path(model)] = report_path(copy)
        for source, made in copies.items():
            shutil.copyfile(source, made)
            if signed and sha256(made.read_bytes()) != signed.get(source.name):
                raise UserError(f"{source} changed after its signature was checked")
    except OSError as error:
        raise UserError(f"cannot copy {model} ({error.strerror or error})") from error
