"""A server's hold on its outbox file: the connection and the slot, and what is done where the file is damaged."""

from __future__ import annotations

import logging
import os
import sqlite3
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress

from gonka_poc.callbacks.contents import damaged_heads
from gonka_poc.callbacks.file import OPEN_TIMEOUT_SEC, check_whole, connect, outbox_path, transaction, translate_errors
from gonka_poc.callbacks.locks import IN_MEMORY, Slot, opening
from gonka_poc.callbacks.salvage import set_aside
from gonka_poc.errors import OutboxDamagedError, OutboxFullError

logger = logging.getLogger("vllm.gonka_poc.callbacks")

RECOVERY_PAUSE_SEC = 60.0
PARK_DAMAGED = "UPDATE batch SET status = 'parked', reason = ? WHERE id = ?"


class FileHold:
    """The open outbox file. One that is damaged, or cannot be opened yet, is opened by a later use."""

    def __init__(self, setting: str, must_open: bool, clock: Callable[[], float] = time.monotonic) -> None:
        """Open or make the file; one that is damaged is replaced (`recover`). Without `must_open`, one that cannot be
        used now is left for later. Raises OutboxError where the setting is wrong."""
        self.path = outbox_path(setting)
        self.damaged_batches = 0
        """Batches that were set aside since the start, because they were damaged."""
        self.damage: str | None = None
        """The damage that was met last; None if there was none."""
        self._clock = clock
        self._next_recovery = 0.0
        self._refusal: str | None = None
        self._closed = False
        self._slot: Slot | None = None
        self._db: sqlite3.Connection | None = None
        self._files: list[tuple[int, int] | None] = []
        try:
            self._open()
        except (OutboxDamagedError, OutboxFullError):
            if must_open:
                raise

    @property
    def db(self) -> sqlite3.Connection:
        """The connection. Raises what `recover` raises, and OutboxError, where the file cannot be opened."""
        if self._closed:
            raise sqlite3.ProgrammingError("the outbox is a closed database")
        if self._db is None:
            self._open()
            assert self._db is not None
        return self._db

    @property
    def slot(self) -> Slot:
        """This server's place in the file."""
        if self._slot is None:
            self._slot = Slot(self.path)
        return self._slot

    def transaction(self) -> AbstractContextManager[None]:
        """All that is written inside, or nothing of it (`file.transaction`)."""
        return transaction(self.db, self.path)

    def ensure_in_place(self) -> None:
        """Raise OutboxFullError where the file, or its write-ahead log, was removed or exchanged: what is written to it
        would be lost with this process. One that is put back is used again."""
        if self._files and self._files != _identities(self.path):
            raise OutboxFullError(
                f"the outbox {self.path!r} (or the -wal file beside it) was removed or exchanged while it was in use: "
                "put it back, or restart the server to begin another; nothing new is stored until then"
            )

    def park_damaged(self, batch_id: int, reason: str) -> None:
        """Inside a transaction, park a batch whose content is not what was stored."""
        self.db.execute(PARK_DAMAGED, (reason, batch_id))
        self._record(1, f"callback {batch_id}: {reason}")

    def recover(self, found: str) -> None:
        """Replace a damaged file by one with all batches in it that are whole, where no other server uses it. `found`
        is the damage. Raises OutboxDamagedError where that cannot be done now, or was tried within the last minute."""
        if self._clock() < self._next_recovery or self.path == IN_MEMORY:
            raise OutboxDamagedError(self._refusal or found)
        logger.error("PoC: %a", found)
        try:
            self._recover()
        except OutboxDamagedError as error:
            self._refusal = str(error)
            raise
        self._refusal = None

    def _recover(self) -> None:
        self._next_recovery = self._clock() + RECOVERY_PAUSE_SEC
        try:
            with opening(self.path, OPEN_TIMEOUT_SEC, None):  # whoever opens it has a slot before this is free again
                if not self.slot.is_alone():
                    raise OutboxDamagedError(
                        f"the outbox {self.path!r} is damaged, and other servers use it: stop all of them but one, "
                        "which then sets the file aside and takes over what is whole"
                    )
                self._close_db()
                salvage = set_aside(self.path)
        except (OSError, sqlite3.Error) as error:
            raise OutboxDamagedError(
                f"the outbox {self.path!r} is damaged, and what is whole cannot be copied: {error}; free disk space, "
                "or move the file away together with those whose names begin with its name"
            ) from error
        self._record(salvage.damaged, f"the file was damaged, and is now {salvage.aside}; {salvage.whole} were whole")

    def heal(self) -> None:
        """Open a file that could not be opened yet, or `recover` one that is damaged. Raises what they raise."""
        if self._db is None:
            self._open()
        else:
            self.recover("the outbox is damaged")

    def close(self) -> None:
        """Leave the file, with all that is in it, to the next server."""
        self._closed = True
        try:
            self._close_db()
        finally:
            if self._slot is not None:
                self._slot.close()

    def _open(self) -> None:
        try:
            self._open_whole()
        except OutboxDamagedError as error:
            self.recover(str(error))
            self._open_whole()

    def _open_whole(self) -> None:
        db = connect(self.path, create=True, claim=lambda: self.slot)
        try:
            with translate_errors(self.path):
                check_whole(db, self.path)
            with transaction(db, self.path):
                # the server that had this place before has ended
                db.execute("UPDATE round SET slot = NULL WHERE slot = ?", (self.slot.number,))
                damaged = list(damaged_heads(db))
                for batch_id, reason in damaged:
                    db.execute(PARK_DAMAGED, (reason, batch_id))
        except BaseException:
            db.close()
            raise
        for batch_id, reason in damaged:
            self._record(1, f"callback {batch_id}: {reason}")
        self._db = db
        self._files = [] if self.path == IN_MEMORY else _identities(self.path)

    def _record(self, batches: int, what: str) -> None:
        self.damaged_batches += batches
        self.damage = what
        logger.error("PoC: the outbox %a had %d damaged callbacks: %a", self.path, batches, what)

    def _close_db(self) -> None:
        db, self._db, self._files = self._db, None, []
        if db is not None:
            with suppress(sqlite3.DatabaseError):
                db.close()


def _identities(path: str) -> list[tuple[int, int] | None]:
    """Device and inode of the file and its log; None for what is not there."""
    found: list[tuple[int, int] | None] = []
    for name in (path, f"{path}-wal"):
        try:
            state = os.stat(name)
            found.append((state.st_dev, state.st_ino))
        except OSError:
            found.append(None)
    return found
