"""Signatures of model files in the format of OpenSSF Model Signing (OMS), by its Python package.

A signature is the file `model.sig` beside `model.onnx`. It lists the SHA-256 of the model and of
what belongs to it: report, provenance, bill of materials and model card. None of them can be
changed, left out, added or exchanged without a new signature. The evidence in `model.report/` is
covered through the report, which has its hashes.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import tempfile
from pathlib import Path, PurePosixPath
from typing import Any

from dverge_serve.engine.pem import check_certificates, check_private_key
from dverge_serve.engine.trust import Trust
from dverge_serve.errors import UserError, brief
from dverge_serve.files import atomic_path

SUFFIX = ".sig"
# Of what belongs to `model.onnx`, beside itself.
PARTS = (".report.json", ".report.html", ".provenance.json", ".cdx.json", ".md")
SIGNED = "a signature written by `dverge sign`"


def signature_path(path: Path) -> Path:
    """Return where the signature is: `model.sig` for `model.onnx`, and in a folder `model.sig`."""
    return path / f"model{SUFFIX}" if path.is_dir() else path.with_suffix(SUFFIX)


def covered(path: Path) -> list[Path]:
    """Return the files that a signature covers.

    Args:
        path: a model file: it and what belongs to it; or a folder: everything in it.

    Raises:
        UserError: there is no such file or folder.
    """
    if path.is_dir():
        found = sorted(each for each in path.rglob("*") if not each.is_dir())
        return [each for each in found if each != signature_path(path)]
    if not path.is_file():
        raise UserError(f"no model at {path}", "a model file, or a folder that holds one")
    parts = (path.with_suffix(suffix) for suffix in PARTS)
    return [path, *(part for part in parts if part.exists())]


def sign(
    path: Path,
    *,
    key: Path | None = None,
    password: str = "",
    certificate: Path | None = None,
    chain: tuple[Path, ...] = (),
) -> Path:
    """Sign a model with what belongs to it, or a folder; return the signature's path.

    Args:
        path: the model file or the folder.
        key: PEM file of an elliptic-curve private key (P-256, P-384 or P-521). Without it, by
            Sigstore, with the identity of the CI job or of a person at a browser.
        password: of the key, if it is encrypted, which it cannot be beside a certificate.
        certificate: PEM file of the signer's certificate, of the same key.
        chain: PEM files of the certificates between the signer's and the root.

    Raises:
        UserError: no such file, a key or certificate that cannot be used, or no Sigstore.
    """
    files = covered(path)
    _require()
    if key is not None:
        check_private_key(key, password if certificate is None else None)
    for each in (*([certificate] if certificate else ()), *chain):
        check_certificates(each)
    from model_signing import signing

    config = signing.Config().set_hashing_config(_hashing(_root(path), files))
    try:
        if key is None:
            config.use_sigstore_signer(use_ambient_credentials=True)
        elif certificate is None:
            # The package declares str and hands it to a function that takes bytes.
            secret: Any = password.encode() or None
            config.use_elliptic_key_signer(private_key=key, password=secret)
        else:
            config.use_certificate_signer(
                private_key=key,
                signing_certificate=certificate,
                certificate_chain=chain or [certificate],
            )
        with atomic_path(signature_path(path)) as part:
            config.sign(_root(path), part)
    except UserError:
        raise
    except Exception as error:  # of files, keys, certificates, or Sigstore's services
        raise UserError(f"cannot sign {path} ({brief(error)})", "a key that can be used") from error
    return signature_path(path)


def verify(path: Path, trust: Trust) -> dict[str, str]:
    """Check the signature of a model with what belongs to it, or of a folder.

    Whatever else the signature lists is checked as well, for models in a folder that was signed.

    Args:
        path: the model file or the folder.
        trust: whose signature counts.

    Returns:
        the SHA-256 of every covered file, by its name relative to the folder.

    Raises:
        UserError: there is no signature, it is somebody else's, or a file was changed, added or
            removed since; the error names the file.
    """
    files, root, signature = covered(path), _root(path), signature_path(path)
    _require()
    trust.check_files()
    from model_signing import verifying

    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, signature.name)  # read once: nobody can exchange it between two looks
        try:
            copy.write_bytes(signature.read_bytes())
        except FileNotFoundError as error:
            beside = f"{signature.name} beside it"
            raise UserError(f"{path} is not signed", beside, "run `dverge sign`") from error
        except OSError as error:
            raise UserError(f"cannot read {signature} ({error.strerror})", SIGNED) from error
        listed = _listed(copy, signature)
        others = (root / name for name in listed)
        files += [other for other in others if other not in files and other.is_file()]
        hashing_config = _hashing(root, files)
        try:
            config = verifying.Config().set_hashing_config(hashing_config)
            with contextlib.redirect_stdout(io.StringIO()):  # the package prints warnings
                trust.configure(config)
                config.verify(root, copy)
        except UserError:
            raise
        except Exception as error:
            # The package hashes the files only once it knows that the signature is the signer's.
            if hashing_config.found:
                raise _difference(root, listed, hashing_config.found) from error
            raise UserError(
                f"{signature} is not a valid signature by the trusted signer ({brief(error)})",
                next_step="have the model signed by whom you trust",
            ) from error
        trust.check_identity(copy.read_bytes(), signature)
    found: dict[str, str] = hashing_config.found
    return found


def _root(path: Path) -> Path:
    """Return the folder that names in a signature are relative to."""
    return path if path.is_dir() else path.parent


def _hashing(root: Path, files: list[Path]) -> Any:
    """Return the package's configuration for hashing these files and no others."""
    from model_signing import hashing

    class Files(hashing.Config):  # type: ignore[misc]
        found: dict[str, str]

        def hash(self, model_path: Any, *, files_to_hash: Any = None) -> Any:
            try:
                manifest = super().hash(root, files_to_hash=files)
            except ValueError as error:  # a link, or a special file
                raise UserError(f"{root} cannot be hashed ({brief(error)})") from error
            rows = manifest.resource_descriptors()
            self.found = {row.identifier: row.digest.digest_hex for row in rows}
            return manifest

    config = Files().set_ignored_paths(paths=(), ignore_git_paths=False)
    config.found = {}
    return config


