"""Settings: defaults, the environment, and values that cannot be used."""

from __future__ import annotations

import os
import traceback

import pytest
from pydantic import ValidationError

from gonka_poc.config import FOREIGN_VARIABLES, Settings, SettingsError, load_settings, unused_variables

TEXTS = ("api_token", "callback_allow", "compile", "outbox_path", "priority")
SWITCHES = ("batch_invariant", "calibration", "trust_loopback")
NAMES = [name for name in Settings.model_fields if name not in TEXTS + SWITCHES]


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch):
    for name in [name for name in os.environ if name.startswith("POC_")]:
        monkeypatch.delenv(name)


def test_defaults():
    assert load_settings().model_dump() == {
        "api_token": None,
        "batch_invariant": False,
        "calibration": False,
        "callback_allow": "",
        "callback_interval_sec": 5.0,
        "callback_timeout_sec": 30.0,
        "chat_backoff_sec": 0.05,
        "compile": "auto",
        "batch_size_default": 32,
        "batch_timeout_sec": 600.0,
        "max_step_ms": 200.0,
        "max_body_bytes": 16 * 1024 * 1024,
        "max_k_dim": 2048,
        "max_queued_nonces": 100_000,
        "outbox_grace_sec": 600.0,
        "outbox_max_bytes": 10 * 1024**3,
        "outbox_path": "$XDG_STATE_HOME/gonka_poc/outbox.sqlite3",
        "priority": "chat",
        "result_ttl_sec": 300.0,
        "trust_loopback": False,
    }


@pytest.mark.parametrize("name", NAMES)
def test_each_setting_is_read_from_its_variable(monkeypatch, name):
    value = 4321_000
    monkeypatch.setenv(f"POC_{name.upper()}", "4321000")
    assert load_settings().model_dump() == {**Settings().model_dump(), name: value}
    assert getattr(load_settings(), name) == value


@pytest.mark.parametrize("name", SWITCHES)
def test_switches(monkeypatch, name):
    monkeypatch.setenv(f"POC_{name.upper()}", "1")
    assert getattr(load_settings(), name) is True
    monkeypatch.setenv(f"POC_{name.upper()}", "perhaps")
    with pytest.raises(SettingsError, match=f"POC_{name.upper()}='perhaps'"):
        load_settings()


def test_batch_invariant_kernels_and_compiled_layers_exclude_each_other(monkeypatch):
    monkeypatch.setenv("POC_BATCH_INVARIANT", "1")
    assert not load_settings().compiles(["cuda"])
    monkeypatch.setenv("POC_COMPILE", "always")
    with pytest.raises(SettingsError, match="POC_COMPILE='always': .*POC_BATCH_INVARIANT"):
        load_settings()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", ["many", "-1", "0", "nan"])
def test_a_value_that_cannot_be_used_is_named(monkeypatch, name, value):
    monkeypatch.setenv(f"POC_{name.upper()}", value)
    with pytest.raises(SettingsError, match=f"POC_{name.upper()}='{value}': "):
        load_settings()


@pytest.mark.parametrize("name", [name for name in Settings.model_fields if name != "api_token"])
def test_empty_is_unset(monkeypatch, name):
    """Compose files cannot pass "unset"."""
    before = load_settings()
    monkeypatch.setenv(f"POC_{name.upper()}", "")
    assert load_settings() == before
    assert unused_variables() == []


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


def test_an_empty_token_says_what_to_do(monkeypatch):
    monkeypatch.setenv("POC_API_TOKEN", "")
    with pytest.raises(SettingsError, match=r"POC_API_TOKEN: .*not empty; unset it to ask for no token"):
        load_settings()


# --- variables that no setting reads ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("POC_CALLBACK_INTERVAL", "POC_CALLBACK_INTERVAL_SEC"),
        ("POC_OUTBOX_DIR", "POC_OUTBOX_PATH"),
        ("POC_PRIORTY", "POC_PRIORITY"),
        ("poc_api_tokn", "POC_API_TOKEN"),
    ],
)
def test_a_misspelled_variable_is_given_the_nearest_name(name, nearest):
    expected = f"{name} is no setting of this server and has no effect; did you mean {nearest}?"
    assert unused_variables({name: "1", "PATH": "/bin"}) == [expected]


def test_a_variable_like_none_of_ours():
    (sentence,) = unused_variables({"POC_XYZZY": "1"})
    assert "`gonka-poc serve --help` lists those that are read" in sentence


def test_variables_of_other_software_are_not_taken_for_misspelled_ones():
    names = [*FOREIGN_VARIABLES, "POC_DECODE_STEPS", "POC_ROLLING_WINDOW"]
    sentences = unused_variables(dict.fromkeys(names, "1"))
    assert [sentence.partition(" ")[0] for sentence in sentences] == sorted(names)
    assert all("has no effect on this server" in sentence and "mean" not in sentence for sentence in sentences)
    assert "POC_RPC_TIMEOUT_MS has no effect on this server; POC_BATCH_TIMEOUT_SEC does the same here" in sentences
    assert "POC_DECODE_STEPS has no effect on this server" in sentences


def test_what_does_the_same_is_a_setting():
    ours = {f"POC_{name.upper()}" for name in Settings.model_fields}
    assert {name for name in FOREIGN_VARIABLES.values() if name} <= ours
    assert not ours & set(FOREIGN_VARIABLES)


def test_nothing_is_said_of_what_is_read_or_empty_or_of_tests(monkeypatch):
    ours = {f"POC_{name.upper()}": "1" for name in Settings.model_fields}
    assert unused_variables({**ours, "poc_priority": "poc", "POC_OLD_NAME": "", "POC_TEST_KILLS": "1"}) == []
    assert unused_variables() == []
    monkeypatch.setenv("POC_PRIORTY", "poc")
    assert len(unused_variables()) == 1  # of this process
