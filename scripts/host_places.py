"""Where installations of this host are recorded: by a runner.py, by a journal, by the Python that MLNode starts."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, unquote

from host_common import InstallError, complain, say
from host_journal import Journal
from host_options import Options
from host_target import Host, Target, find_python, find_runner, journal_lock, pythons_of, state_folder
from mlnode_python import same_python
from patch_runner import note_in
from safe_files import read_file

NOTE = "journal: "


def note_of(state: Path) -> str:
    """The note for the markers in runner.py, by which its journal is found; ASCII, whatever the file's coding is."""
    return f"{NOTE}{quote(str(state))}"


def state_of(runner: Path | None) -> Path | None:
    """The journal's folder that the markers in the file name."""
    return state_in(read_file(str(runner))) if runner else None


def state_in(data: bytes) -> Path | None:
    """As `state_of`, of a file's content."""
    note = note_in(data)
    return Path(unquote(note.removeprefix(NOTE))) if note.startswith(f"{NOTE}/") else None


def find_recorded(options: Options, runner: Path | None) -> Target:
    """The Python of an installation: as named, else by the journal that runner.py names, else MLNode's."""
    state = state_of(runner) if options.python is None else None
    journal = Journal(state) if state else None
    # a runner.py that names a journal which does not name it was copied, or written by somebody else
    if journal and not any(change.get("path") == str(runner) for change in journal.changes):
        journal = None
    python = journal.settings.get("python") if journal else None
    if python and shutil.which(python):
        found = Target(python, source=f"the journal that {runner} names").look()
        if state_folder(found) == state:
            return found
    return find_python(options.python, runner)


def others(host: Host) -> list[Journal]:
    """The journals of other Pythons of this host that can be found from here, with something in them."""
    left = [*map(Path, Journal(host.state).peers), *filter(None, [state_of(host.runner)])]
    for named in pythons_of(host.runner):
        path = shutil.which(named.python)
        if path and not same_python(path, host.target.python):
            left += _state_of_python(path)
    found: dict[Path, Journal] = {}
    seen = {host.state}
    while left:
        state = left.pop()
        if state in seen:
            continue
        seen.add(state)
        try:
            found[state] = Journal(state)
        except (InstallError, OSError) as error:
            complain(f"warning: not looked at: {error}")
        else:
            left += map(Path, found[state].peers)
    return [journal for journal in found.values() if journal.changes]


def _state_of_python(python: str) -> list[Path]:
    try:
        return [state_folder(Target(python).look())]
    except (InstallError, OSError, ValueError):
        return []


def print_other_installations(host: Host) -> None:
    """Say what else is installed on this host."""
    for journal in others(host):
        files = [change["path"] for change in journal.changes if change["kind"] == "file"]
        python = journal.settings.get("python", "another Python")
        patched = f", and patched {', '.join(dict.fromkeys(files))}" if files else ""
        say(f"Also installed: into {python}{patched}; recorded in {journal.folder}")


def link_journals(host: Host, journal: Journal) -> None:
    """Let this journal and those of other Pythons of this host name each other, so that each leads to all."""
    for other in others(host):
        if journal.changes:
            _add_peer(journal, other.folder)
        try:
            with locked_journal(other.folder):
                now = Journal(other.folder)
                if journal.changes and now.changes:
                    _add_peer(now, journal.folder)
        except (InstallError, OSError) as error:
            complain(f"warning: {other.path} does not name {journal.folder}: {error}")


def _add_peer(journal: Journal, folder: Path) -> None:
    if str(folder) not in journal.peers:
        journal.peers.append(str(folder))
        journal.save()


@contextlib.contextmanager
def locked_journal(state: Path) -> Iterator[None]:
    """No run of that Python's writes its journal meanwhile; InstallError where one is at work."""
    folder = journal_lock(state)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise InstallError(f"another run is at work on {folder}") from None
    finally:
        os.close(descriptor)


def find_runner_of(options: Options, journal: Journal) -> Path | None:
    """The runner.py of the last installation, where none is named."""
    runner = journal.settings.get("runner")
    if options.mlnode_dir is None and runner and Path(runner).is_file():
        return Path(runner)
    return find_runner(options.mlnode_dir)
