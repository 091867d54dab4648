"""Whose signature of a model counts: a key, an authority's certificate, or Sigstore."""

from __future__ import annotations

import base64
import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dverge_serve.engine.pem import check_certificates, check_public_key
from dverge_serve.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Trust:
    """Whose signature counts. Only Sigstore needs the network.

    Args:
        public_key: PEM file of the signer's elliptic-curve key.
        certificate: PEM file with the root certificates, and intermediate ones, of an authority;
            with `identity`.
        identity: who signed: a name in the signer's certificate (e-mail, URI, DNS name or common
            name).
        issuer: OpenID Connect issuer that vouched for `identity`, for Sigstore's signatures.

    Raises:
        UserError: not one of the three ways to name a signer, or no such file.
    """

    public_key: Path | None = None
    certificate: Path | None = None
    identity: str = ""
    issuer: str = ""

    def __post_init__(self) -> None:
        given = tuple(
            bool(each) for each in (self.public_key, self.certificate, self.identity, self.issuer)
        )
        ways = {(1, 0, 0, 0), (0, 1, 1, 0), (0, 0, 1, 1)}
        if given not in ways:
            names = ("public_key", "certificate", "identity", "issuer")
            found = " and ".join(f"`{n}`" for n, there in zip(names, given, strict=True) if there)
            raise UserError(
                f"{found or 'no name'} for the signer of a model",
                "`public_key`, or `certificate` and `identity`, or `identity` and `issuer`",
            )
        for path in (self.public_key, self.certificate):
            if path is not None and not path.is_file():
                raise UserError(f"no file {path}", "PEM of the signer's key or of its authority")

    @property
    def told(self) -> str:
        """Whose signature counts, for people."""
        if self.public_key is not None:
            return f"the key in {self.public_key.name}"
        by = self.issuer if self.certificate is None else self.certificate.name
        return f"{self.identity}, for whom {by} vouches"

    def check_files(self) -> None:
        """Refuse a file that holds no public key or no certificate.

        Raises:
            UserError: the file cannot be read, or holds something else.
        """
        if self.public_key is not None:
            check_public_key(self.public_key)
        if self.certificate is not None:
            check_certificates(self.certificate)

    def configure(self, config: Any) -> None:
        """Tell the package's `verifying.Config` how to check a signature."""
        if self.public_key is not None:
            config.use_elliptic_key_verifier(public_key=self.public_key)
        elif self.certificate is not None:
            config.use_certificate_verifier(certificate_chain=[self.certificate])
        else:
            config.use_sigstore_verifier(identity=self.identity, oidc_issuer=self.issuer)

    def check_identity(self, bundle: bytes, signature: Path) -> None:
        """Refuse a signer whose certificate has another name; its chain was checked before.

        The package does this for Sigstore alone.

        Args:
            bundle: the content of the signature.
            signature: its path, for the error.

        Raises:
            UserError: somebody else's certificate.
        """
        if self.certificate is None:
            return
        from cryptography import x509

        chain = json.loads(bundle)["verificationMaterial"]["x509CertificateChain"]
        raw = base64.b64decode(chain["certificates"][0]["rawBytes"])
        names = set(_names(x509.load_der_x509_certificate(raw)))
        if self.identity not in names:
            raise UserError(
                f"{signature} was signed by {', '.join(sorted(names)) or 'nobody named'}",
                f"a signature by {self.identity}",
            )


def _names(certificate: Any) -> Iterator[str]:
    """Yield the names in a certificate: common name, e-mail, URI, DNS name."""
    from cryptography import x509

    for attribute in certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME):
        yield str(attribute.value)
    with contextlib.suppress(x509.ExtensionNotFound):
        extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        for kind in (x509.RFC822Name, x509.UniformResourceIdentifier, x509.DNSName):
            yield from map(str, extension.value.get_values_for_type(kind))