def _listed(copy: Path, signature: Path) -> dict[str, str]:
    """Return the names and hashes in the copy of a signature, which is not checked yet."""
    try:
        payload = json.loads(copy.read_bytes())["dsseEnvelope"]["payload"]
        rows = json.loads(base64.b64decode(payload))["predicate"]["resources"]
        found = {str(row["name"]): str(row["digest"]) for row in rows}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"cannot read {signature} ({type(error).__name__})", SIGNED) from error
    for name in found:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise UserError(f"{signature} lists {name}", "files in its own folder")
    return found


def _difference(root: Path, listed: dict[str, str], actual: dict[str, str]) -> UserError:
    """Return the error that names the first file which is not as it was signed."""
    again = "restore what was signed, or sign again"
    for name in sorted(listed.keys() | actual.keys()):
        if name not in actual:
            return UserError(
                f"{root / name} was signed and is not there", "all signed files", again
            )
        if name not in listed:
            return UserError(
                f"{root / name} is not signed", "no file beside the signed ones", again
            )
        if actual[name] != listed[name]:
            return UserError(f"{root / name} is not the file that was signed", next_step=again)
    raise AssertionError("the package found a difference, and there is none")


def _require() -> None:
    """Refuse to go on without the package.

    Raises:
        UserError: it is not installed.
    """
    try:
        import model_signing  # noqa: F401 - most of its work is done at import
    except ModuleNotFoundError as error:
        raise UserError(
            f"no {error.name}, which signatures of models need",
            "OpenSSF Model Signing",
            "pip install 'dverge-serve[sign]'",
        ) from error
