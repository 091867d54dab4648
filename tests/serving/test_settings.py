from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from dverge_serve.errors import UserError
from dverge_serve.serving.launch import serve
from dverge_serve.serving.settings import Settings
from tests.serving.server import free_port


def test_nothing_set_gives_the_documented_defaults() -> None:
    settings = Settings.from_environment({})
    assert settings.model == Path("model.onnx")
    assert (settings.max_body_bytes, settings.max_pixels) == (8_388_608, 16_777_216)
    assert (settings.max_images, settings.queue, settings.timeout_s) == (64, 512, 30.0)
    assert settings.token == ""
    assert settings.expose is None
    assert settings.log == "text"


def test_every_field_is_read_from_its_variable() -> None:
    values = {
        "DVERGE_MODEL": "other.onnx",
        "DVERGE_MODEL_SHA256": "ab" * 32,
        "DVERGE_MODEL_PUBLIC_KEY": "signer.pub",
        "DVERGE_MODEL_CERTIFICATE": "authority.pem",
        "DVERGE_MODEL_IDENTITY": "release@example.org",
        "DVERGE_MODEL_ISSUER": "https://issuer.example.org",
        "DVERGE_TOKEN": "secret",
        "DVERGE_ADMIN_TOKEN": "another",
        "DVERGE_EXPOSE": "label",
        "DVERGE_MAX_BODY_BYTES": "1000",
        "DVERGE_MAX_PIXELS": "100",
        "DVERGE_MAX_IMAGES": "3",
        "DVERGE_QUEUE": "5",
        "DVERGE_TIMEOUT_S": "2.5",
        "DVERGE_THREADS": "2",
        "DVERGE_WORKERS": "4",
        "DVERGE_DEVICE": "cpu",
        "DVERGE_LOG": "json",
        "DVERGE_WATCH": "refuse",
        "DVERGE_WATCH_BUDGET": "7",
    }
    assert len(values) == len(dataclasses.fields(Settings))
    settings = Settings.from_environment(values)
    defaults = Settings()
    for field in dataclasses.fields(Settings):
        assert getattr(settings, field.name) != getattr(defaults, field.name), field.name
    assert Settings.from_environment(settings.environment()) == settings


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch, gray_model: Path) -> list[Settings]:
    """What `dverge serve` would have become, instead of becoming it."""
    found: list[Settings] = []

    def become(_: str, __: list[str], environment: dict[str, str]) -> None:
        found.append(Settings.from_environment(environment))
        raise SystemExit

    monkeypatch.setattr("os.execve", become)
    monkeypatch.setattr("os.name", "posix")
    monkeypatch.setenv("DVERGE_MODEL", str(gray_model))
    monkeypatch.setenv("DVERGE_TOKEN", "secret")
    monkeypatch.setenv("DVERGE_WORKERS", "4")
    return found


def test_serve_takes_from_the_environment_what_it_is_not_given(
    launched: list[Settings], gray_model: Path
) -> None:
    with pytest.raises(SystemExit):
        serve("127.0.0.1", free_port(), model=None, workers=None, token=None, device=None)
    (settings,) = launched
    assert (settings.model, settings.token, settings.workers) == (gray_model, "secret", 4)


def test_what_serve_is_given_wins_over_the_environment(
    launched: list[Settings], gray_model: Path
) -> None:
    """Also where what is given is a default."""
    with pytest.raises(SystemExit):
        serve("127.0.0.1", free_port(), model=gray_model, workers=1, token="mine", device="auto")
    (settings,) = launched
    assert (settings.workers, settings.token, settings.device) == (1, "mine", "auto")


def test_an_empty_protection_is_refused_not_ignored(launched: list[Settings]) -> None:
    """It comes from a variable that is not set; the service would serve anyone, or any model."""
    with pytest.raises(UserError, match="`token` is empty"):
        serve("127.0.0.1", free_port(), token="")
    signer = ("PUBLIC_KEY", "CERTIFICATE", "IDENTITY", "ISSUER")
    protections = ("TOKEN", "ADMIN_TOKEN", "MODEL_SHA256", *(f"MODEL_{each}" for each in signer))
    for name in (f"DVERGE_{each}" for each in protections):
        for value in ("", "  "):
            with pytest.raises(UserError, match=f"{name} is empty"):
                Settings.from_environment({name: value})
    assert launched == []


def test_empty_and_unknown_variables_are_left_alone() -> None:
    # Kubernetes makes up such names for a Service called dverge.
    environ = {"DVERGE_QUEUE": " ", "DVERGE_PORT": "tcp://10.0.0.1:3000"}
    assert Settings.from_environment(environ) == Settings()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("QUEUE", "many"),
        ("QUEUE", "0"),
        ("QUEUE", "1.5"),
        ("MAX_BODY_BYTES", "-1"),
        ("MAX_PIXELS", "0"),
        ("MAX_IMAGES", "0"),
        ("TIMEOUT_S", "0"),
        ("TIMEOUT_S", "nan"),
        ("TIMEOUT_S", "inf"),
        ("THREADS", "-1"),
        ("WORKERS", "0"),
        ("WORKERS", "100000"),
        ("EXPOSE", "all"),
        ("DEVICE", "tpu"),
        ("LOG", "xml"),
        ("WATCH", "block"),
        ("WATCH_BUDGET", "0"),
        ("MODEL_SHA256", "abc"),
        ("TOKEN", "two words"),
        ("ADMIN_TOKEN", "two words"),
    ],
)
def test_a_bad_value_is_one_line_that_names_the_variable(name: str, value: str) -> None:
    with pytest.raises(UserError) as error:
        Settings.from_environment({f"DVERGE_{name}": value})
    assert f"DVERGE_{name}" in str(error.value)
    assert "expected" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_bad_token_is_not_repeated() -> None:
    with pytest.raises(UserError) as error:
        Settings(token="pass word")
    assert "pass word" not in str(error.value)


def test_one_token_cannot_be_both() -> None:
    with pytest.raises(UserError, match="DVERGE_ADMIN_TOKEN is the same"):
        Settings(token="same", admin_token="same")
