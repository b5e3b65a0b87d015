"""Files of the outbox and locks on them: for this user only, never waited for without end, and a server's slot."""

from __future__ import annotations

import fcntl
import logging
import os
import stat
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path

from gonka_poc.errors import OutboxError, OutboxFullError, printable

logger = logging.getLogger("vllm.gonka_poc.callbacks")

IN_MEMORY = ":memory:"
MAX_SLOTS = 1024
LOCK_POLL_SEC = 0.02


def open_private(path: str, flags: int = os.O_RDWR) -> int:
    """Open a plain file, which is made readable for its user alone (URLs may hold a password) where it is ours.
    Raises OSError, and OutboxError for what is no plain file: a FIFO would be waited for without end."""
    fd = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    try:
        state = os.fstat(fd)
        if not stat.S_ISREG(state.st_mode):
            raise OutboxError(f"{path!r} is no plain file; set POC_OUTBOX_PATH to a file on a local disk")
        if state.st_mode & 0o077 and os.geteuid() in (0, state.st_uid):
            logger.warning("PoC: %a was open to other users (mode %o); it is not any more", path, state.st_mode & 0o777)
            os.fchmod(fd, 0o600)
        elif state.st_uid != os.geteuid() != 0:
            logger.warning("PoC: %a belongs to user %d, who can read and change it", path, state.st_uid)
    except BaseException:
        os.close(fd)
        raise
    return fd


def make_folders(folder: Path) -> None:
    """Make a folder, and those above it that are missing, for this user alone; warn where others may write in it."""
    for each in (*reversed(folder.parents), folder):
        if not each.exists():
            each.mkdir(mode=0o700, exist_ok=True)
    mode = folder.stat().st_mode
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        logger.warning("PoC: every user can remove or exchange the outbox in %a (mode %o)", str(folder), mode & 0o777)


@contextmanager
def locked(path: str, wait_sec: float, owner: tuple[int, int] | None = None) -> Iterator[bool]:
    """Context: True if the lock file `path` was free, or became so within `wait_sec` seconds, and is held inside. A
    lock file that root makes gets `owner` (uid, gid), so that it shuts no server of that user out."""
    is_new = not os.path.lexists(path)
    fd = open_private(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)
    try:
        if is_new and owner is not None and os.geteuid() == 0:
            os.fchown(fd, *owner)
        yield _wait(fd, time.monotonic() + wait_sec)
    finally:
        os.close(fd)


def _wait(fd: int, deadline: float) -> bool:
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(LOCK_POLL_SEC)


@contextmanager
def opening(path: str, wait_sec: float, owner: tuple[int, int] | None) -> Iterator[None]:
    """Context in which no other process opens the outbox at `path`. Raises OutboxFullError that names the holder."""
    lock = f"{path}.lock-open"
    with locked(lock, wait_sec, owner) as is_free:
        if not is_free:
            raise OutboxFullError(
                f"the outbox {path!r} cannot be opened: {lock!r} has been held for {wait_sec:g} s by {_holder(lock)}"
            )
        yield


def _holder(lock: str) -> str:
    """The process that holds a lock, as far as /proc tells."""
    with suppress(OSError, ValueError):
        inode = os.stat(lock).st_ino
        for line in Path("/proc/locks").read_text().splitlines():
            fields = line.split()
            if "FLOCK" in fields and "->" not in fields and fields[5].endswith(f":{inode}"):
                name = Path(f"/proc/{fields[4]}/comm").read_text().strip()
                return f"process {fields[4]} ({printable(name)})"
    return "another process"


class Slot:
    """This server's place in an outbox file: the lowest number that no living server holds."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._lock = ExitStack()
        self.number = 0
        if path == IN_MEMORY:
            return
        try:
            for self.number in range(MAX_SLOTS):
                with ExitStack() as stack:
                    if stack.enter_context(locked(self._lock_path(self.number), 0)):
                        self._lock = stack.pop_all()
                        return
        except OSError as error:
            raise OutboxError(f"the outbox {path!r} cannot be locked: {error}") from error
        raise OutboxError(f"{MAX_SLOTS} servers use the outbox {path!r}; set POC_OUTBOX_PATH to another file")

    def orphaned(self, number: object) -> AbstractContextManager[bool]:
        """Context: True if no other living server has slot `number`; none can take it before the context ends."""
        if number in (None, self.number) or not (isinstance(number, int) and 0 <= number < MAX_SLOTS):
            return nullcontext(True)
        return locked(self._lock_path(number), 0)

    def is_alone(self) -> bool:
        """True if no other living server has a slot."""
        prefix = f"{os.path.basename(self._path)}.lock-"
        for name in os.listdir(os.path.dirname(os.path.abspath(self._path))):
            number = name.removeprefix(prefix)
            if name.startswith(prefix) and number.isdecimal() and int(number) != self.number:
                with self.orphaned(int(number)) as is_free:
                    if not is_free:
                        return False
        return True

    def close(self) -> None:
        """Give the place up."""
        self._lock.close()

    def _lock_path(self, number: int) -> str:
        return f"{self._path}.lock-{number}"
