"""Signatures by real keys: what they cover, and what each change of a file leads to."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes

from dverge_serve.cli import run
from dverge_serve.engine.signature import PARTS, covered, sign, verify
from dverge_serve.engine.trust import Trust
from dverge_serve.errors import UserError
from dverge_serve.files import sha256
from tests.cli.running import complains

pytest.importorskip("model_signing", reason="the extra `sign` is not installed")
from tests.engine import signers

ROOT = Path(__file__).parents[2]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model with all that can belong to it, beside files that do not."""
    folder = tmp_path / "model"
    folder.mkdir()
    for suffix in (".onnx", *PARTS):
        (folder / f"model{suffix}").write_text(f"content of {suffix}")
    (folder / "other.onnx").write_text("another model")
    return folder / "model.onnx"


@pytest.fixture
def signer(tmp_path: Path) -> signers.Key:
    return signers.key(tmp_path)


def by(signer: signers.Key) -> Trust:
    return Trust(public_key=signer.public)


def test_a_signature_covers_the_model_and_what_belongs_to_it(
    model: Path, signer: signers.Key
) -> None:
    assert sign(model, key=signer.private) == model.with_suffix(".sig")
    found = verify(model, by(signer))
    assert found == {path.name: sha256(path.read_bytes()) for path in covered(model)}
    assert set(found) == {"model.onnx", *(f"model{suffix}" for suffix in PARTS)}
    (model.parent / "other.onnx").write_text("a new version")  # no part of this model
    moved = model.parent.rename(model.parents[1] / "moved") / model.name
    assert verify(moved, by(signer)) == found


@pytest.mark.parametrize("suffix", [".onnx", *PARTS])
def test_one_flipped_byte_in_any_covered_file_is_found(
    suffix: str, model: Path, signer: signers.Key
) -> None:
    sign(model, key=signer.private)
    file = model.with_suffix(suffix)
    data = bytearray(file.read_bytes())
    data[3] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match=f"model{suffix} is not the file that was signed"):
        verify(model, by(signer))


@pytest.mark.parametrize("suffix", PARTS)
def test_a_part_added_or_removed_after_signing_is_found(
    suffix: str, model: Path, signer: signers.Key
) -> None:
    part = model.with_suffix(suffix)
    sign(model, key=signer.private)
    kept = part.read_bytes()
    part.unlink()
    with pytest.raises(UserError, match=f"model{suffix} was signed and is not there"):
        verify(model, by(signer))
    sign(model, key=signer.private)
    part.write_bytes(kept)
    with pytest.raises(UserError, match=f"model{suffix} is not signed"):
        verify(model, by(signer))


def test_the_report_of_another_signed_model_is_found(model: Path, signer: signers.Key) -> None:
    other = model.with_name("other.onnx")
    other.with_suffix(".report.json").write_text("a better report")
    for each in (model, other):
        sign(each, key=signer.private)
    assert verify(other, by(signer))
    model.with_suffix(".report.json").write_bytes(other.with_suffix(".report.json").read_bytes())
    with pytest.raises(UserError, match=r"model.report.json is not the file that was signed"):
        verify(model, by(signer))


def test_signatures_of_others_and_damaged_ones(
    model: Path, signer: signers.Key, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"is not signed; expected model.sig beside it"):
        verify(model, by(signer))
    other = signers.key(tmp_path, "other")
    signature = sign(model, key=other.private)
    with pytest.raises(UserError, match="is not a valid signature by the trusted signer"):
        verify(model, by(signer))
    bundle = json.loads(signature.read_bytes())
    sign(model, key=signer.private)
    good = json.loads(signature.read_bytes())
    # The signer's signature over the payload of somebody else.
    good["dsseEnvelope"]["payload"] = bundle["dsseEnvelope"]["payload"][:-8] + "AAAAAAA="
    signature.write_text(json.dumps(good))
    with pytest.raises(UserError, match=r"model\.sig"):
        verify(model, by(signer))
    for wrong in (b"", b"{}", b"[1]", b'{"dsseEnvelope": {"payload": "e30="}}'):
        signature.write_bytes(wrong)
        with pytest.raises(UserError, match=r"cannot read .*model\.sig"):
            verify(model, by(signer))


