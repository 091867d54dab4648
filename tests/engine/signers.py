"""Real keys and certificates, made for one test."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes

PASSWORD = "a password"
EMAIL = "release@example.org"


class Key(NamedTuple):
    """PEM files of a key pair, and the private key itself."""

    private: Path
    public: Path
    key: ec.EllipticCurvePrivateKey


def key(folder: Path, name: str = "signer", *, encrypted: bool = False) -> Key:
    made = ec.generate_private_key(ec.SECP256R1())
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    private.write_bytes(pem(made, encrypted=encrypted))
    public.write_bytes(
        made.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    return Key(private, public, made)


def pem(key: PrivateKeyTypes, *, encrypted: bool = False) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(PASSWORD.encode())
        if encrypted
        else serialization.NoEncryption(),
    )


def certificate(folder: Path, of: Key, name: str, by: Key, *, authority: bool = False) -> Path:
    """Write the certificate of a key by an authority's key: `by` is `of` for the authority."""
    now = datetime.datetime.now(datetime.UTC)
    issuer = "authority" if not authority else name
    made = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]))
        .issuer_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, issuer)]))
        .public_key(of.key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        .add_extension(
            x509.KeyUsage(
                digital_signature=True,
                key_cert_sign=authority,
                crl_sign=authority,
                content_commitment=False,
                key_encipherment=False,
                data_encipherment=False,
                key_agreement=False,
                encipher_only=False,
                decipher_only=False,
            ),
            critical=True,
        )
    )
    if not authority:
        names = x509.SubjectAlternativeName([x509.RFC822Name(EMAIL)])
        made = made.add_extension(names, critical=False)
    path = folder / f"{name}.crt"
    path.write_bytes(made.sign(by.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    return path
