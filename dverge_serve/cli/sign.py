"""The commands for signatures: sign, verify-signature."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from dverge_serve.cli import app
from dverge_serve.errors import UserError

Signed = Annotated[
    Path, typer.Argument(help="A model file, or a folder.", metavar="MODEL.onnx|FOLDER")
]
MOST_NAMES = 10
PASSWORD = "DVERGE_KEY_PASSWORD"  # noqa: S105 - the variable's name


@app.command(epilog="Example: dverge sign model.onnx --key signer.pem")
def sign(
    path: Signed = Path("model.onnx"),
    key: Annotated[
        Path | None,
        typer.Option(
            help="The signer's private key, PEM (P-256, P-384, P-521); if it is encrypted, "
            f"{PASSWORD} has its password."
        ),
    ] = None,
    certificate: Annotated[
        Path | None, typer.Option(help="The signer's certificate of that key, PEM.")
    ] = None,
    chain: Annotated[
        list[Path] | None,
        typer.Option(help="A certificate between the signer's and the root's, PEM; repeatable."),
    ] = None,
    sigstore: Annotated[
        bool,
        typer.Option(
            help="Sign by Sigstore: the identity of a CI job or a browser; needs network."
        ),
    ] = False,
) -> None:
    """Sign a model, or everything in a folder.

    A model is signed with its report, provenance and other files. The signature is model.sig
    beside model.onnx, in the format of OpenSSF Model Signing.
    """
    if sigstore == (key is not None):
        raise UserError(
            "no method to sign by" if not sigstore else "--key with --sigstore",
            "one of --key and --sigstore",
        )
    if key is None and (certificate or chain):
        raise UserError("--certificate or --chain without --key", "the certificate's key")
    from dverge_serve.engine import signature

    password = os.environ.get(PASSWORD, "")
    done = signature.sign(
        path, key=key, password=password, certificate=certificate, chain=tuple(chain or ())
    )
    typer.echo(f"wrote {done}, which covers {_told(each.name for each in signature.covered(path))}")


@app.command("verify-signature", epilog="Example: dverge verify-signature --public-key signer.pub")
def verify_signature(
    path: Signed = Path("model.onnx"),
    public_key: Annotated[Path | None, typer.Option(help="The signer's public key, PEM.")] = None,
    certificate: Annotated[
        Path | None,
        typer.Option(help="Root (and intermediate) certificates, PEM; with --identity."),
    ] = None,
    identity: Annotated[
        str, typer.Option(help="The signer's name in its certificate: an e-mail, a URI.")
    ] = "",
    issuer: Annotated[
        str,
        typer.Option(help="For Sigstore: who vouched for --identity, an OpenID Connect issuer."),
    ] = "",
) -> None:
    """Check that a model or a folder is as it was signed.

    A model is checked with its report, provenance and other files. Exit code 2, and a line that
    names the file, if one was changed, added or removed.
    """
    from dverge_serve.engine.signature import verify
    from dverge_serve.engine.trust import Trust

    trust = Trust(public_key=public_key, certificate=certificate, identity=identity, issuer=issuer)
    typer.echo(f"signed: {_told(sorted(verify(path, trust)))}")


def _told(files: Iterable[str]) -> str:
    """Return the names of a few files, or how many there are."""
    names = list(files)
    return ", ".join(names) if len(names) <= MOST_NAMES else f"{len(names)} files"
