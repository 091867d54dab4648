"""PEM files that are given for signatures: each is looked at before a signature is made or judged.

Needs the package `cryptography`, which comes with that for signatures.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dverge_serve.errors import UserError

CURVES = {"secp256r1", "secp384r1", "secp521r1"}
EXPECTED = "an elliptic-curve one (P-256, P-384 or P-521) as a PEM file"


def check_private_key(path: Path, password: str | None) -> None:
    """Refuse a file that holds no private key to sign with.

    Args:
        path: the file.
        password: of the key, if it is encrypted; None if it must not be, as beside a certificate.

    Raises:
        UserError: it cannot be read, or is no such key, or the password does not fit.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    data = _read(path)
    try:
        key = load_pem_private_key(data, (password or "").encode() or None)
    except TypeError as error:  # one of key and password is without the other
        if password:
            raise UserError(f"`password` is set, and {path} is not encrypted", "none") from error
        plain = "beside `certificate` one that is not encrypted"
        expected = plain if password is None else "its password in `password`"
        raise UserError(f"{path} is an encrypted key", expected) from error
    except (ValueError, UnsupportedAlgorithm) as error:
        wrong = f"{path} is no private key" + (" that `password` decrypts" if password else "")
        raise UserError(wrong, EXPECTED) from error
    _check_curve(path, key, "private key")


def check_public_key(path: Path) -> None:
    """Refuse a file that holds no public key.

    Raises:
        UserError: it cannot be read, or is no such key.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    data = _read(path)
    try:
        key = load_pem_public_key(data)
    except (ValueError, UnsupportedAlgorithm) as error:
        step = "write it from the private key with `openssl ec -in signer.pem -pubout`"
        raise UserError(f"{path} is no public key", EXPECTED, step) from error
    _check_curve(path, key, "public key")


def check_certificates(path: Path) -> None:
    """Refuse a file that holds no certificate.

    Raises:
        UserError: it cannot be read, or one of its certificates cannot.
    """
    from cryptography import x509

    data = _read(path)
    try:
        x509.load_pem_x509_certificates(data)
    except ValueError as error:
        raise UserError(f"{path} is no certificate", "one as a PEM file (X.509)") from error


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror})", "a PEM file") from error


def _check_curve(path: Path, key: Any, what: str) -> None:
    """Refuse a key of another kind, e.g. RSA, or of another curve."""
    curve = getattr(getattr(key, "curve", None), "name", None)
    if curve not in CURVES:
        kind = f"of the curve {curve}" if curve else "of another kind"
        raise UserError(f"{path} is a {what} {kind}", EXPECTED)