def test_a_signature_that_names_files_outside_is_refused(
    model: Path, signer: signers.Key, tmp_path: Path
) -> None:
    sign(tmp_path, key=signer.private)  # lists model/model.onnx and the key beside it
    payload = json.loads((tmp_path / "model.sig").read_bytes())
    statement = json.loads(base64.b64decode(payload["dsseEnvelope"]["payload"]))
    statement["predicate"]["resources"][0]["name"] = "../signer.pem"
    payload["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(statement).encode()).decode()
    model.with_suffix(".sig").write_text(json.dumps(payload))
    with pytest.raises(UserError, match=r"lists \.\./signer.pem; expected files in its own folder"):
        verify(model, by(signer))


def test_a_folder_is_signed_with_everything_in_it(model: Path, signer: signers.Key) -> None:
    folder, trust = model.parent, by(signer)
    (folder / "model.report").mkdir()
    evidence = folder / "model.report" / "curves.png"
    evidence.write_text("a picture")
    assert sign(folder, key=signer.private) == folder / "model.sig"
    found = verify(folder, trust)
    assert {"model.report/curves.png", "other.onnx"} < set(found)
    assert verify(model, trust) == found  # the service asks for the model
    extra = folder / "model.report" / "extra"
    extra.write_text("")
    with pytest.raises(UserError, match="extra is not signed"):
        verify(folder, trust)
    extra.unlink()
    evidence.write_text("another picture")
    for path in (folder, model):
        with pytest.raises(UserError, match=r"curves.png is not the file that was signed"):
            verify(path, trust)
    evidence.unlink()
    evidence.symlink_to(model)
    with pytest.raises(UserError, match="symlink"):
        verify(folder, trust)


def test_a_certificate_counts_with_its_authority_and_its_name(
    model: Path, signer: signers.Key, tmp_path: Path
) -> None:
    authority, stranger = signers.key(tmp_path, "ca"), signers.key(tmp_path, "stranger")
    root = signers.certificate(tmp_path, authority, "authority", authority, authority=True)
    own = signers.certificate(tmp_path, signer, "signer", authority)
    (tmp_path / "elsewhere").mkdir()
    false_root = signers.certificate(
        tmp_path / "elsewhere", stranger, "authority", stranger, authority=True
    )
    signature = sign(model, key=signer.private, certificate=own, chain=(root,))
    for name in (signers.EMAIL, "signer"):
        assert verify(model, Trust(certificate=root, identity=name))
    with pytest.raises(UserError, match=r"signed by release@example.org, signer; expected a sig"):
        verify(model, Trust(certificate=root, identity="somebody@example.org"))
    with pytest.raises(UserError, match="not a valid signature by the trusted signer"):
        verify(model, Trust(certificate=false_root, identity=signers.EMAIL))
    with pytest.raises(UserError, match="not a valid signature by the trusted signer"):
        verify(model, by(signer))  # of the other kind
    with pytest.raises(UserError, match="cannot sign"):
        sign(model, key=stranger.private, certificate=own)
    assert json.loads(signature.read_bytes())  # the old one stands


def test_sigstore_gets_the_identity_and_its_issuer(
    model: Path, signer: signers.Key, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its services are not reached from here: only what they are asked is seen."""
    from model_signing import signing, verifying

    sign(model, key=signer.private)
    asked: dict[str, object] = {}

    def stopped(_: object, **arguments: object) -> None:
        asked.update(arguments)
        raise RuntimeError("no network")

    monkeypatch.setattr(verifying.Config, "use_sigstore_verifier", stopped)
    monkeypatch.setattr(signing.Config, "use_sigstore_signer", stopped)
    with pytest.raises(UserError, match="no network"):
        verify(model, Trust(identity="me@example.org", issuer="https://issuer"))
    assert asked == {"identity": "me@example.org", "oidc_issuer": "https://issuer"}
    with pytest.raises(UserError, match=r"cannot sign .* .no network."):
        sign(model)
    assert asked["use_ambient_credentials"] is True


def test_an_encrypted_key(model: Path, tmp_path: Path) -> None:
    signer = signers.key(tmp_path, "locked", encrypted=True)
    sign(model, key=signer.private, password=signers.PASSWORD)
    assert verify(model, by(signer))


@pytest.mark.parametrize(
    ("name", "password", "words"),
    [
        ("locked.pem", "", "locked.pem is an encrypted key; expected its password in DVERGE_KEY_"),
        ("locked.pem", "wrong", "is no private key that DVERGE_KEY_PASSWORD decrypts"),
        ("signer.pem", "none", "DVERGE_KEY_PASSWORD is set, and "),
        ("signer.pub", "", "signer.pub is no private key; expected an elliptic-curve one (P-256"),
        ("rsa.pem", "", "rsa.pem is a private key of another kind; expected an elliptic-curve"),
        ("k1.pem", "", "of the curve secp256k1; expected an elliptic-curve one (P-256"),
        ("none.pem", "", "cannot read "),
    ],
)
def test_a_key_that_cannot_sign(
    name: str,
    password: str,
    words: str,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    signers.key(tmp_path)
    signers.key(tmp_path, "locked", encrypted=True)
    others: dict[str, PrivateKeyTypes] = {"rsa": rsa.generate_private_key(65537, 2048)}
    others["k1"] = ec.generate_private_key(ec.SECP256K1())
    for stem, key in others.items():
        (tmp_path / f"{stem}.pem").write_bytes(signers.pem(key))
    monkeypatch.setenv("DVERGE_KEY_PASSWORD", password)
    complains(capsys, ["sign", str(model), "--key", str(tmp_path / name)], words)
    assert not model.with_suffix(".sig").exists()


def test_a_file_that_is_no_key_or_certificate_is_told_before_any_signature_is_judged(
    model: Path, signer: signers.Key, capsys: pytest.CaptureFixture[str]
) -> None:
    name = str(model)  # not signed
    for file in (signer.private, model):
        verify_by = ["verify-signature", name, "--public-key", str(file)]
        complains(capsys, verify_by, f"{file} is no public key; expected an elliptic-curve one")
    for file in (signer.public, model):
        verify_by = ["verify-signature", name, "--identity", "me", "--certificate", str(file)]
        complains(capsys, verify_by, f"{file} is no certificate; expected")
    signed_by = ["sign", name, "--key", str(signer.private), "--certificate", name]
    complains(capsys, signed_by, f"{model} is no certificate; expected")
    locked = signers.key(model.parent, "locked", encrypted=True)
    signed_by = ["sign", name, "--key", str(locked.private), "--certificate", name]
    complains(capsys, signed_by, "expected beside --certificate one that is not encrypted")


def test_many_names_are_told_as_a_count(
    model: Path, signer: signers.Key, capsys: pytest.CaptureFixture[str]
) -> None:
    for at in range(20):
        (model.parent / f"{at}.png").touch()
    count = len(covered(model.parent))
    assert run(["sign", str(model.parent), "--key", str(signer.private)]) == 0
    assert capsys.readouterr().out.endswith(f"model.sig, which covers {count} files\n")
    assert run(["verify-signature", str(model.parent), "--public-key", str(signer.public)]) == 0
    assert capsys.readouterr().out == f"signed: {count} files\n"


def test_other_verifiers_of_the_format_accept_it(model: Path, signer: signers.Key) -> None:
    from model_signing import verifying

    signature = sign(model, key=signer.private)
    config = verifying.Config().use_elliptic_key_verifier(public_key=signer.public)
    config.set_ignore_unsigned_files(True).verify(model.parent, signature)


def test_keys_need_neither_torch_nor_a_network(model: Path, signer: signers.Key) -> None:
    code = f"""
import socket, sys
from pathlib import Path
sys.modules |= dict.fromkeys(("torch", "torchvision", "onnx"))  # an import of them fails
def none(*_, **__): raise OSError("no network")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = none
from dverge_serve.engine.signature import sign, verify
from dverge_serve.engine.trust import Trust
model = Path({str(model)!r})
sign(model, key=Path({str(signer.private)!r}))
print(len(verify(model, Trust(public_key=Path({str(signer.public)!r})))))
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"{len(covered(model))}\n"), done.stderr


def test_the_commands(model: Path, signer: signers.Key, capsys: pytest.CaptureFixture[str]) -> None:
    name, key = str(model), ["--key", str(signer.private)]
    public = ["--public-key", str(signer.public)]
    assert run(["sign", name, *key]) == 0
    assert "model.sig, which covers model.onnx, model.report.json" in capsys.readouterr().out
    assert run(["verify-signature", name, *public]) == 0
    assert "signed: model.cdx.json, model.md, model.onnx" in capsys.readouterr().out
    ways = "expected --public-key, or --certificate and --identity, or --identity and --issuer"
    for arguments, words in (
        (["sign", name], "expected one of --key and --sigstore"),
        (["sign", name, *key, "--sigstore"], "--key with --sigstore"),
        (["sign", name, "--sigstore", "--certificate", name], "--certificate or --chain without"),
        (["sign", f"{name}x", *key], "no model at"),
        (["sign", name, "--key", "none.pem"], "cannot read none.pem (No such file"),
        (["verify-signature", name], ways),
        (["verify-signature", name, *public, "--issuer", "x"], ways),
        (
            ["verify-signature", name, "--identity", "me"],
            f"--identity for the signer .*{ways}"[:14],
        ),
        (["verify-signature", name, "--public-key", "none.pub"], "no file none.pub"),
    ):
        complains(capsys, arguments, words)
    model.write_text("another")
    complains(capsys, ["verify-signature", name, *public], "model.onnx is not the file that was")


def test_a_missing_extra_is_one_line(
    model: Path,
    signer: signers.Key,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "model_signing", None)
    complains(capsys, ["sign", str(model), "--key", str(signer.private)], "dverge-serve[sign]")
