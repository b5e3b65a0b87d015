"""Settings: defaults, the environment, and values that cannot be used."""

from __future__ import annotations

import os
import traceback

import pytest
from pydantic import ValidationError

from gonka_poc.config import Settings, SettingsError, load_settings

TEXTS = ("api_token", "callback_allow", "compile", "outbox_path", "priority")
NAMES = [name for name in Settings.model_fields if name not in TEXTS]


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch):
    for name in [name for name in os.environ if name.startswith("POC_")]:
        monkeypatch.delenv(name)


def test_defaults():
    assert load_settings().model_dump() == {
        "api_token": None,
        "callback_allow": "",
        "callback_interval_sec": 5.0,
        "callback_timeout_sec": 30.0,
        "chat_backoff_sec": 0.05,
        "compile": "auto",
        "batch_size_default": 32,
        "batch_timeout_sec": 600.0,
        "max_step_ms": 200.0,
        "max_body_bytes": 16 * 1024 * 1024,
        "max_queued_nonces": 100_000,
        "outbox_grace_sec": 600.0,
        "outbox_max_bytes": 10 * 1024**3,
        "outbox_path": "$XDG_STATE_HOME/gonka_poc/outbox.sqlite3",
        "priority": "chat",
        "result_ttl_sec": 300.0,
    }


@pytest.mark.parametrize("name", NAMES)
def test_each_setting_is_read_from_its_variable(monkeypatch, name):
    value = 4321_000
    monkeypatch.setenv(f"POC_{name.upper()}", "4321000")
    assert load_settings().model_dump() == {**Settings().model_dump(), name: value}
    assert getattr(load_settings(), name) == value


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", ["", "many", "-1", "0", "nan"])
def test_a_value_that_cannot_be_used_is_named(monkeypatch, name, value):
    monkeypatch.setenv(f"POC_{name.upper()}", value)
    with pytest.raises(SettingsError, match=f"POC_{name.upper()}='{value}': "):
        load_settings()


def test_a_path_that_is_empty_is_named(monkeypatch):
    monkeypatch.setenv("POC_OUTBOX_PATH", "")
    with pytest.raises(SettingsError, match="POC_OUTBOX_PATH='': "):
        load_settings()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("api_token", "s3cret"),
        ("callback_allow", "a.example, 10.0.0.0/8"),
        ("priority", "poc"),
        ("outbox_path", "/data/outbox"),
    ],
)
def test_each_text_is_read_from_its_variable(monkeypatch, name, value):
    monkeypatch.setenv(f"POC_{name.upper()}", value)
    settings = load_settings()
    found = settings.api_token.get_secret_value() if name == "api_token" else getattr(settings, name)
    assert found == value
    assert settings.model_copy(update={name: getattr(Settings(), name)}).model_dump(exclude={name}) == (
        Settings().model_dump(exclude={name})
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("priority", ""),
        ("priority", "CHAT"),
        ("priority", "both"),
        ("callback_allow", "a.example, 10.0.0.1/8"),
        ("callback_allow", "http://a.example"),
    ],
)
def test_a_text_that_cannot_be_used_is_named(monkeypatch, name, value):
    monkeypatch.setenv(f"POC_{name.upper()}", value)
    with pytest.raises(SettingsError, match=f"POC_{name.upper()}='{value}': "):
        load_settings()


@pytest.mark.parametrize("value", ["", " ", "two words", "tab\t", "caf\u00e9", "line\nbreak"])
def test_a_token_that_cannot_be_used_is_not_shown(monkeypatch, value):
    monkeypatch.setenv("POC_API_TOKEN", value)
    with pytest.raises(SettingsError, match=r"POC_API_TOKEN: .*printable ASCII") as caught:
        load_settings()
    shown = "".join(traceback.format_exception(caught.value))
    assert not value.strip() or value not in shown


def test_the_token_is_in_no_text_of_the_settings(monkeypatch):
    monkeypatch.setenv("POC_API_TOKEN", "s3cret")
    settings = load_settings()
    assert "s3cret" not in f"{settings} {settings!r} {settings.model_dump()} {settings.model_dump_json()}"


@pytest.mark.parametrize(
    "name",
    [
        "callback_interval_sec",
        "callback_timeout_sec",
        "chat_backoff_sec",
        "outbox_grace_sec",
        "batch_timeout_sec",
        "max_step_ms",
    ],
)
def test_no_pause_is_endless(monkeypatch, name):
    monkeypatch.setenv(f"POC_{name.upper()}", "inf")
    with pytest.raises(SettingsError, match=f"POC_{name.upper()}"):
        load_settings()


@pytest.mark.parametrize("name", ["max_body_bytes", "max_queued_nonces"])
def test_counts_are_whole_numbers(monkeypatch, name):
    monkeypatch.setenv(f"POC_{name.upper()}", "4321.5")
    with pytest.raises(SettingsError, match=f"POC_{name.upper()}"):
        load_settings()


def test_all_values_that_cannot_be_used_are_named_at_once(monkeypatch):
    monkeypatch.setenv("POC_MAX_BODY_BYTES", "small")
    monkeypatch.setenv("POC_RESULT_TTL_SEC", "-5")
    with pytest.raises(SettingsError, match=r"POC_MAX_BODY_BYTES='small'.*POC_RESULT_TTL_SEC='-5'"):
        load_settings()


def test_settings_do_not_change():
    settings = load_settings()
    with pytest.raises(ValidationError):
        settings.max_queued_nonces = 1
    assert settings.max_queued_nonces == 100_000
