"""Checks before the engine loads: the settings, and the outbox of other servers left as it is."""

from __future__ import annotations

import os
import pwd
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest

from gonka_poc.callbacks.admin import summary
from gonka_poc.callbacks.file import outbox_path, try_outbox
from gonka_poc.callbacks.outbox import Outbox
from gonka_poc.config import Settings
from gonka_poc.errors import OutboxError, OutboxFullError, SettingsError
from gonka_poc.preflight import check_settings

URL = "http://receiver"


def test_settings_that_can_be_used_are_returned(monkeypatch, tmp_path):
    monkeypatch.setenv("POC_OUTBOX_PATH", str(tmp_path / "outbox.sqlite3"))
    assert check_settings(print) == Settings()
    monkeypatch.setenv("POC_MAX_STEP_MS", "soon")
    with pytest.raises(SettingsError, match="POC_MAX_STEP_MS='soon'"):
        check_settings(print)


def test_batch_invariance_that_vllm_does_not_know_of(monkeypatch):
    monkeypatch.setenv("POC_BATCH_INVARIANT", "1")
    monkeypatch.delenv("VLLM_BATCH_INVARIANT", raising=False)
    with pytest.raises(SettingsError, match="POC_BATCH_INVARIANT=1 needs VLLM_BATCH_INVARIANT=1"):
        check_settings(print)
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    assert check_settings(print).batch_invariant


@pytest.mark.parametrize("path", ["/proc/nope/o.sqlite3", "/dev/null/o.sqlite3", "/proc"])
def test_an_outbox_that_cannot_be_used_says_what_to_do(monkeypatch, path):
    monkeypatch.setenv("POC_OUTBOX_PATH", path)
    with pytest.raises(OutboxError, match=f"the outbox '{path}' cannot be opened: .*; set POC_OUTBOX_PATH to"):
        check_settings(print)


def test_an_outbox_that_cannot_be_written_now(monkeypatch, tmp_path):
    """Another program holds the write lock."""
    path = str(tmp_path / "outbox.sqlite3")
    try_outbox(path)
    monkeypatch.setattr("gonka_poc.callbacks.file.BUSY_TIMEOUT_SEC", 0.01)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(OutboxFullError, match="cannot be written: database is locked"):
        try_outbox(path)
    other.close()
    try_outbox(path)


def test_the_path_without_home(monkeypatch):
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    setting = Settings.model_fields["outbox_path"].default
    assert outbox_path(setting) == f"{pwd.getpwuid(os.getuid()).pw_dir}/.local/state/gonka_poc/outbox.sqlite3"

    def no_such_user(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", no_such_user)
    with pytest.raises(OutboxError, match="no known home folder; set POC_OUTBOX_PATH to a file, or set HOME"):
        outbox_path(setting)


# --- trying the file ---------------------------------------------------------------------------------------------


def test_trying_makes_what_a_server_needs_and_disturbs_none(tmp_path):
    path = str(tmp_path / "new" / "outbox.sqlite3")
    try_outbox(path)
    servers = [Outbox(path, 2**20), Outbox(path, 2**20)]
    for server in servers:
        server.begin_round(URL, "fingerprint")
    try_outbox(path)
    connection = sqlite3.connect(path)
    assert connection.execute("SELECT slot FROM round ORDER BY id").fetchall() == [(0,), (1,)]
    connection.close()
    servers[0].close()
    try_outbox(path)
    servers[0] = Outbox(path, 2**20)
    assert servers[0]._slot.number == 0
    for server in servers:
        server.close()


def test_servers_that_start_at_once_may_all_try(tmp_path):
    path = str(tmp_path / "outbox.sqlite3")
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(try_outbox, [path] * 32)) == [None] * 32


@pytest.mark.parametrize("content", [b"something else", b"SQLite format 3\0" + bytes(84)])
def test_trying_another_programs_file_leaves_it_as_it_is(tmp_path, content):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(OutboxError, match="is not an outbox; it was left as it is"):
        try_outbox(str(path))
    assert path.read_bytes() == content


def test_trying_waits_for_no_file_that_is_not_there(tmp_path):
    with pytest.raises(OutboxError, match="there is no outbox"):
        try_outbox(str(tmp_path / "outbox.sqlite3"), create=False)
    assert list(tmp_path.iterdir()) == []


def test_without_create_no_file_is_made_and_nothing_is_added(tmp_path):
    """The file of an earlier release, without its lock: `gonka-poc outbox list` as root, say."""
    path = tmp_path / "outbox.sqlite3"
    Outbox(str(path), 2**20).close()
    with closing(sqlite3.connect(path)) as db:
        db.execute("DROP INDEX batch_counts")
        db.commit()
    for name in os.listdir(tmp_path):
        if name != path.name:
            os.unlink(tmp_path / name)
    before = path.read_bytes()
    try_outbox(str(path), create=False)
    assert summary(str(path)) == []
    assert os.listdir(tmp_path) == [path.name]
    assert path.read_bytes() == before
