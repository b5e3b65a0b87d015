"""The settings of the server: one list of POC_* environment variables, read once when the server starts."""

from __future__ import annotations

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from gonka_poc.errors import SettingsError


class Settings(BaseSettings):
    """Each field is the environment variable POC_<NAME>; the README's table is checked against this class."""

    model_config = SettingsConfigDict(env_prefix="POC_", frozen=True)

    callback_interval_sec: float = Field(
        default=5.0, gt=0, allow_inf_nan=False, description="seconds between two callbacks of one receiver"
    )
    callback_timeout_sec: float = Field(
        default=30.0, gt=0, allow_inf_nan=False, description="seconds that a receiver has to answer"
    )
    chat_backoff_sec: float = Field(
        default=0.05, gt=0, allow_inf_nan=False, description="seconds to wait before asking again whether chat is idle"
    )
    max_body_bytes: int = Field(default=32 * 1024 * 1024, ge=1024, description="largest request body, bytes")
    max_queued_nonces: int = Field(default=100_000, ge=1, description="nonces that may wait in the queue")
    outbox_grace_sec: float = Field(
        default=600.0, gt=0, allow_inf_nan=False, description="seconds that a receiver is tried after its round ended"
    )
    outbox_max_bytes: int = Field(
        default=10 * 1024**3, ge=256 * 1024, description="size of undelivered callbacks at which new work is refused"
    )
    outbox_path: str = Field(
        default="$XDG_STATE_HOME/gonka_poc/outbox.sqlite3",
        min_length=1,
        description="file of undelivered callbacks (`$XDG_STATE_HOME`: `~/.local/state`); `:memory:` keeps no file",
    )
    result_ttl_sec: float = Field(
        default=300.0, gt=0, allow_inf_nan=False, description="seconds that a finished result can be polled"
    )


def load_settings() -> Settings:
    """The settings of this process. Raises SettingsError naming every variable that cannot be used."""
    try:
        return Settings()
    except ValidationError as error:
        lines = [f"POC_{str(e['loc'][0]).upper()}={e['input']!r}: {e['msg']}" for e in error.errors()]
        raise SettingsError("settings that cannot be used: " + "; ".join(lines)) from error
