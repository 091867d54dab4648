"""The service's settings: one object, read once from the environment."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from dverge_serve.engine.trust import Trust
from dverge_serve.errors import UserError, rename_parameters

if TYPE_CHECKING:
    from dverge_serve.engine.session import Device

Exposure = Literal["label", "scores", "full"]
Log = Literal["text", "json"]
Watching = Literal["off", "observe", "refuse"]
PREFIX = "DVERGE_"
MAX_WORKERS = 256


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How one service runs. Every field is the environment variable `DVERGE_<FIELD>`."""

    model: Path = Path("model.onnx")
    """The model file; its report is looked for beside it."""
    model_sha256: str = ""
    """Serve no other file than the one with this SHA-256 (64 hex digits)."""
    model_public_key: str = ""
    """Serve no model that is not signed with this key: a PEM file. None by default."""
    model_certificate: str = ""
    """The same by a certificate: a PEM file with the authority's; with `DVERGE_MODEL_IDENTITY`."""
    model_identity: str = ""
    """Who signed: a name in the signer's certificate."""
    model_issuer: str = ""
    """OpenID Connect issuer of `DVERGE_MODEL_IDENTITY`, for signatures by Sigstore."""
    token: str = ""
    """Bearer token that callers must show; none by default."""
    admin_token: str = ""
    """Bearer token for reload and metrics, in place of `DVERGE_TOKEN`; none by default."""
    expose: Exposure | None = None
    """How much callers see; unset means `full` on loopback and `scores` beyond it."""
    max_body_bytes: int = 8_388_608
    """Largest request body, bytes."""
    max_pixels: int = 16_777_216
    """Largest image, width x height in pixels."""
    max_images: int = 64
    """Most images in one request."""
    queue: int = 512
    """Most images that may wait for the engine, in each worker; more are answered 503."""
    timeout_s: float = 30.0
    """Seconds for a body to arrive (408), and again for its answer to be ready (504)."""
    threads: int = 0
    """Threads for one engine call; 0 shares the cores out among the workers."""
    workers: int = 1
    """Worker processes."""
    device: Device = "auto"
    """`auto` takes CUDA where it works, `cuda` insists on it, `cpu` never does."""
    log: Log = "text"
    """Form of the log lines."""
    watch: Watching = "observe"
    """Near-copies beyond `DVERGE_WATCH_BUDGET`: counted and logged, or refused as well (429)."""
    watch_budget: int = 50
    """Near-copies of one image that each worker takes in a day."""

    def __post_init__(self) -> None:
        if self.model_sha256 and not re.fullmatch(r"[0-9a-fA-F]{64}", self.model_sha256):
            raise UserError(f"{PREFIX}MODEL_SHA256 is '{self.model_sha256}'", "64 hex digits")
        for name in _TOKENS:
            # The value is a secret: say what is wrong with it, not what it is.
            if not re.fullmatch(r"[!-~]*", getattr(self, name)):
                raise UserError(f"{variable(name)} holds spaces or non-ASCII", "printable ASCII")
        if self.token and self.token == self.admin_token:
            raise UserError(f"{PREFIX}ADMIN_TOKEN is the same as {PREFIX}TOKEN", "another one")
        for name, lowest in _LOWEST.items():
            if not getattr(self, name) >= lowest:  # also false for NaN
                raise _bad(name, getattr(self, name), f"at least {lowest}")
        if self.timeout_s > 86_400:
            raise _bad("timeout_s", self.timeout_s, "at most 86400 seconds")
        if self.workers > MAX_WORKERS:
            raise _bad("workers", self.workers, f"at most {MAX_WORKERS}")
        for name, options in _OPTIONS.items():
            value = getattr(self, name)
            if value not in options:
                raise _bad(name, value, ", ".join(str(option) for option in options if option))

    @property
    def trust(self) -> Trust | None:
        """Whose signature a model must have; None if it needs none.

        Raises:
            UserError: the settings do not name a signer, or a file is not there.
        """
        key, certificate = self.model_public_key, self.model_certificate
        if not (key or certificate or self.model_identity or self.model_issuer):
            return None
        return Trust(
            public_key=Path(key) if key else None,
            certificate=Path(certificate) if certificate else None,
            identity=self.model_identity,
            issuer=self.model_issuer,
        )

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None) -> Settings:
        """Read the settings from `DVERGE_*` variables; an empty one counts as unset.

        Not so a token, hash or signer: an empty one most likely came from a variable that is not
        set, and the service would be open to anyone, or serve any model.

        Unknown names are left alone: Kubernetes, for one, makes up `DVERGE_PORT` for a Service
        called dverge.

        Raises:
            UserError: a value that cannot be used, naming the variable.
        """
        environ = os.environ if environ is None else environ
        values: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            name = variable(field.name)
            text = environ.get(name, "").strip()
            if name in environ and not text and field.default == "":
                expected = "a token" if field.name in _TOKENS else "a value"
                raise UserError(f"{name} is empty", expected, "unset it to ask for none")
            if text:
                values[field.name] = _parse(field.name, text, field.default)
        return cls(**values)

    def environment(self, environ: Mapping[str, str] | None = None) -> dict[str, str]:
        """Return `environ` with the variables that `from_environment` reads back as these settings.

        Args:
            environ: none by default; whatever settings it names give way.
        """
        fields = {variable(field.name): field for field in dataclasses.fields(self)}
        others = {key: value for key, value in (environ or {}).items() if key not in fields}
        return others | {
            key: str(value)
            for key, field in fields.items()
            if (value := getattr(self, field.name)) != field.default
        }


def variable(name: str) -> str:
    """Return the environment variable of a setting."""
    return PREFIX + name.upper()


def as_variables(error: UserError) -> str:
    """Return an error's text with variables in place of the parameters that it names."""
    names = {field.name: variable(field.name) for field in dataclasses.fields(Settings)}
    names["expected_sha256"] = variable("model_sha256")
    names |= {name: variable(f"model_{name}") for name in _SIGNER}
    return rename_parameters(str(error), names)


_SIGNER = ("public_key", "certificate", "identity", "issuer")
_TOKENS = ("token", "admin_token")
_LOWEST: dict[str, float] = {
    "max_body_bytes": 1,
    "max_pixels": 1,
    "max_images": 1,
    "queue": 1,
    "timeout_s": 0.001,
    "threads": 0,
    "workers": 1,
    "watch_budget": 1,
}
_OPTIONS: dict[str, tuple[str | None, ...]] = {
    "expose": (None, *get_args(Exposure)),
    "device": ("auto", "cpu", "cuda"),
    "log": get_args(Log),
    "watch": get_args(Watching),
}


def _parse(name: str, text: str, default: object) -> object:
    kind: type[Any] = str if default is None else type(default)
    try:
        return kind(text)
    except ValueError as error:
        raise _bad(name, text, "a whole number" if kind is int else "a number") from error


def _bad(name: str, value: object, expected: str) -> UserError:
    return UserError(f"{variable(name)} is '{value}'", expected)
