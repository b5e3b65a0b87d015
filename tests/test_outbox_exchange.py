"""A damaged outbox is replaced by a new one: whatever step that stops at, all that is whole is delivered, and once."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from gonka_poc.callbacks import hold
from gonka_poc.callbacks.admin import summary
from gonka_poc.callbacks.outbox import Outbox
from gonka_poc.errors import OutboxDamagedError, OutboxError, OutboxFullError

URL = "http://a"
CAP = 10**9
STEPS = ("open", "rename", "link", "replace", "unlink", "fsync")  # of `os`: all that the exchange is made of


@pytest.fixture(scope="module")
def filled(tmp_path_factory) -> Path:
    """The files of a server that was killed: three batches, which only the log holds, and a count that is damaged."""
    folder, left = tmp_path_factory.mktemp("filled"), tmp_path_factory.mktemp("left")
    box = Outbox(str(folder / "outbox"), CAP)
    for first in (0, 20, 40):
        box.add_artifacts(
            URL, {"number": first}, [{"nonce": n, "vector_b64": "AAAA"} for n in range(first, first + 20)]
        )
    box._db.execute("UPDATE total SET batches = 7 WHERE parked = 0")
    for file in folder.iterdir():
        if not file.name.endswith("-shm"):
            shutil.copy(file, left)
    box.close()
    assert (left / "outbox-wal").stat().st_size > 40_000
    return left


def set_up(filled: Path, folder: Path) -> str:
    shutil.copytree(filled, folder)
    return str(folder / "outbox")


def read_along(path: str) -> sqlite3.Connection:
    """A reader, as `gonka-poc outbox list` is one: with it, closing the file does not empty the log into it."""
    reader = sqlite3.connect(path, isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT count(*) FROM batch").fetchall()
    return reader


def stop_at(step: int, patch: pytest.MonkeyPatch, stop: Callable[[], Any]) -> list[str]:
    """Call `stop` instead of the call number `step` of STEPS. Returns the list that their names are added to."""
    calls: list[str] = []

    def patched(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            if len(calls) == step + 1:
                stop()
            return real(*args, **kwargs)

        return call

    for name in STEPS:
        patch.setattr(os, name, patched(name, getattr(os, name)))
    return calls


def killed_at(step: int, path: str) -> bool:
    """Let a process open the outbox that is killed at that step; False if it has fewer steps."""
    child = os.fork()
    if child == 0:
        try:
            reader = read_along(path)
            stop_at(step, pytest.MonkeyPatch(), lambda: os._exit(9))
            Outbox(path, CAP)
            assert reader is not None
        except BaseException:
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 9)
    return status == 9


def sent(box: Outbox) -> list[int]:
    """The first nonces of the batches that are delivered."""
    first = []
    while (newest := box.newest(URL)) is not None and (batch := box.next_batch(URL, newest)) is not None:
        artifacts = json.loads(batch.body)["artifacts"]
        assert len(artifacts) == 20
        first.append(artifacts[0]["nonce"])
        box.mark_delivered(batch.id)
    return first


def check_left(path: str) -> None:
    """The damaged file and its log are there, once, and nothing of the exchange."""
    names = {file.name for file in Path(path).parent.iterdir()}
    assert not [name for name in names if name.startswith(("outbox.new", "outbox.finished", "outbox.damaged-2"))]
    with closing(sqlite3.connect(f"{path}.damaged-1")) as aside:
        assert aside.execute("SELECT count(*) FROM batch").fetchone() == (3,)


@pytest.mark.parametrize("opener", ["a server", "a command"])
def test_a_kill_at_any_step_loses_nothing(filled, tmp_path, opener):
    for step in itertools.count():
        path = set_up(filled, tmp_path / str(step))
        if not killed_at(step, path):
            break
        if opener == "a command":
            assert len(summary(path)) == 3
        with closing(Outbox(path, CAP)) as box:
            assert sent(box) == [0, 20, 40], f"killed at step {step}"
        check_left(path)
    assert step > 15


def test_a_failure_at_any_step_loses_nothing(filled, tmp_path, monkeypatch):
    def fail() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    failures = set[str]()
    for step in itertools.count():
        path = set_up(filled, tmp_path / str(step))
        with closing(read_along(path)), monkeypatch.context() as patch:
            calls = stop_at(step, patch, fail)
            try:
                Outbox(path, CAP).close()
            except Exception as error:  # some steps belong to the lock files: their failure is a wrong setting
                failures.add(type(error).__name__)
        with closing(Outbox(path, CAP)) as box:
            assert sent(box) == [0, 20, 40], f"failed at step {step}: {calls[-1]}"
        check_left(path)
        if len(calls) <= step:
            break
    assert {"OutboxDamagedError"} <= failures
    assert step > 15


def test_an_exchange_that_cannot_end_is_reported_and_goes_on_later(filled, tmp_path, monkeypatch):
    """Chat starts meanwhile; the damage is counted once."""
    path, replace = set_up(filled, tmp_path / "one"), os.replace

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "replace", fail)
    with closing(Outbox(path, CAP, must_open=False)) as box:
        for _ in range(2):
            with pytest.raises(OutboxFullError, match="cannot be put in its place: .*Read-only"):
                box.heal()
        monkeypatch.setattr(os, "replace", replace)
        box.heal()
        assert "damaged-1" in box.damage
        assert sent(box) == [0, 20, 40]
        assert box.damaged_batches == 4, "seven were counted, three were whole"
    check_left(path)


def test_a_server_that_starts_meanwhile_keeps_the_file_in_its_place(filled, tmp_path, monkeypatch):
    """It has its slot as soon as it has the file: what it writes would go into one that was set aside."""
    path = str(tmp_path / "outbox")
    one, connect = Outbox(path, CAP), hold.connect

    def connect_and_let_the_other_recover(*args: Any, **kwargs: Any) -> sqlite3.Connection:
        db = connect(*args, **kwargs)
        with pytest.raises(OutboxDamagedError, match="other servers use it"):
            one.recover("damaged")
        return db

    with monkeypatch.context() as patch:
        patch.setattr(hold, "connect", connect_and_let_the_other_recover)
        other = Outbox(path, CAP)
    other.add_artifacts(URL, {}, [{"nonce": n, "vector_b64": "AAAA"} for n in range(20)])
    assert [info.num_artifacts for info in summary(path)] == [20]
    other.close()
    one.close()


@pytest.mark.parametrize("content", [b"", b"jobs of another program"], ids=["empty", "text"])
def test_another_programs_file_with_the_name_of_a_new_one_stays(tmp_path, content):
    """It would take the place of the outbox, and what waits there would be gone."""
    path, other = str(tmp_path / "outbox"), tmp_path / "outbox.finished"
    box = Outbox(path, CAP)
    box.add_artifacts(URL, {}, [{"nonce": 1, "vector_b64": "AAAA"}])
    box.close()
    other.write_bytes(content)
    with pytest.raises(OutboxError, match=r"outbox\.finished' is not an outbox; it was left as it is"):
        Outbox(path, CAP)
    assert other.read_bytes() == content
    other.unlink()
    with closing(Outbox(path, CAP)) as box:
        assert box.counts().pending_artifacts == 1
